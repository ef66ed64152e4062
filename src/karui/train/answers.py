"""What teachers have said, kept by the content of the samples: in memory, or in files that outlive the process.

A training draws its batches and their augmentation by (seed, step, process). So every student that is trained with the
same seed and settings sees the very same samples, as does a training that is taken up again, and the teacher has to run
only once for all of them. Answers are found by digest, and are therefore right whatever was drawn.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from karui.measuring.inference import tensors_of

KEY = 16
"""Bytes of a digest: two samples of equal digest are not to be expected."""
HEAD = struct.Struct("<IIBB")
"""Of a record: check sum of the rest, number of samples, bytes of a number, number of dimensions."""


@dataclass(frozen=True)
class _Block:
    """The answers of one batch that lie in a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str

    def read(self) -> Tensor:
        with self.file.open("rb") as handle:
            handle.seek(self.offset)
            values = np.fromfile(handle, dtype=self.kind, count=math.prod(self.shape))
        return torch.from_numpy(values.reshape(self.shape))


class Answers:
    """A memory of answers. It says nothing of itself, so that two trainings do not differ by it.

    Args:
        room: number of samples whose answers are kept at most; later ones are asked for each time.
        folder: where answers are kept for later processes; None keeps them in memory only. Each process writes a file
            of its own, so that several may use one folder; what a killed one left half written is passed over.
        half: keep 16 bits of each number. Who asks first is given the rounded numbers too, so that all students learn
            from the same.
        why: whether answers are kept and for what reason, for people; None tells it of the other arguments.

    Example:
        >>> asked = []
        >>> answers = Answers(room=10)
        >>> def ask(inputs):
        ...     asked.append(len(inputs[0]))
        ...     return inputs[0].sum(1, keepdim=True)[None]
        >>> x = torch.arange(6.0).reshape(3, 2)
        >>> answers.of((x,), ask).tolist() == answers.of((x,), ask).tolist(), asked
        (True, [3])
    """

    __slots__ = ("_blocks", "_file", "_places", "folder", "half", "room", "why")

    def __init__(self, room: int, folder: Path | None = None, *, half: bool = False, why: str | None = None) -> None:
        self.room = room
        self.folder = folder
        self.half = half
        where = "in memory" if folder is None else "beside the checkpoints"
        kept = f"answers for up to {room:,} samples are kept {where}" if room else "answers are not kept, as asked"
        self.why = f"teacher: {kept}" if why is None else why
        self._blocks: list[Tensor | _Block] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._file: Path | None = None
        for file in sorted(folder.glob("*.answers")) if folder is not None else ():
            for keys, block in _records(file):
                self._note(keys, block)

    def __len__(self) -> int:
        """Number of samples whose answers are known."""
        return len(self._places)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are kept."""
        return torch.float16 if self.half else torch.float32

    def of(
        self,
        inputs: tuple[Any, ...],
        ask: Callable[[tuple[Any, ...]], Float[Tensor, "teachers batch classes *positions"]],
    ) -> Float[Tensor, "teachers batch classes *positions"]:
        """What is known of a batch, or what `ask` says where one of its samples is new."""
        keys = _digests(inputs)
        device = next((value.device for value in tensors_of(inputs)), torch.device("cpu"))
        places = [self._places[key] for key in keys if key in self._places]
        if len(places) == len(keys):
            return self._gathered(places).to(device, torch.float32)
        answers = ask(inputs)
        if self.half:
            answers = answers.to(torch.float16).to(torch.float32)
        if answers.dtype == torch.float32:  # wider ones would come back narrower than they were said
            self._keep(keys, answers.detach().cpu())
        return answers

    def _gathered(self, places: list[tuple[int, int]]) -> Tensor:
        """The answers at these places, a block and a row in it each; the same batch as before is one block."""
        blocks = {number: self._block(number) for number in dict.fromkeys(number for number, _ in places)}
        first, whole = places[0][0], blocks[places[0][0]]
        if places == [(first, row) for row in range(whole.shape[1])]:
            return whole
        return torch.stack([blocks[number][:, row] for number, row in places], dim=1)

    def _block(self, number: int) -> Tensor:
        block = self._blocks[number]
        return block if isinstance(block, Tensor) else block.read()

    def _keep(self, keys: list[bytes], answers: Tensor) -> None:
        fresh = [row for row, key in enumerate(keys) if key not in self._places][: self.room - len(self)]
        if not fresh:
            return
        kept = answers if len(fresh) == len(keys) else answers[:, fresh]
        kept, keys = kept.to(self.dtype).contiguous().clone(), [keys[row] for row in fresh]
        self._note(keys, kept if self.folder is None else self._written(self.folder, keys, kept.numpy()))

    def _note(self, keys: list[bytes], block: Tensor | _Block) -> None:
        self._blocks.append(block)
        for row, key in enumerate(keys):
            self._places.setdefault(key, (len(self._blocks) - 1, row))

    def _written(self, folder: Path, keys: list[bytes], values: np.ndarray) -> _Block:
        """Add a record to this process's file, by one write."""
        if self._file is None or not self._file.name.startswith(f"{os.getpid()}-"):  # a forked process has its own
            folder.mkdir(parents=True, exist_ok=True)
            self._file = folder / f"{os.getpid()}-{secrets.token_hex(4)}.answers"
        kind = f"<f{values.itemsize}"
        rest = struct.pack(f"<{values.ndim}I", *values.shape) + b"".join(keys) + values.astype(kind).tobytes()
        with self._file.open("ab") as handle:
            start = handle.tell()
            handle.write(HEAD.pack(zlib.crc32(rest), len(keys), values.itemsize, values.ndim) + rest)
        offset = start + HEAD.size + 4 * values.ndim + KEY * len(keys)
        return _Block(self._file, offset, values.shape, kind)


def _records(file: Path) -> Iterator[tuple[list[bytes], _Block]]:
    """The digests and the place of each whole record of a file, up to the first that is not."""
    with file.open("rb") as handle:
        while len(head := handle.read(HEAD.size)) == HEAD.size:
            check, count, width, dimensions = HEAD.unpack(head)
            sizes = handle.read(4 * dimensions)
            if width not in (2, 4) or len(sizes) < 4 * dimensions:
                return
            shape = struct.unpack(f"<{dimensions}I", sizes)
            left = file.stat().st_size - handle.tell()
            length = KEY * count + width * math.prod(shape)
            if length > left:
                return
            rest = handle.read(length)
            if zlib.crc32(sizes + rest) != check:
                return
            keys = [rest[KEY * row : KEY * (row + 1)] for row in range(count)]
            yield keys, _Block(file, handle.tell() - length + KEY * count, shape, f"<f{width}")


def _digests(inputs: tuple[Any, ...]) -> list[bytes]:
    """A digest of each sample over all inputs of the call."""
    parts = [value.detach().cpu().contiguous() for value in tensors_of(inputs)]
    told = repr([(part.dtype, part.shape[1:]) for part in parts]).encode()
    rows = [part.reshape(len(part), -1).view(torch.uint8).numpy() for part in parts]
    return [
        hashlib.blake2b(b"".join((told, *(row.tobytes() for row in sample))), digest_size=KEY).digest()
        for sample in zip(*rows, strict=True)
    ]
