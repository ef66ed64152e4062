"""A budget on CIFAR-10 ResNets against one-line int8 and Torch-Pruning: accuracy, time and bytes of the deployed files.

The published weights, one thread, ONNX Runtime. The rows: the dense network in 32 bits; its static quantisation to 8
bits by ONNX Runtime's own quantiser (no training); Torch-Pruning by group norms at two ratios with the same
fine-tuning, in 32 and in 8 bits; and `karui.compress` with no limit but the floor, at 1 and at 2 points. All training
has the same pictures and learning rate, and the dense network as teacher. Each row of Torch-Pruning has `--epochs`
passes, and each search of karui `--search` for all its points together: by default as many as both of those rows.

The weights have seen every training picture, so that a floor on some of those would mean nothing: dense they get 99.9 %
right. The floor is therefore held on the first 5,000 test pictures; accuracy is told on all 10,000 and on the 5,000
others, which no choice has seen. All files are judged in their engine, and timed in turns, in one run, at batch sizes 1
and 64. Where the menu of a budget predicted a time, it stands beside the measured one.

Every finished part is kept in `.cache/benchmarks/budget`, so that a killed run goes on, and the results are written
after the peers and after each budget, beside those of the other network, and under `--beside WORDS` beside those of the
same network on another machine; `--only` leaves out the other budget; `--smoke` runs everything on a few pictures and
keeps nothing. Torch-Pruning has to be installed; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset

import karui
from _budget_words import PREDICTED, WHY
from _common import CACHE, Ledger, cifar10, of_networks, publish, table, where
from _plain_int8 import plain_int8
from cifar_resnets import make_bench, published
from karui.artifact.files import write_file
from karui.data import Batches, Splits
from karui.deployment import Deployment
from karui.measuring import Clock, Timings, known_engine, onnx_form, time_ratio
from karui.measuring.machine import this_machine
from karui.measuring.values import bytes_text
from karui.model import Model
from karui.recipes.budget.deployments import score_of
from karui.recipes.keeping import CHECKPOINTS
from karui.technique import Bench
from karui.train import with_rate

DROPS = (1.0, 2.0)
HELD = 5000
"""Test pictures that the floor is held on; the verdict is on the others."""
BATCHES = (1, 64)
APART = 0.15
"""How far predicted and measured time may be apart."""
BAR = {1.0: {"1": (1.4, 1.6), "64": (2.4, 2.4)}, 2.0: {"1": (1.5, 1.65), "64": (2.9, 2.9)}}
"""How many times faster than dense the best peer pipelines were, by points lost and batch size."""


def splits(pictures: int) -> Splits:
    """Training pictures, and the test pictures in two parts: for the floor, and for the verdict."""
    data = cifar10()
    given = [Batches(part).fetch(torch.arange(len(part))) for part in (data.train, data.validation)]
    train = TensorDataset(torch.cat([x for (x,), _ in given])[:pictures], torch.cat([y for _, y in given])[:pictures])
    test = data.test
    return replace(data, train=train, validation=Subset(test, range(HELD)), test=Subset(test, range(HELD, len(test))))


RATIOS = (0.3, 0.5)
"""Shares of the inner channels that Torch-Pruning cuts."""
RATE, BATCH = 0.005, 64
"""Learning rate and batch size of all fine-tuning."""


def bench_of(data: Splits, folder: Path) -> Bench:
    """Where all networks are trained, and their parts kept."""
    bench = make_bench(data, folder)
    training = replace(with_rate(bench.training, RATE), batch_size=BATCH, channels_last=True)
    return replace(bench, training=training)


def int8_of(model: Model, bench: Bench, name: str) -> Deployment:
    """A network, quantised by ONNX Runtime itself: karui's own form does more."""
    return Deployment(name=name, engine="onnxruntime", precision="int8", data=plain_int8(model, bench))


def fp32_of(model: Model, name: str) -> Deployment:
    """A network as it is."""
    return Deployment(name=name, engine="onnxruntime", precision="fp32", data=onnx_form(model).data)


