"""Everything that is measured of a model, alone or beside the dense one it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from karui.errors import CaptureError
from karui.measuring import values
from karui.measuring.accuracy import Z95, Score, mean_interval, sample_scores
from karui.measuring.clock import Clock, Ratio, Timing, Timings, time_ratio
from karui.measuring.count import Counts, count
from karui.measuring.machine import Machine, this_machine
from karui.measuring.memory import Memory, peak_memory
from karui.measuring.onnx import onnx_form
from karui.measuring.values import bytes_text, count_text
from karui.model import Model


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one model.

    Settings:
        counts: parameters and multiply-accumulates.
        tensor_bytes: bytes of its parameters and buffers as the module holds them; a shared one counts once.
        onnx_bytes: length of its ONNX file, weights included; None where it cannot be exported.
        stored_bytes: length of its weights file as saved, packed; None where that was not asked for.
        times: of one inference, in each engine, batch size and number of threads.
        memory: peak of one inference.
        score: its metric on the test data, if there was any.
        machine: where all this was measured.
        ratios: against the dense model, where it was measured beside one.
        notes: what could not be measured, and why.
    """

    counts: Counts
    tensor_bytes: int
    onnx_bytes: int | None = None
    stored_bytes: int | None = None
    times: tuple[Timing, ...] = ()
    memory: tuple[Memory, ...] = ()
    score: Score | None = None
    machine: Machine = field(default_factory=this_machine)
    ratios: tuple[Ratio, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.counts.parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.counts.macs

    def time(self, engine: str, batch: int, threads: int = 1) -> Timing | None:
        """The time of one combination, if it was measured."""
        wanted = (engine, batch, threads)
        return next((t for t in self.times if (t.engine, t.batch, t.threads) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_json` wrote."""
        return values.from_json(cls, saved)

    def __str__(self) -> str:
        lines = [f"parameters: {count_text(self.parameters)}", f"MACs: {count_text(self.macs)}"]
        lines.append(f"bytes of tensors: {bytes_text(self.tensor_bytes)}")
        if self.stored_bytes is not None:
            lines.append(f"bytes as saved: {bytes_text(self.stored_bytes)}")
        if self.onnx_bytes is not None:
            lines.append(f"bytes of the ONNX file: {bytes_text(self.onnx_bytes)}")
        lines += [str(self.score)] if self.score else []
        lines += [f"time ({t.where}): {t}" for t in self.times]
        lines += [str(m) for m in self.memory]
        lines += [f"against the dense model: {ratio}" for ratio in self.ratios if ratio.quantity not in WITHOUT_SPREAD]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


WITHOUT_SPREAD = ("memory",)
"""Quantities that are measured once: their values are told, and no ratio, which would have no spread."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How much the metric differs on the same samples: light minus dense, with the 95 % interval of the paired mean."""

    value: float
    low: float
    high: float
    metric: str
    higher_is_better: bool = True

    @property
    def verdict(self) -> str:
        """The change in words."""
        unit = 100 if self.metric == "accuracy" else 1
        span = f"{self.value * unit:+.2f} (95 % interval {self.low * unit:+.2f} to {self.high * unit:+.2f})"
        name = f"{self.metric} points" if self.metric == "accuracy" else self.metric
        if self.low <= 0 <= self.high:
            return f"no measurable difference in {self.metric}: {span}"
        better = (self.value > 0) == self.higher_is_better
        return f"{span} {name}, {'better' if better else 'worse'}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A dense model and a light one, measured side by side in one run.

    Settings:
        dense, light: the two measurements.
        ratios: dense over light, so that above 1 is a gain.
        change: of the metric, on the same test samples.
    """

    dense: Measurement
    light: Measurement
    ratios: tuple[Ratio, ...] = ()
    change: Change | None = None

    def ratio(self, quantity: str, engine: str = "", batch: int = 0, threads: int = 0) -> Ratio | None:
        """One ratio, if it was measured; `engine`, `batch` and `threads` tell which time."""
        wanted = (quantity, engine, batch, threads)
        return next((r for r in self.ratios if (r.quantity, r.engine, r.batch, r.threads) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_json` wrote."""
        return values.from_json(cls, saved)

    def __str__(self) -> str:
        lines = [str(ratio) for ratio in self.ratios if ratio.quantity not in WITHOUT_SPREAD]
        for which, measured in (("dense", self.dense), ("light", self.light)):
            lines += [f"{which}: {peak}" for peak in measured.memory]
            lines += [f"{which}: {measured.score}"] if measured.score else []
        lines += [self.change.verdict] if self.change else []
        lines += [f"note: {note}" for note in dict.fromkeys((*self.dense.notes, *self.light.notes))]
        return "\n".join(lines)


def measure_model(
    model: Model,
    *,
    test: Any = None,
    clock: Clock | None = None,
    against: Model | None = None,
    stored: Callable[[Model], int] | None = None,
    progress: bool = False,
) -> Measurement:
    """All that can be measured of a model; beside `against`, in one run with it, where that is given.

    What cannot be measured (an operator without an ONNX form, an engine that is not installed) is told in the notes.

    Args:
        model: what to measure.
        test: data that no decision has looked at, for the score.
        clock: how time is measured, in which engines.
        against: the dense model that it was made from.
        stored: bytes of a model as it is saved (`karui.artifact.stored_bytes`).
        progress: show progress bars.
    """
    clock = clock or Clock()
    if against is not None:
        return compare(against, model, test=test, clock=clock, stored=stored, progress=progress).light
    timings = clock.time({"model": model}, progress=progress)
    scores = _scores(model, test, progress)
    return _measurement("model", model, timings, scores, clock, stored)


def compare(
    dense: Model,
    light: Model,
    *,
    test: Any = None,
    clock: Clock | None = None,
    stored: Callable[[Model], int] | None = None,
    progress: bool = False,
    raced: tuple[Timing, Timing] | None = None,
) -> Comparison:
    """Both models, timed in turns in one run, and the ratios between them.

    Args:
        dense: what the other was made from.
        light: what it became.
        test: data that no decision has looked at, for the scores.
        clock: how time is measured, in which engines.
        stored: bytes of a model as it is saved.
        progress: show progress bars.
        raced: times of both from another race in one of the clock's engines: that one is not timed again, so that
            nobody is told two ratios, and no session is held beside the models.
    """
    clock = clock or Clock()
    timings = _timings(dense, light, clock, raced, progress)
    before, after = _scores(dense, test, progress), _scores(light, test, progress)
    heavy = _measurement("dense", dense, timings, before, clock, stored)
    lean = _measurement("light", light, timings, after, clock, stored)
    ratios = ratios_between(heavy, lean)
    return Comparison(
        dense=heavy, light=replace(lean, ratios=ratios), ratios=ratios, change=_change(light, before, after)
    )


def _timings(dense: Model, light: Model, clock: Clock, raced: tuple[Timing, Timing] | None, progress: bool) -> Timings:
    """Times of both in every engine of the clock; those of another race first."""
    models = {"dense": dense, "light": light}
    if raced is None:
        return clock.time(models, progress=progress)
    known = (replace(time, contestant=name) for time, name in zip(raced, models, strict=True))
    timings = clock.without(raced[0].engine).time(models, progress=progress)
    return replace(timings, times=(*known, *timings.times))


def ratios_between(dense: Measurement, light: Measurement) -> tuple[Ratio, ...]:
    """Every quantity that both have, dense over light. Times must come from one run."""
    exact = [
        ("parameters", dense.parameters, light.parameters),
        ("nonzero parameters", dense.counts.nonzero, light.counts.nonzero),
        ("macs", dense.macs, light.macs),
        ("bytes of the ONNX file", dense.onnx_bytes, light.onnx_bytes),
        ("bytes as saved", dense.stored_bytes, light.stored_bytes),
    ]
    ratios = [_exact(name, a, b) for name, a, b in exact if a and b]
    for a in dense.times:
        b = light.time(a.engine, a.batch, a.threads)
        if b is not None:
            ratios.append(time_ratio(a, b))
    ratios += [
        replace(_exact("memory", a.bytes, b.bytes), engine=a.engine, batch=a.batch, threads=1)
        for a in dense.memory
        for b in light.memory
        if (a.engine, a.batch) == (b.engine, b.batch) and b.bytes > 0
    ]
    return tuple(ratios)


def _exact(quantity: str, dense: int, light: int) -> Ratio:
    return Ratio(quantity=quantity, value=dense / light, low=dense / light, high=dense / light)


def _scores(model: Model, test: Any, progress: bool) -> Tensor | None:
    if test is None or model.task is None:
        return None
    return sample_scores(model, test, progress=progress)


def _measurement(  # noqa: PLR0917
    name: str,
    model: Model,
    timings: Timings,
    scores: Tensor | None,
    clock: Clock,
    stored: Callable[[Model], int] | None,
) -> Measurement:
    notes = list(timings.notes)
    try:
        onnx_bytes = onnx_form(model).bytes
    except CaptureError as error:
        onnx_bytes = None
        notes.append(str(error))
    memory, reasons = peak_memory(model, clock.engines, clock.batches)
    return Measurement(
        counts=count(model),
        tensor_bytes=tensor_bytes(model),
        onnx_bytes=onnx_bytes,
        stored_bytes=stored(model) if stored is not None else None,
        times=timings.of(name),
        memory=memory,
        score=_score(model, scores),
        notes=tuple(dict.fromkeys((*notes, *reasons))),
    )


def _score(model: Model, scores: Tensor | None) -> Score | None:
    if scores is None or model.task is None:
        return None
    value, low, high = mean_interval(scores)
    task = model.task
    return Score(
        value=value, low=low, high=high, count=len(scores), metric=task.metric, higher_is_better=task.higher_is_better
    )


def _change(model: Model, before: Tensor | None, after: Tensor | None) -> Change | None:
    if before is None or after is None or model.task is None or len(before) != len(after):
        return None
    gaps = after - before
    half = Z95 * gaps.std().item() / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    mean = gaps.mean().item()
    task = model.task
    return Change(
        value=mean, low=mean - half, high=mean + half, metric=task.metric, higher_is_better=task.higher_is_better
    )


def tensor_bytes(model: Model) -> int:
    """Bytes of the parameters and buffers of a module; a shared one counts once."""
    module = model.module
    tensors = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t  # noqa: SLF001  (no public name of a storage)
        for t in (*module.parameters(), *module.buffers())
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())
