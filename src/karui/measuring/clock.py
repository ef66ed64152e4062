"""Time, measured so that two models can be compared: interleaved, repeated, and never without the spread.

A shared machine drifts by more than most compressions gain. So the contestants take turns, round by round, in one run,
in an order that flips each round; a ratio is taken over the rounds they share, with a 95 % bootstrap interval, and a
ratio whose interval includes 1 is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from karui.errors import UsageError, require
from karui.measuring import values
from karui.measuring.bar import bar
from karui.measuring.engines import Engine, OnnxRuntime, Run, Torch
from karui.measuring.inference import batch_of, inference
from karui.measuring.machine import threads_here
from karui.measuring.rounds import FEWEST, interleaved
from karui.measuring.values import seconds_text
from karui.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one inference.

    Settings:
        contestant: which model.
        engine, threads, batch: how it was run; the time is that of the whole batch.
        median: the median over the rounds.
        low, high: the 25 and 75 % quantiles.
        samples: each round's time, in order (rounds are shared with the other contestants).
    """

    contestant: str
    engine: str
    threads: int
    batch: int
    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @property
    def where(self) -> str:
        """How it was run, in words."""
        return f"{self.engine}, batch {self.batch}, {_threads(self.threads)}"

    def __str__(self) -> str:
        return f"{seconds_text(self.median)} [{seconds_text(self.low)}, {seconds_text(self.high)}]"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster (smaller, lighter) the second of two is: dense over light; above 1 is a gain.

    Settings:
        quantity: what is compared: "time", "bytes", "macs", "parameters", "memory".
        value: the ratio (of medians, for a time).
        low, high: its 95 % interval; both equal `value` where the quantity is exact.
        engine, threads, batch: for a time, how it was run.
    """

    quantity: str
    value: float
    low: float
    high: float
    engine: str = ""
    threads: int = 0
    batch: int = 0

    @property
    def word(self) -> str:
        """The ratio in words; a slower model is called slower.

        Example:
            >>> Ratio(quantity="time", value=0.5, low=0.4, high=0.8).word
            '2.00x slower'
        """
        gain, loss = ("faster", "slower") if self.quantity == "time" else ("smaller", "larger")
        if self.low == self.high == self.value == 1:
            return "equal"
        if self.low != self.high and not self.low > 1 and not self.high < 1:
            return "no measurable difference"
        return f"{self.value:.2f}x {gain}" if self.value > 1 else f"{_inverse(self.value):.2f}x {loss}"

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of what `word` says: of how many times slower it is, for a slower model.

        Example:
            >>> Ratio(quantity="time", value=0.5, low=0.4, high=0.8).interval
            (1.25, 2.5)
        """
        return (_inverse(self.high), _inverse(self.low)) if self.high < 1 else (self.low, self.high)

    @property
    def verdict(self) -> str:
        """The ratio in words, with its interval."""
        low, high = self.interval
        return self.word if self.low == self.high else f"{self.word} (95 % interval {low:.2f} to {high:.2f})"

    def __str__(self) -> str:
        where = f" ({self.engine}, batch {self.batch}, {_threads(self.threads)})" if self.engine else ""
        return f"{self.quantity}{where}: {self.verdict}"