def peers(dense: Model, bench: Bench, epochs: int, folder: Path, ratios: Sequence[float]) -> dict[str, Deployment]:
    """The files that karui's are held against; of Torch-Pruning, at these ratios and at those that are there."""
    found = {"dense, fp32": fp32_of(dense, "dense"), "dense, one-line int8": int8_of(dense, bench, "int8")}
    if importlib.util.find_spec("torch_pruning") is None:
        return found
    from _budget_peers import group_norm_pruned, outer

    for ratio in RATIOS:
        names = [f"Torch-Pruning {ratio:g}, {precision}" for precision in ("fp32", "int8")]
        files = [folder / f"torch-pruning-{ratio:g}-{precision}.onnx" for precision in ("fp32", "int8")]
        if not files[1].is_file():
            if ratio not in ratios:
                continue
            light = group_norm_pruned(dense, bench, ratio, epochs, outer(dense.module))
            for file, made in zip(files, (fp32_of(light, ""), int8_of(light, bench, "")), strict=True):
                write_file(file, made.data)
        for name, file, precision in zip(names, files, ("fp32", "int8"), strict=True):
            data = file.read_bytes()
            found[name] = Deployment(name=name, engine="onnxruntime", precision=precision, data=data)
    return found


def under_budget(dense: Model, bench: Bench, drop: float, epochs: int, out: Path) -> dict[str, Any]:
    """The record of a run under a floor alone; one that was killed goes on."""
    said = bench.checkpoints / "answers" if bench.checkpoints is not None else None
    if said is not None and said.is_dir():  # what the teacher said to the peers' students serves here too
        shutil.copytree(said, out / CHECKPOINTS / said.name, dirs_exist_ok=True)
    given = replace(bench, checkpoints=None, test=bench.validation)  # the verdict is told here, of the other pictures
    done = karui.compress(dense, given, max_drop=drop, epochs=epochs, find_rate=False, out=out, resume=True, tell=print)
    return done.record["budget"]


def deployed(told: Mapping[str, Any], folder: Path) -> Deployment:
    """The file of a run that is there to be deployed."""
    form = next(form for form in told["forms"] if form["chosen"])
    data = (folder / "model.onnx").read_bytes()
    return Deployment(name="karui", engine=form["engine"], precision=form["precision"], data=data)


def judged(form: Deployment, dense: Model, data: Splits) -> dict[str, Any]:
    """Accuracy on the test pictures that no choice has seen, and on all of them, in the form's engine."""
    held, rest = (score_of(form, dense, part) for part in (data.validation, data.test))
    right, seen = round(rest.value * rest.count), round(held.value * held.count)
    return {"right": right, "right of all": right + seen, "all": rest.count + held.count, **rest.to_json()}


def raced(forms: Mapping[str, Deployment], dense: Model) -> dict[str, dict[str, Any]]:
    """Each form's time, and how many times faster it is than dense: all in turns, by processor time."""
    clock = Clock(batches=BATCHES, threads=(1,), cpu_time=True, rounds=51, seconds=60.0)
    entrants = {name: (known_engine(form.engine), form.data) for name, form in forms.items()}
    times = clock.race(entrants, dense.example, progress=True)
    return {name: {str(batch): _ratio(times, name, batch) for batch in BATCHES} for name in forms}


def _ratio(times: Timings, name: str, batch: int) -> dict[str, Any]:
    pair = [next(t for t in times.of(who) if t.batch == batch) for who in ("dense, fp32", name)]
    ratio = time_ratio(*pair, across=True)
    return {"seconds": pair[1].median, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}


