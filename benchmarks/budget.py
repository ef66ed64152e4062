"""A budget on CIFAR-10 ResNets against one-line int8: accuracy, time and bytes of the deployed files.

The published weights, the 13,500 training pictures that are here, one thread, ONNX Runtime. The rows: the dense network
in 32 bits, its static quantisation to 8 bits (no training), and `karui.compress` with no limit but the floor, at 1 and
at 2 points. The weights have seen every training picture, so that a floor on some of those would mean nothing: dense
they get 99.9 % right. The floor is therefore held on the first 2,000 test pictures, and all files are
judged, in their engine, on the 8,000 others. They are timed in turns, in one run, at batch sizes 1 and 64. Where the
menu of a budget predicted a time, it stands beside the measured one.

A peer joins by a function in `PEERS`: from the dense network and the bench to files by name.

Every run is resumable and kept in `.cache/benchmarks/budget`; `--only` does one of the budgets, so that two processes
can share the work; `--smoke` runs everything on a few pictures and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

import karui
from _common import CACHE, Ledger, cifar10, publish, table
from cifar_resnets import make_bench, published
from karui.data import Splits
from karui.data.calibration import Calibration
from karui.deployment import Deployment, calibrate, quantise
from karui.measuring import Clock, Timings, known_engine, onnx_form, time_ratio
from karui.measuring.values import bytes_text
from karui.model import Model
from karui.recipes.budget.deployments import score_of
from karui.technique import Bench

DROPS = (1.0, 2.0)
HELD = 2000
"""Test pictures that the floor is held on; the verdict is on the others."""
BATCHES = (1, 64)
BAR = {1.0: {"1": (1.4, 1.6), "64": (2.4, 2.4)}, 2.0: {"1": (1.5, 1.65), "64": (2.9, 2.9)}}
"""How many times faster than dense the best peer pipelines were, by points lost and batch size."""


def splits() -> Splits:
    """Training pictures, and the test pictures in two parts: for the floor, and for the verdict."""
    data = cifar10()
    test = data.test
    return replace(data, validation=Subset(test, range(HELD)), test=Subset(test, range(HELD, len(test))))


def dense_fp32(dense: Model, bench: Bench) -> Deployment:
    """The network as it is."""
    del bench
    return Deployment(name="dense", engine="onnxruntime", precision="fp32", data=onnx_form(dense).data)


def one_line_int8(dense: Model, bench: Bench) -> Deployment:
    """The dense network, quantised as `karui.deployment` does by default, with no training."""
    form = quantise(calibrate(onnx_form(dense), Calibration(bench.train, 256, 64, bench.seed)))
    return Deployment(name="int8", engine="onnxruntime", precision="int8", data=form.data)


PREDICTED = """Time of chosen networks in fp32 at batch 1, as shares of dense: as the menu predicted it before they were
made, and as it was measured."""

PEERS: Mapping[str, Callable[[Model, Bench], Deployment]] = {
    "dense, fp32": dense_fp32,
    "dense, one-line int8": one_line_int8,
}


def under_budget(dense: Model, bench: Bench, drop: float, epochs: int, out: Path) -> dict[str, Any]:
    """The record of a run under a floor alone; one that was killed goes on."""
    given = replace(bench, checkpoints=None)
    done = karui.compress(dense, given, max_drop=drop, epochs=epochs, out=out, resume=True, tell=print)
    return done.record["budget"]


def deployed(told: Mapping[str, Any], folder: Path) -> Deployment:
    """The file of a run that is there to be deployed."""
    form = next(form for form in told["forms"] if form["chosen"])
    data = (folder / "model.onnx").read_bytes()
    return Deployment(name="karui", engine=form["engine"], precision=form["precision"], data=data)


def judged(form: Deployment, dense: Model, data: Splits) -> dict[str, Any]:
    """Accuracy on the test pictures, in the form's engine."""
    score = score_of(form, dense, data.test)
    return {"right": round(score.value * score.count), **score.to_json()}


def raced(forms: Mapping[str, Deployment], dense: Model) -> dict[str, dict[str, Any]]:
    """Each form's time, and how many times faster it is than dense: all in turns, by processor time."""
    clock = Clock(batches=BATCHES, threads=(1,), cpu_time=True, rounds=101, seconds=120.0)
    entrants = {name: (known_engine(form.engine), form.data) for name, form in forms.items()}
    times = clock.race(entrants, dense.example, progress=True)
    return {name: {str(batch): _ratio(times, name, batch) for batch in BATCHES} for name in forms}


def _ratio(times: Timings, name: str, batch: int) -> dict[str, Any]:
    pair = [next(t for t in times.of(who) if t.batch == batch) for who in ("dense, fp32", name)]
    ratio = time_ratio(*pair, across=True)
    return {"seconds": pair[1].median, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}


def predictions(told: Mapping[str, Any]) -> list[dict[str, float]]:
    """Predicted and measured time of each point whose network was chosen from a menu, both in fp32."""
    return [
        {"point": point["number"], "predicted": point["predicted"]["time"], "measured": point["forms"][0]["time"]}
        for point in told["points"]
        if point["predicted"] and point["chosen"]
    ]


