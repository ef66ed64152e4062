"""Measured numbers with their uncertainty, and the file that keeps them: one for each machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from karui.artifact.files import write_file
from karui.errors import UsageError
from karui.measuring import this_machine

KIND = 3
"""Of the numbers in the file. Those of kind 1 held what the engine's recorder adds to each operator; those of kind 2
seconds of blocks, each in its moment, where now there are shares of what was timed beside them."""
CACHE = "KARUI_CACHE"
"""Environment variable: the folder of the timing cache."""
SURE = 2.0
"""How many standard errors a difference must be to count: about 95 in 100."""
MEDIAN = 1.2533 / 1.349
"""Standard error of a median, in quartile ranges over the root of the number of samples (exact for normal noise)."""
SITTING = 0.005
"""What a time differs by from one session of the engine to the next, as a share: where its memory happens to lie."""


@dataclass(frozen=True)
class Measured:
    """A number and its standard error; both in seconds, or both shares."""

    value: float
    error: float = 0.0

    @property
    def clear(self) -> bool:
        """Whether it differs from 0 by more than the clock's noise."""
        return abs(self.value) > SURE * self.error

    @property
    def settled(self) -> float:
        """Its value where that is clear, else 0: noise is neither a saving nor a cost."""
        return self.value if self.clear else 0.0


def typical(samples: Sequence[float] | np.ndarray, floor: float = 0.0) -> Measured:
    """The median of samples, with its error.

    Args:
        samples: one a round.
        floor: an error that more rounds do not lessen.

    Example:
        >>> typical([1.0, 1.0, 1.0]).value
        1.0
    """
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    error = MEDIAN * (high - low) / math.sqrt(len(samples))
    return Measured(middle, math.hypot(error, SITTING * middle, floor))


def added(parts: Sequence[Measured]) -> Measured:
    """A sum."""
    return Measured(sum(part.value for part in parts), math.hypot(*(part.error for part in parts)))


def times(one: Measured, factor: float) -> Measured:
    """A multiple."""
    return Measured(factor * one.value, abs(factor) * one.error)


def cache_folder() -> Path:
    """The folder of the timing cache: `$KARUI_CACHE`, else karui's folder among the user's caches."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "karui"


@dataclass
class TimingCache:
    """Measured numbers by key, in one file for each machine; written after every lot.

    Settings:
        file: where; None keeps nothing.
    """

    file: Path | None = None
    found: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, folder: Path | None = None) -> TimingCache:
        """The cache of this processor, with its instructions, and system.

        Raises:
            UsageError: its folder cannot be made, or not be written in.
        """
        machine = this_machine(())
        told = f"{KIND}|{machine.processor}|{machine.instructions}|{machine.threads}|{machine.system}"
        mark = hashlib.sha256(told.encode()).hexdigest()[:12]
        folder = folder or cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            why = f"The timing cache cannot be kept in {folder}: {error.strerror}."
            raise UsageError(why, f"Set {CACHE} to a folder that can be written in.") from error
        file = folder / f"timings-{mark}.json"
        return cls(file, _held(file))

    def put(self, found: Mapping[str, Measured]) -> None:
        """Keep new numbers; what another process measured meanwhile stays, and goes before the same ones of ours."""
        self.found.update(found)
        if self.file is not None and found:
            self.found.update(_held(self.file))
            kept = {key: [each.value, each.error] for key, each in self.found.items()}
            write_file(self.file, (json.dumps(kept, indent=0, sort_keys=True) + "\n").encode())


def _held(file: Path) -> dict[str, Measured]:
    """What a file holds; nothing where there is no such file, or it is damaged.

    Numbers without an error, as earlier versions kept them, are left out: they are measured again.
    """
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict):
        return {}
    return {str(key): Measured(float(pair[0]), float(pair[1])) for key, pair in held.items() if _is_pair(pair)}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, int | float) for part in value)