def predictions(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured time of each point whose network was chosen from a menu, both of one form."""
    found = []
    for point in told["points"]:
        form = next((form for form in point["forms"] if form["name"] == point["foreseen"]), None)
        if point["predicted"] and point["chosen"] and form is not None:
            times = {"predicted": point["predicted"]["time"], "measured": form["time"]}
            found.append({"point": point["number"], "form": form["told"], **times})
    return found


def run(
    network: str,
    data: Splits,
    folder: Path,
    passes: tuple[int, int],
    drops: Sequence[float],
    *,
    ratios: Sequence[float] = RATIOS,
) -> Iterator[dict[str, Any]]:
    """All rows of a network: first those of the peers, then with each budget's.

    Args:
        network: its name.
        data: the pictures.
        folder: where finished parts are kept.
        passes: over the training pictures, of each peer and of each search.
        drops: the floors.
        ratios: of Torch-Pruning.
    """
    dense, ledger = published(network), Ledger(folder / f"{network}.json")
    bench = bench_of(data, folder)
    forms = peers(dense, bench, passes[0], folder / network, ratios)
    runs: dict[float, dict[str, Any]] = {}
    yield rows(forms, runs, dense, data, ledger)
    for drop in drops:
        out = folder / f"{network}-{drop:g}-{passes[1]}"
        runs[drop] = under_budget(dense, bench, drop, passes[1], out)
        forms[f"karui, at most {drop:g} lost"] = deployed(runs[drop], out)
        yield rows(forms, runs, dense, data, ledger)


def rows(
    forms: Mapping[str, Deployment],
    runs: Mapping[float, dict[str, Any]],
    dense: Model,
    data: Splits,
    ledger: Ledger,
) -> dict[str, Any]:
    """What was measured of the files that are there."""
    times = ledger.once(
        "times of " + ", ".join(f"{name} {_digest(form)}" for name, form in forms.items()), lambda: raced(forms, dense)
    )
    found = [
        {
            "case": name,
            "engine": form.engine,
            "precision": form.precision,
            "bytes": form.bytes,
            "test": ledger.once(f"{name} {_digest(form)}: test", lambda form=form: judged(form, dense, data)),
            "times": times[name],
        }
        for name, form in forms.items()
    ]
    points = {f"{drop:g}": predictions(told) for drop, told in runs.items()}
    told = {f"{drop:g}": told["explanation"] for drop, told in runs.items()}
    return {"rows": found, "predictions": points, "explanations": told}


def _digest(form: Deployment) -> str:
    return hashlib.sha256(form.data).hexdigest()[:12]


def report(values: Mapping[str, Any]) -> str:
    """The tables, and what stands against the bar."""
    parts = [
        f"""# A budget on CIFAR-10 ResNets

Published weights. The floor is held on a part of the test pictures; accuracy is told on all 10,000 and on the others,
which no choice has seen. All trainings have the same pictures, learning rate ({RATE:g}), batches of {BATCH} and the
dense network as teacher; the passes of a search of karui are those of all its points together. One thread, processor
time, all files of a network in turns in one run; the ratio is dense over this, with its 95 % interval. One training
each: differences of a few tenths of a point mean nothing. Torch-Pruning cuts inner widths of blocks alone: its result
does not run where the shortcut pads with zeros."""
    ]
    for name, told in values["networks"].items():
        dense = told["rows"][0]
        lines = [
            [
                row["case"],
                f"{row['precision']}, {row['engine']}",
                f"{100 * row['test']['right of all'] / row['test']['all']:.2f}",
                f"{100 * row['test']['value']:.2f}",
                f"{100 * (dense['test']['value'] - row['test']['value']):.2f}",
                *(_shown(row["times"][str(batch)]) for batch in BATCHES),
                f"{bytes_text(row['bytes'])} ({dense['bytes'] / row['bytes']:.2f}x)",
            ]
            for row in told["rows"]
        ]
        unseen = f"on {dense['test']['count']:,} unseen, %"
        head = ["", "form", "accuracy on all, %", unseen, "lost of those", "batch 1", "batch 64", "ONNX file"]
        pairs = [
            [floor, str(p["point"]), p["form"], f"{p['predicted']:.3f}", f"{p['measured']:.3f}", f"{_off(p):+.1%}"]
            for floor, points in told["predictions"].items()
            for p in points
        ]
        columns = ["floor", "point", "form", "predicted time", "measured time", "off by"]
        parts += [
            f"## {name}",
            _passes(told),
            *where(told),
            table(head, lines),
            *([PREDICTED, table(columns, pairs)] if pairs else []),
            *(f"Floor of {floor}: {text}" for floor, text in told["explanations"].items()),
        ]
    return "\n\n".join([*parts, _bar(values), WHY])


def _passes(told: Mapping[str, Any]) -> str:
    peers = f"{told['epochs']} passes over {told['pictures']:,} training pictures for each row of Torch-Pruning"
    return f"{peers}, {told['search']} for each search of karui."


def _shown(time: Mapping[str, float]) -> str:
    return f"{1e3 * time['seconds']:.3f} ms, {time['ratio']:.2f}x [{time['low']:.2f}, {time['high']:.2f}]"


def _off(pair: Mapping[str, Any]) -> float:
    return pair["predicted"] / pair["measured"] - 1


def _bar(values: Mapping[str, Any]) -> str:
    """What was aimed at, and whether it was reached: against the peers of this run, and those of earlier ones."""
    lines = ["## Against the bar", "", "1.3 times faster than the best peer at the same drop, and no larger:", ""]
    for name, told in values["networks"].items():
        dense = told["rows"][0]
        for drop in DROPS:
            row = next((r for r in told["rows"] if r["case"] == f"karui, at most {drop:g} lost"), None)
            if row is None:
                lines.append(f"- {name}, {drop:g} lost: not run")
                continue
            loss = dense["test"]["value"] - row["test"]["value"]
            others = [
                r
                for r in told["rows"]
                if not r["case"].startswith("karui")
                and dense["test"]["value"] - r["test"]["value"] <= max(loss, drop / 100)
            ]
            past = round(100 * loss - drop, 6)
            over = f", but {past:.2f} points past the floor on pictures not seen" if past > 0 else ""
            for batch in map(str, BATCHES):
                best = max(others, key=lambda r, batch=batch: r["times"][batch]["ratio"])
                ahead = row["times"][batch]["ratio"] / best["times"][batch]["ratio"]
                word = "reached" if ahead >= 1.3 and row["bytes"] <= best["bytes"] else "not reached"
                bar = ""
                if name.startswith("resnet20"):
                    low, high = BAR[drop][batch]
                    bar = f"; peers of earlier measurements {low:g}x" + (f" to {high:g}x" if high > low else "")
                lines.append(
                    f"- {name}, {drop:g} lost, batch {batch}: {row['times'][batch]['ratio']:.2f}x, "
                    f"{bytes_text(row['bytes'])}; best peer here ({best['case']}) "
                    f"{best['times'][batch]['ratio']:.2f}x, {bytes_text(best['bytes'])}: {ahead:.2f} times; "
                    f"{word}{over}{bar}"
                )
        # Budgets that begin alike visit the same networks: each counts once, as it was measured worst.
        every = sorted((p for points in told["predictions"].values() for p in points), key=lambda p: abs(_off(p)))
        pairs = list({(p["form"], p["predicted"]): p for p in every}.values())
        if pairs:
            within = sum(abs(_off(p)) <= APART for p in pairs)
            lines.append(f"- {name}, predicted times: {within} of {len(pairs)} within {APART:.0%}")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description="A budget against one-line int8")
    options.add_argument("--smoke", action="store_true", help="a few pictures; keeps nothing")
    options.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    options.add_argument("--epochs", type=int, default=3, help="passes of recovery for each row")
    options.add_argument("--search", type=int, default=6, help="passes of recovery for each search of karui")
    options.add_argument("--pictures", type=int, default=15_000, help="training pictures")
    options.add_argument(
        "--beside", default="", metavar="WORDS", help="keep another machine's rows; these are so named"
    )
    options.add_argument("--only", type=float, choices=DROPS, help="one budget")
    options.add_argument("--ratio", type=float, choices=RATIOS, action="append", help="of Torch-Pruning; all if none")
    asked = options.parse_args()
    torch.set_num_threads(1)
    data = splits(asked.pictures)
    drops = DROPS if asked.only is None else (asked.only,)
    if asked.smoke:
        small = {name: Subset(getattr(data, name), range(256)) for name in ("train", "validation", "test")}
        few = replace(data, **small)
        with tempfile.TemporaryDirectory() as scratch:
            *_, told = run(asked.network, few, Path(scratch), (1, 2), drops)
        passes = {"epochs": 1, "search": 2, "pictures": 256, "machine": str(this_machine())}
        print(report({"networks": {asked.network: {**told, **passes}}}))
        return
    folder = CACHE / "budget" / f"{asked.pictures}-{asked.epochs}"
    passes = {"epochs": asked.epochs, "search": asked.search, "pictures": len(data.train)}
    name = f"{asked.network}, {asked.beside}" if asked.beside else asked.network
    for told in run(asked.network, data, folder, (asked.epochs, asked.search), drops, ratios=asked.ratio or RATIOS):
        values = {"networks": of_networks("budget", {name: {**told, **passes}})}
        publish("budget", values, report(values))


if __name__ == "__main__":
    main()
