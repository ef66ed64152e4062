"""`karui profile`: parameters, MACs, bytes, time and memory of one model, and of each of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from karui.cli import options, screen

if TYPE_CHECKING:
    from karui.measuring import Measurement
    from karui.model import Model


def profile(
    model: options.MODEL,
    *,
    data: options.DATA = None,
    weights: options.WEIGHTS = None,
    shape: options.INPUT = None,
    task: options.TASK = None,
    quick: Annotated[bool, typer.Option("--quick", help="Count only; measure no time and no memory.")] = False,
    json: options.JSON = False,
) -> None:
    """Parameters, MACs, bytes, time and memory of a model; a line for each layer."""
    from karui.measuring import count, measure_model
    from karui.recipes.layers import layer_rows

    splits = options.data_of(data, 0)
    opened = options.model_of(model, weights=weights, shape=shape, task=task, data=splits, seed=0)
    if opened.untrained and splits is not None:
        screen.say(f"note: {model} has random weights, so its metric is not measured.")
    test = None if splits is None or opened.untrained else splits.test
    layers = layer_rows(opened.model)
    counted = {row.path: row for row in count(opened.model).layers}
    for row in layers:
        found = counted.get(row["path"])
        row["parameters"], row["macs"] = (found.parameters, found.macs) if found else (0, 0)
    if quick:
        told = _counted(opened.model)
        measured = None
    else:
        measured = measure_model(opened.model, test=test, progress=screen.watched())
        told = measured.to_json()
    if json:
        screen.out_json({"model": model, **told, "layer_times": layers})
        return
    _print_layers(layers)
    _print_whole(model, told, measured)


def _counted(model: Model) -> dict[str, Any]:
    from karui.measuring import count
    from karui.measuring.measure import tensor_bytes
    from karui.measuring.values import to_json

    return {"counts": to_json(count(model)), "tensor_bytes": tensor_bytes(model)}


def _print_layers(layers: list[dict[str, Any]]) -> None:
    from karui.measuring.values import bytes_text, count_text, seconds_text

    made = screen.table(
        "layer", "kind", "parameters", "MACs", "bytes", "time*", right=("parameters", "MACs", "bytes", "time*")
    )
    for row in layers:
        numbers = (count_text(row["parameters"]), count_text(row["macs"]), bytes_text(row["bytes"]))
        made.add_row(row["path"], row["kind"], *numbers, seconds_text(row["seconds"]))
    screen.show(made)
    screen.out("* torch, one sample, with a stop watch at each layer, which adds to the sum\n")


def _print_whole(name: str, told: dict[str, Any], measured: Measurement | None) -> None:
    from karui.measuring.values import bytes_text, count_text

    made = screen.table("", "", title=name)
    made.show_header = False
    made.add_row("parameters", count_text(told["counts"]["parameters"]))
    made.add_row("multiply-accumulates of one sample (MACs)", count_text(told["counts"]["macs"]))
    made.add_row("bytes of its tensors", bytes_text(told["tensor_bytes"]))
    if measured is not None and measured.onnx_bytes is not None:
        made.add_row("bytes of its ONNX file", bytes_text(measured.onnx_bytes))
    if measured is not None and measured.score is not None:
        made.add_row("on the test data", str(measured.score))
    screen.show(made)
    if measured is not None:
        _print_times(measured)


def _print_times(measured: Measurement) -> None:
    from karui.measuring.values import bytes_text, seconds_text

    right = ("batch", "threads", "median", "peak memory")
    made = screen.table("engine", "batch", "threads", "median", "half of the calls", "peak memory", right=right)
    memory = {(found.engine, found.batch): bytes_text(found.bytes) for found in measured.memory}
    for time in measured.times:
        spread = f"{seconds_text(time.low)} to {seconds_text(time.high)}"
        peak = memory.pop((time.engine, time.batch), "")
        made.add_row(time.engine, str(time.batch), str(time.threads), seconds_text(time.median), spread, peak)
    screen.show(made)
    for note in measured.notes:
        screen.say(f"note: {note}")
