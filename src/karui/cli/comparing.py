"""The table of a run: dense against light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from karui.cli import screen

if TYPE_CHECKING:
    from karui.measuring import Change, Comparison, Ratio, Score


def show_run(record: dict[str, Any]) -> None:
    """Print the table dense against light, and what it means."""
    from karui.measuring import Comparison

    both = Comparison.from_json(record)
    screen.show(comparison_table(both))
    for sentence in record["verdict"]:
        screen.out(f"- {sentence}")
    for note in dict.fromkeys((*both.dense.notes, *both.light.notes, *record["warnings"])):
        screen.say(f"note: {note}")


def comparison_table(both: Comparison) -> Any:
    """Size, work, time and quality of both, and the gain with its spread."""
    from karui.measuring.values import bytes_text, count_text, seconds_text

    made = screen.table("", "dense", "light", "gain", "95 % interval", right=("dense", "light"))
    dense, light = both.dense, both.light
    for name, quantity, before, after, text in (
        ("parameters", "parameters", dense.parameters, light.parameters, count_text),
        ("multiply-adds (MACs)", "macs", dense.macs, light.macs, count_text),
        ("saved weights", "bytes as saved", dense.stored_bytes, light.stored_bytes, bytes_text),
        ("ONNX file", "bytes of the ONNX file", dense.onnx_bytes, light.onnx_bytes, bytes_text),
    ):
        if before is not None and after is not None:
            made.add_row(name, text(before), text(after), *_gain(both.ratio(quantity)))
    engine = ""
    for time in dense.times:
        after = light.time(time.engine, time.batch, time.threads)
        if after is not None:
            if time.engine != engine:
                engine = time.engine
                made.add_row(f"time in {engine}")
            name = f"  batch {time.batch}, {time.threads} thread{'' if time.threads == 1 else 's'}"
            ratio = both.ratio("time", time.engine, time.batch, time.threads)
            made.add_row(name, seconds_text(time.median), seconds_text(after.median), *_gain(ratio))
    if dense.score is not None and light.score is not None:
        scores = (_score(dense.score), _score(light.score))
        made.add_row(f"test {light.score.metric}", *scores, *_change(both.change))
    return made


def _gain(ratio: Ratio | None) -> tuple[str, str]:
    """The gain in words, and its interval where it was not counted but measured."""
    if ratio is None:
        return "", ""
    if ratio.low == ratio.high:
        return ratio.word, ""
    low, high = ratio.interval
    return ratio.word.replace("no measurable difference", "none seen"), f"{low:.2f}x to {high:.2f}x"


def _change(change: Change | None) -> tuple[str, str]:
    if change is None:
        return "", ""
    unit, name = (100, " points") if change.metric == "accuracy" else (1, "")
    return f"{change.value * unit:+.2f}{name}", f"{change.low * unit:+.2f} to {change.high * unit:+.2f}"


def _score(score: Score) -> str:
    return f"{score.value:.1%}" if score.metric == "accuracy" else f"{score.value:.4g}"