def _inverse(value: float) -> float:
    return 1 / value if value else float("inf")


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Timings:
    """All times of one run, and what could not be measured (a reason each)."""

    times: tuple[Timing, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, contestant: str) -> tuple[Timing, ...]:
        """One contestant's times."""
        return tuple(t for t in self.times if t.contestant == contestant)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How time is measured.

    Settings:
        batches: batch sizes.
        threads: numbers of threads; more than the machine has are left out, with a note.
        engines: what runs the models; one that is not installed is left out, with a note.
        rounds: samples of each combination; at least 5.
        warmup: calls before the first round, at least 1.
        seconds: budget for one run; rounds end early (after 5) where it is used up.
        cpu_time: count the processor time of this process (all its threads together) instead of the time on the wall;
            for one thread on a busy machine.

    Example:
        >>> clock = Clock(batches=(1,), threads=(1,), engines=(Torch(),), rounds=5)
        >>> net = Model(torch.nn.Linear(4, 2), example=(torch.zeros(1, 4),))
        >>> [t.median > 0 for t in clock.time({"net": net}).times]
        [True]
    """

    batches: tuple[int, ...] = (1, 64)
    threads: tuple[int, ...] = (1, 2)
    engines: tuple[Engine, ...] = (OnnxRuntime(), Torch())
    rounds: int = 15
    warmup: int = 2
    seconds: float = 60.0
    cpu_time: bool = False

    def __post_init__(self) -> None:
        for name in ("batches", "threads"):
            given = getattr(self, name)
            require(
                len(given) > 0 and all(isinstance(v, int) and v > 0 for v in given),
                f"{name} is {given}; give whole numbers above 0, for example (1, 64)",
            )
        require(self.rounds >= FEWEST, f"rounds is {self.rounds}; give at least {FEWEST}, or the spread means nothing")
        require(self.warmup >= 1, f"warmup is {self.warmup}; give at least 1, as a first call is never typical")
        require(self.seconds > 0, f"seconds is {self.seconds}; give a time above 0")

    def without(self, engine: str) -> Clock:
        """This clock without an engine, which another race was run in."""
        return replace(self, engines=tuple(each for each in self.engines if each.name != engine))

    def time(self, contestants: Mapping[str, Model | bytes], *, progress: bool = False) -> Timings:
        """Time the contestants against one another. An ONNX file (its bytes) may stand beside models.

        Raises:
            UsageError: no contestant is a model, so that no inputs are known.
        """
        examples = [c.example for c in contestants.values() if isinstance(c, Model)]
        require(len(examples) > 0, "There is no model to time.", "Give at least one Model.", UsageError)
        notes: list[str] = []
        threads = self._threads(notes)
        engines = self._engines(notes)
        plans = [(engine, count, batch) for engine in engines for count in threads for batch in self.batches]
        times: list[Timing] = []
        share = self.seconds / max(len(plans), 1)
        with _quiet_machine(contestants.values()), bar("time", len(plans) + 1, progress) as step:
            for engine, count, batch in plans:
                step(text=f"{engine.name}, batch {batch}, {_threads(count)}")
                entrants = {name: (engine, contestant) for name, contestant in contestants.items()}
                times += self._timed(entrants, count, batch, examples[0], share, notes)
        return Timings(times=tuple(times), notes=tuple(dict.fromkeys(notes)))

    def race(
        self, entrants: Mapping[str, tuple[Engine, Model | bytes]], example: tuple[Any, ...], *, progress: bool = False
    ) -> Timings:
        """Time models or ONNX files against one another, each in its own engine; `engines` of the clock is not asked.

        An entrant that its engine cannot run, or whose engine is not installed, is left out with a note.
        """
        notes = [
            f"{name} not measured: {engine.missing()}" for name, (engine, _) in entrants.items() if engine.missing()
        ]
        here = {name: entrant for name, entrant in entrants.items() if not entrant[0].missing()}
        plans = [(count, batch) for count in self._threads(notes) for batch in self.batches]
        times: list[Timing] = []
        share = self.seconds / max(len(plans), 1)
        with _quiet_machine([model for _, model in here.values()]), bar("time", len(plans) + 1, progress) as step:
            for count, batch in plans:
                step(text=f"batch {batch}, {_threads(count)}")
                times += self._timed(here, count, batch, example, share, notes)
        return Timings(times=tuple(times), notes=tuple(dict.fromkeys(notes)))

    def _timed(  # noqa: PLR0917
        self,
        entrants: Mapping[str, tuple[Engine, Model | bytes]],
        threads: int,
        batch: int,
        example: tuple[Any, ...],
        seconds: float,
        notes: list[str],
    ) -> list[Timing]:
        """The times of those that run, in turns; a note for each of the others."""
        calls = self._prepared(entrants, threads, batch, example, notes)
        times = []
        for name, samples in interleaved(calls, self.rounds, seconds, cpu_time=self.cpu_time).items():
            low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
            times.append(
                Timing(
                    contestant=name, engine=entrants[name][0].name, threads=threads, batch=batch,
                    median=median, low=low, high=high, samples=tuple(samples),
                )
            )  # fmt: skip
        return times

    def _threads(self, notes: list[str]) -> list[int]:
        here = threads_here()
        notes += [f"{_threads(count)} not measured: the machine has {here}" for count in self.threads if count > here]
        return [count for count in self.threads if count <= here] or [here]

    def _engines(self, notes: list[str]) -> list[Engine]:
        usable = []
        for engine in self.engines:
            reason = engine.missing()
            if reason:
                notes.append(f"{engine.name} not measured: {reason}")
            else:
                usable.append(engine)
        return usable

    def _prepared(
        self,
        entrants: Mapping[str, tuple[Engine, Model | bytes]],
        threads: int,
        batch: int,
        example: tuple[Any, ...],
        notes: list[str],
    ) -> dict[str, Callable[[], Any]]:
        """Each entrant's call."""
        calls: dict[str, Callable[[], Any]] = {}
        for name, (engine, contestant) in entrants.items():
            inputs = batch_of(contestant.example if isinstance(contestant, Model) else example, batch)
            try:
                call = _bound(engine.prepare(contestant, threads), inputs)
                for _ in range(self.warmup):
                    call()
            except Exception as error:  # noqa: BLE001  (engines raise classes of their own, without a common one)
                notes.append(f"{engine.name} not measured for {name}: {str(error).partition(chr(10))[0]}")
                continue
            calls[name] = call
        return calls


def _bound(run: Run, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(inputs)


@contextmanager
def _quiet_machine(contestants: Iterable[Model | bytes]) -> Iterator[None]:
    """Every module in evaluation mode; torch's number of threads as it was afterwards."""
    from contextlib import ExitStack

    before = torch.get_num_threads()
    with ExitStack() as stack:
        for contestant in contestants:
            if isinstance(contestant, Model):
                stack.enter_context(inference(contestant.module))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def time_ratio(dense: Timing, light: Timing, *, across: bool = False) -> Ratio:
    """The ratio of two contestants' medians, with a 95 % bootstrap interval over the rounds they shared.

    Args:
        dense: the one that is compared with.
        light: the other, of which the ratio tells how many times faster it is.
        across: allow two engines, as `Clock.race` times them; the ratio then carries the second one's.

    Raises:
        UsageError: the two were not timed side by side.
    """
    require(
        (across or dense.engine == light.engine)
        and (dense.threads, dense.batch, len(dense.samples)) == (light.threads, light.batch, len(light.samples)),
        "Two times can be compared only if they were taken in one run, in the same way.",
        "Give both models to one Clock.time(...).",
        UsageError,
    )
    a, b = np.array(dense.samples), np.array(light.samples)
    picks = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    drawn = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    value = dense.median / light.median
    return Ratio(
        quantity="time", value=value, low=min(low, value), high=max(high, value),
        engine=light.engine, threads=light.threads, batch=light.batch,
    )  # fmt: skip