def run(network: str, data: Splits, folder: Path, epochs: int, drops: tuple[float, ...]) -> dict[str, Any]:
    """All rows of a network."""
    dense, bench, ledger = published(network), make_bench(data, folder), Ledger(folder / f"{network}.json")
    forms = {name: make(dense, bench) for name, make in PEERS.items()}
    runs = {}
    for drop in drops:
        out = folder / f"{network}-{drop:g}"
        runs[drop] = under_budget(dense, bench, drop, epochs, out)
        forms[f"karui, at most {drop:g} lost"] = deployed(runs[drop], out)
    mark = ", ".join(f"{name} {form.bytes}" for name, form in forms.items())
    times = ledger.once(f"times of {mark}", lambda: raced(forms, dense))
    rows = [
        {
            "case": name,
            "engine": form.engine,
            "precision": form.precision,
            "bytes": form.bytes,
            "test": ledger.once(f"{name}, {form.bytes} bytes: test", lambda form=form: judged(form, dense, data)),
            "times": times[name],
        }
        for name, form in forms.items()
    ]
    points = {f"{drop:g}": predictions(told) for drop, told in runs.items()}
    told = {f"{drop:g}": told["explanation"] for drop, told in runs.items()}
    return {"network": network, "rows": rows, "predictions": points, "explanations": told}


def report(values: Mapping[str, Any]) -> str:
    """The tables, and what stands against the bar."""
    parts = [
        f"""# A budget on CIFAR-10 ResNets

Published weights. The floor is held on 2,000 test pictures and the verdict is on the 8,000 others; at most
{values["epochs"]} passes of recovery over {values["pictures"]:,} pictures for each budget. One thread, processor time,
all files of a network in turns in one run; the ratio is dense over this, with its 95 % interval.
One training each: differences of a few tenths of a point mean nothing."""
    ]
    for told in values["networks"]:
        dense = told["rows"][0]
        lines = [
            [
                row["case"],
                f"{row['precision']}, {row['engine']}",
                f"{100 * row['test']['value']:.2f}",
                f"{100 * (dense['test']['value'] - row['test']['value']):.2f}",
                *(_shown(row["times"][str(batch)]) for batch in BATCHES),
                f"{bytes_text(row['bytes'])} ({dense['bytes'] / row['bytes']:.2f}x)",
            ]
            for row in told["rows"]
        ]
        head = ["", "form", "test accuracy, %", "lost", "batch 1", "batch 64", "ONNX file"]
        pairs = [
            [floor, str(p["point"]), f"{p['predicted']:.3f}", f"{p['measured']:.3f}", f"{_off(p):+.1%}"]
            for floor, points in told["predictions"].items()
            for p in points
        ]
        columns = ["floor", "point", "predicted time", "measured time", "off by"]
        parts += [
            f"## {told['network']}",
            table(head, lines),
            PREDICTED,
            table(columns, pairs),
            *(f"Floor of {floor}: {text}" for floor, text in told["explanations"].items()),
        ]
    return "\n\n".join([*parts, _bar(values)])


def _shown(time: Mapping[str, float]) -> str:
    return f"{1e3 * time['seconds']:.3f} ms, {time['ratio']:.2f}x [{time['low']:.2f}, {time['high']:.2f}]"


def _off(pair: Mapping[str, float]) -> float:
    return pair["predicted"] / pair["measured"] - 1


def _bar(values: Mapping[str, Any]) -> str:
    """What was aimed at, and whether it was reached."""
    lines = ["## Against the bar", "", "1.3 times faster than the best peer pipeline at the same drop:", ""]
    for told in values["networks"]:
        if told["network"] != "resnet20":
            continue
        for drop, bars in BAR.items():
            row = next(r for r in told["rows"] if r["case"] == f"karui, at most {drop:g} lost")
            for batch, (low, high) in bars.items():
                ratio = row["times"][batch]["ratio"]
                peer = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                word = "reached" if ratio >= 1.3 * high else "not reached"
                lines.append(f"- {drop:g} lost, batch {batch}: {ratio:.2f}x; peers {peer}x; {word}")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description="A budget against one-line int8")
    options.add_argument("--smoke", action="store_true", help="a few pictures; keeps nothing")
    options.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    options.add_argument("--epochs", type=int, default=5, help="passes of recovery for each budget")
    options.add_argument("--only", type=float, choices=DROPS, help="one budget; writes no results")
    asked = options.parse_args()
    torch.set_num_threads(1)
    data = splits()
    if asked.smoke:
        few = replace(data, train=Subset(data.train, range(256)), test=Subset(data.test, range(300)))
        with tempfile.TemporaryDirectory() as scratch:
            told = run(asked.network, few, Path(scratch), 1, DROPS)
        print(report({"epochs": 1, "pictures": 256, "networks": [told]}))
        return
    folder = CACHE / "budget"
    if asked.only is not None:
        dense, bench = published(asked.network), make_bench(data, folder)
        out = folder / f"{asked.network}-{asked.only:g}"
        print(under_budget(dense, bench, asked.only, asked.epochs, out)["explanation"])
        return
    ledger = Ledger(folder / "networks.json")
    ledger.parts[asked.network] = run(asked.network, data, folder, asked.epochs, DROPS)
    ledger.file.write_text(json.dumps(ledger.parts, indent=1), "utf-8")
    values = {"epochs": asked.epochs, "pictures": len(data.train), "networks": list(ledger.parts.values())}
    publish("budget", values, report(values))


if __name__ == "__main__":
    main()
