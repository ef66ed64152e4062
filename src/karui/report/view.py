"""What the page of a run says: the record of the run turned into words and table rows, with nothing measured anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from karui.measuring import Comparison, Measurement, Ratio, Score
from karui.measuring.measure import WITHOUT_SPREAD
from karui.measuring.values import bytes_text, count_text

HEADLINE = ("onnxruntime", 1, 1)


@dataclass(frozen=True)
class Card:
    """One of the figures on top: what, how much, and against what; `tone` is "good", "bad" or ""."""

    label: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table dense against compressed: of what (for a time: engine, batch size, threads), and how much."""

    of: tuple[str | int, ...]
    dense: str
    light: str
    change: str
    tone: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Named:
    """A group or a layer of the plan, and what is said of it."""

    name: str
    units: str
    note: str


@dataclass(frozen=True)
class StepRow:
    """One technique that was applied."""

    technique: str
    settings: str
    parameters: str
    score: str
    seconds: str


def score_text(score: Score | None) -> str:
    """A metric with its interval: accuracy in per cent.

    Example:
        >>> score_text(Score(value=0.9, low=0.88, high=0.92, count=100, metric="accuracy"))
        '90.0 % [88.0, 92.0]'
    """
    if score is None:
        return "–"
    if score.metric == "accuracy":
        return f"{score.value * 100:.1f} % [{score.low * 100:.1f}, {score.high * 100:.1f}]"
    return f"{score.value:.4g} [{score.low:.4g}, {score.high:.4g}]"


def tone(ratio: Ratio) -> str:
    """The colour of a ratio: "good" for a gain, "bad" for a loss, "" where no difference could be measured."""
    if ratio.low > 1:
        return "good"
    return "bad" if ratio.high < 1 else ""


def cards(both: Comparison) -> list[Card]:
    """The figures on top: time in the engine that people deploy on, bytes of the ONNX file, multiply-adds, accuracy."""
    found = []
    engine, batch, threads = HEADLINE
    if (ratio := both.ratio("time", engine, batch, threads)) is not None:
        word, _, rest = ratio.verdict.partition(" (")
        found.append(Card("Time, ONNX Runtime, batch 1, 1 thread", word, rest.rstrip(")"), tone(ratio)))
    for quantity, label, dense, light in (
        ("bytes", "ONNX file", both.dense.onnx_bytes, both.light.onnx_bytes),
        ("macs", "Multiply-adds", both.dense.macs, both.light.macs),
    ):
        if dense is not None and light is not None and (ratio := _share(quantity, dense, light)) is not None:
            text = bytes_text if quantity == "bytes" else count_text
            found.append(Card(label, ratio.verdict, f"{text(dense)} → {text(light)}", tone(ratio)))
    if both.dense.score is not None and both.light.score is not None:
        metric = both.light.score.metric.capitalize()
        worse = both.change is not None and "worse" in both.change.verdict
        note = f"dense {score_text(both.dense.score)}, test data"
        found.append(Card(metric, score_text(both.light.score), note, "bad" if worse else "good"))
    return found


def sizes(both: Comparison) -> list[Row]:
    """Parameters, multiply-adds, bytes, memory and accuracy, a row each."""
    dense, light = both.dense, both.light
    rows = [
        _row("Parameters", "parameters", dense.parameters, light.parameters, count_text),
        _row("Multiply-adds of one sample", "macs", dense.macs, light.macs, count_text),
        _row("ONNX file", "bytes", dense.onnx_bytes, light.onnx_bytes, bytes_text),
        _row("Saved model (safetensors and lineage)", "bytes", dense.stored_bytes, light.stored_bytes, bytes_text),
    ]
    peaks = {(m.engine, m.batch): m.bytes for m in light.memory}
    for peak in dense.memory:
        label = f"Peak memory of one call ({peak.engine}, batch {peak.batch})"
        rows.append(_row(label, "memory", peak.bytes, peaks.get((peak.engine, peak.batch)), bytes_text))
    if dense.score is not None or light.score is not None:
        name = (light.score or dense.score).metric.capitalize()  # pyright: ignore[reportOptionalMemberAccess]
        change = both.change.verdict if both.change is not None else ""
        rows.append(Row((f"{name}, test data",), score_text(dense.score), score_text(light.score), change))
    return [row for row in rows if row is not None]


