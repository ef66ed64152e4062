"""Calls timed in turns, round by round, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

SAMPLE = 0.002
"""Seconds that one sample lasts at least: short calls are repeated within it, as a clock's own cost must not show."""
FEWEST = 5
"""Rounds that are run even where the time budget is used up: below, an interval means nothing."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float, *, cpu_time: bool = False
) -> dict[str, list[float]]:
    """Seconds of one call, for each of them and each round; their order flips from round to round.

    Args:
        calls: what is timed; each is called some times more, to warm up.
        rounds: samples of each.
        seconds: after this long the rounds end early, but never before the fifth.
        cpu_time: count the processor time of this process rather than the time on the wall.

    Example:
        >>> [len(samples) for samples in interleaved({"a": lambda: 1, "b": lambda: 2}, 6, 9.0).values()]
        [6, 6]
    """
    now = time.process_time if cpu_time else time.perf_counter
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.perf_counter() + seconds
    for number in range(rounds):
        if number >= FEWEST and time.perf_counter() > end:
            break
        for name in order if number % 2 == 0 else reversed(order):
            call = calls[name]
            call()  # the one before has filled the caches and set the threads
            start = now()
            for _ in range(repeats[name]):
                call()
            samples[name].append((now() - start) / repeats[name])
    return samples


def _repeats(call: Callable[[], Any]) -> int:
    start = time.perf_counter()
    call()
    return max(1, min(1000, int(SAMPLE / max(time.perf_counter() - start, 1e-7))))