def _row(label: str, quantity: str, dense: int | None, light: int | None, text: Any) -> Row | None:
    if dense is None and light is None:
        return None
    ratio = None
    if dense is not None and light is not None and quantity not in WITHOUT_SPREAD:
        ratio = _share(quantity, dense, light)
    before, after = ("–" if value is None else text(value) for value in (dense, light))
    return Row((label,), before, after, ratio.verdict if ratio else "", tone(ratio) if ratio else "")


def _share(quantity: str, dense: int, light: int) -> Ratio | None:
    if not light:
        return None
    return Ratio(quantity=quantity, value=dense / light, low=dense / light, high=dense / light)


def times(both: Comparison) -> list[Row]:
    """Every combination of engine, batch size and threads in which both were timed."""
    rows = []
    for ratio in both.ratios:
        if ratio.quantity != "time":
            continue
        where = (ratio.engine, ratio.batch, ratio.threads)
        dense, light = both.dense.time(*where), both.light.time(*where)
        if dense is not None and light is not None:
            low, high = ratio.interval
            rows.append(Row(where, str(dense), str(light), ratio.word, tone(ratio), f"{low:.2f}x to {high:.2f}x"))
    return rows


def asked(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the person wanted: model, data, recipe, seed, command."""
    told = run.get("asked", {})
    rows = [
        (name.capitalize(), _plain(value))
        for name, value in told.items()
        if name != "recipe" and value is not None and value != ""
    ]
    for number, step in enumerate(told.get("recipe") or [], 1):
        rows.append((f"Step {number}", f"{step['technique']} {_plain(step.get('settings') or {})}".strip()))
    return rows


def steps(run: Mapping[str, Any]) -> list[StepRow]:
    """The techniques as they were applied."""
    rows = []
    for step in run.get("steps") or []:
        saved = step.get("validation")
        score = Score(**{k: v for k, v in saved.items() if k in Score.__dataclass_fields__}) if saved else None
        parameters = step.get("parameters")
        rows.append(
            StepRow(
                str(step["technique"]),
                _plain(step.get("settings") or {}),
                "–" if parameters is None else count_text(parameters),
                score_text(score),
                f"{step['seconds']:.1f}" if step.get("seconds") is not None else "–",
            )
        )
    return rows


def measured(both: Comparison) -> str:
    """The machine that the times were taken on."""
    return f"Measured on {both.light.machine}." if both.light.times else ""


def notes(both: Comparison) -> list[str]:
    """What could not be measured, once each."""
    return list(dict.fromkeys((*both.dense.notes, *both.light.notes)))


def title(run: Mapping[str, Any]) -> str:
    """The page's title: what was compressed."""
    return f"{run.get('asked', {}).get('model') or 'A network'}, made lighter"


def headline_time(measurement: Measurement) -> float | None:
    """Median seconds of one call in the headline setting, or in the first one that was measured."""
    engine, batch, threads = HEADLINE
    found = measurement.time(engine, batch, threads)
    if found is None and measurement.times:
        found = measurement.times[0]
    return None if found is None else found.median


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = {
            name: f"({_plain(item)})" if isinstance(item, Mapping) else _plain(item) for name, item in value.items()
        }
        return ", ".join(f"{name}={item}" for name, item in inner.items())
    return value if isinstance(value, str) else json.dumps(value)


def cuts(plan: Mapping[str, Any]) -> list[Named]:
    """The groups of the plan that can be cut."""
    rows = []
    for group in plan.get("groups") or []:
        members = group.get("members") or []
        tensors = list(dict.fromkeys(m["tensor"] if isinstance(m, Mapping) else str(m) for m in members))
        told = "exact" if group.get("exact", True) else f"exact up to normalisation: {group.get('reason', '')}"
        if tensors:
            told += f"; touches {', '.join(tensors[:6])}{' …' if len(tensors) > 6 else ''}"
        rows.append(Named(group["name"], str(group.get("size", "")), told))
    return rows


def refused(plan: Mapping[str, Any]) -> list[Named]:
    """What the plan leaves whole, with the reason."""
    return [Named(row["name"], str(row.get("size", "")), row.get("reason", "")) for row in plan.get("locked") or []]


def verification(told: Mapping[str, Any] | None) -> str:
    """One sentence about the check of the ONNX file."""
    if not told:
        return ""
    batches = ", ".join(str(batch) for batch in told.get("batches") or [])
    where = f" at batch sizes {batches}" if batches else ""
    worst = told.get("difference")
    size = f" (largest difference {worst:.1e})" if isinstance(worst, float) else ""
    if told.get("ok"):
        return f"The ONNX file gives the same outputs as the loaded model{where}{size}."
    return f"The ONNX file does NOT give the same outputs as the loaded model{where}{size}; do not deploy it."
