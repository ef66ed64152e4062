"""Public models with random weights, 30 % of the channels cut by L1 and proved: how many, how fast, and what not.

`public_models.json` lists the smallest member, by parameters, of each family of torchvision 0.29 (27) and timm 1.0
(105): torchvision's classifiers by the paper that they come from, three networks for segmentation and one for video; of
timm one for each of its 98 modules, and seven families that share a module with another. The input is one sample of the
size that the model was made for.

Counts are rounded as those of all techniques that cut: to the nearest unit, but of a pair nothing goes. Each model
runs in a process of its own with a limit of 90 seconds of processor time and 12 GB of memory. Groups that a
normalisation across channels mixes are cut too, and told apart ("up to normalisation"). Beside the proof, every model
that is exact throughout is run once more as a user would, masked and cut, on an input that the proof did not see: a
relative difference above 0.001 counts as wrong. Needs torchvision and timm (the extra `vision`); nothing is downloaded.

    python benchmarks/public_models.py [--only NAME] [--jobs 2] [--resume] [--longer SECONDS]

Models that ran out of time stay so in the counts; `--longer` runs those again with another limit, and tells in their
rows what came of it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import multiprocessing
import resource
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import median
from typing import Any

from karui.errors import KaruiError

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
CPU_SECONDS, MEMORY, SHARE = 90, 12 << 30, 0.3
SMALLER, EQUAL = 0.85, 1e-3
OUTCOMES = ("proved", "refused", "crashed", "out of time", "out of memory", "wrong")


def one(listed: dict[str, Any], seconds: int) -> dict[str, Any]:
    """Cut one model, in this process, within so many seconds."""
    import torch

    from karui.model import Model, coupled_groups, remove_units, resolve
    from karui.model.graphform import GraphForm
    from karui.technique.pruning.selection import removed_count

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = resolve(f"{listed['library']}:{listed['model']}").replay(None, ()).eval()
    size = _size(listed, net)
    model = Model(net, (torch.randn(1, *size),))
    row: dict[str, Any] = {"library": listed["library"], "model": listed["model"], "before": model.parameters}
    started = time.process_time()
    limit_time(started + seconds)
    try:
        analysis = coupled_groups(model)
        removed, inexact = {}, 0
        for group in analysis.groups:
            units = removed_count(group.size, SHARE)
            if group.sources and units:
                scores = torch.stack([group.rows(net, source).abs().sum(1) for source in group.sources]).sum(0)
                removed[group.name] = scores.argsort()[:units]
                inexact += not group.exact
        row |= {"groups": len(removed), "up to normalisation": inexact}
        light = remove_units(model, removed, allow_normalisation=True, analysis=analysis)
    except KaruiError as error:
        return row | {"outcome": "refused", "reason": error.message, "seconds": _since(started)}
    row |= {"outcome": "proved", "after": light.parameters, "seconds": _since(started)}
    limit_time(None)
    row |= {"graph form": isinstance(light.module, GraphForm)}
    if not inexact:
        apart = _difference(net, light.module, analysis, removed, size)
        row |= {} if apart is None else {"difference": apart}
        row |= {"outcome": "wrong"} if apart is not None and not apart <= EQUAL else {}
    return row


def limit_time(seconds: float | None) -> None:
    """End this process with a signal when it has used that much processor time; None lifts the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard if seconds is None else round(seconds), hard))


def _since(started: float) -> float:
    return round(time.process_time() - started, 2)


def _difference(net: Any, light: Any, analysis: Any, removed: dict[str, Any], size: tuple[int, ...]) -> float | None:
    """The largest difference of masked and cut model in single precision, relative to the largest output.

    None where all outputs are zero, as they are of a head that starts at zero: those say nothing.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from karui.model.proof import mask

    masked = copy.deepcopy(net)
    mask(masked, analysis, removed)
    given = torch.randn(1, *size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        pairs = list(zip(tree_leaves(masked.eval()(given)), tree_leaves(light.eval()(given)), strict=True))
    found = [(float((one - other).abs().max()), float(one.abs().max())) for one, other in pairs]
    if not any(size for _, size in found) and not any(gap for gap, _ in found):
        return None
    return max(gap / size if size else gap and float("inf") for gap, size in found)


def _size(listed: dict[str, Any], net: Any) -> tuple[int, ...]:
    if listed["library"] == "timm":
        return tuple(net.pretrained_cfg.get("input_size", (3, 224, 224)))
    if listed["family"].startswith("video"):
        return (3, 16, 112, 112)
    return (3, 299, 299) if "inception" in listed["model"] else (3, 224, 224)


def state() -> str:
    """What the results depend on: the code of the models' floor, this script, and the versions of the libraries."""
    code = hashlib.sha256()
    for file in (*sorted((HERE.parent / "src" / "karui" / "model").glob("*.py")), Path(__file__)):
        code.update(file.read_bytes())
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "timm"))
    return f"{versions}, code {code.hexdigest()[:12]}"


def limited(listed: dict[str, Any], server: ForkServerContext, seconds: int = CPU_SECONDS) -> dict[str, Any]:
    """The row of one model, from a process with limits."""
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=apart, args=(listed, seconds, sender))
    process.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        row = None
    process.join()
    if row is not None:
        return row
    out_of_time = process.exitcode == -signal.SIGXCPU
    reason = f"no result within {seconds} s of processor time" if out_of_time else f"exit code {process.exitcode}"
    told_by = {"library": listed["library"], "model": listed["model"], "before": listed["parameters"]}
    return told_by | {"outcome": "out of time" if out_of_time else "crashed", "reason": reason}


def apart(listed: dict[str, Any], seconds: int, sender: Connection) -> None:
    """Cut one model within the limits, and send its row; whatever is raised is told as a crash."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    try:
        row = one(listed, seconds)
    except Exception as error:  # noqa: BLE001  (a row tells of it)
        told_by = {"library": listed["library"], "model": listed["model"], "before": listed["parameters"]}
        row = told_by | failed(error)
    sender.send(row)


def failed(error: Exception) -> dict[str, str]:
    """What is told of an error: a crash, or that the limit on memory was reached."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"outcome": "out of memory", "reason": f"it takes more than {MEMORY >> 30} GB"}
    return {"outcome": "crashed", "reason": f"{type(error).__name__}: {error}"}


def summary(rows: list[dict[str, Any]], listed: int) -> str:
    """The counts, in words."""
    proved = [row for row in rows if row["outcome"] == "proved"]
    smaller = [row for row in proved if row["after"] <= SMALLER * row["before"]]
    plain = [row for row in smaller if not row["up to normalisation"]]
    count = {kind: sum(row["outcome"] == kind for row in rows) for kind in OUTCOMES}
    seconds = sorted(row["seconds"] for row in rows if "seconds" in row)
    shown = [row["difference"] for row in rows if "difference" in row]
    return (
        f"{len(rows)} of the {listed} models listed were run. {len(proved)} were cut and proved, {len(smaller)} of "
        f"them smaller by 15 % or more: {len(plain)} exactly, {len(smaller) - len(plain)} up to normalisation (some of "
        f"their groups are counted by a normalisation across channels, which the proof lets count survivors only, so "
        f"the cut model is another function than the masked one). {count['refused']} were refused with a reason, "
        f"{count['crashed']} crashed, {count['out of time']} ran out of {CPU_SECONDS} s, {count['out of memory']} of "
        f"{MEMORY >> 30} GB, {count['wrong']} were wrong: "
        f"of {len(shown)} models that are exact throughout, masked and cut outputs in single precision differ by "
        f"{max(shown, default=0):.1g} of the largest output at most.\n\n"
        f"Seconds are those of the processor, of one thread, to analyse, cut and prove, on random weights: median "
        f"{median(seconds):.1f}, nine of ten under {seconds[int(0.9 * (len(seconds) - 1))]:.0f}, "
        f"longest {seconds[-1]:.0f}."
    )


def report(rows: list[dict[str, Any]], listed: int) -> str:
    """The counts, and a line for each model."""
    states = {state: chr(ord("A") + place) for place, state in enumerate(sorted({row["state"] for row in rows}))}
    lines = [
        f"# Public models, cut by {SHARE:.0%} and proved",
        "",
        summary(rows, listed),
        "",
        "Measured with: " + "; ".join(f"({letter}) {state}" for state, letter in states.items()) + ".",
        "",
        "| library | model | outcome | parameters left | up to normalisation | graph form | seconds | with | reason |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        left = f"{row['after'] / row['before']:.0%}" if "after" in row else ""
        inexact = f"{row['up to normalisation']} of {row['groups']}" if row.get("up to normalisation") else ""
        form = "yes" if row.get("graph form") else ""
        reason = "; ".join(filter(None, [row.get("reason", ""), _longer(row.get("longer"))]))
        reason = reason.replace("|", "/").replace("\n", " ")[:200]
        cells = [row["library"], row["model"], row["outcome"], left, inexact, form, row.get("seconds", "")]
        lines.append("| " + " | ".join(map(str, [*cells, states[row["state"]], reason])) + " |")
    return "\n".join(lines) + "\n"


def _longer(row: dict[str, Any] | None) -> str:
    """What came of a model with more time."""
    if row is None:
        return ""
    if "after" not in row:
        return f"with more time {row['outcome']}: {row['reason']}"
    inexact = f", {row['up to normalisation']} of {row['groups']} groups up to normalisation"
    left = f"{row['after'] / row['before']:.0%} of the parameters left"
    return (
        f"with more time {row['outcome']}, {left}{inexact if row['up to normalisation'] else ''}, in "
        f"{row['seconds']:.0f} s"
    )


def again(listed: list[dict[str, Any]], server: ForkServerContext, seconds: int) -> None:
    """Run what ran out of time with another limit, and keep what came of it."""
    file = RESULTS / "public_models.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    for row in (row for row in rows if row["outcome"] == "out of time"):
        [found] = [each for each in listed if (each["library"], each["model"]) == (row["library"], row["model"])]
        row["longer"] = limited(found, server, seconds) | {"state": state()}
        print(json.dumps(row), flush=True)
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "public_models.md").write_text(report(rows, len(listed)), encoding="utf-8")


def kept(now: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of an earlier run of the same state, by library and model."""
    file = RESULTS / "public_models.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {(row["library"], row["model"]): row for row in rows if row.get("state") == now}


def main() -> None:
    """Run the list, and keep the results."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", nargs="+", metavar="NAME", help="models of these names; keeps nothing")
    options.add_argument("--jobs", type=int, default=1, help="models at a time")
    options.add_argument("--resume", action="store_true", help="keep the rows that this state of the code has made")
    options.add_argument(
        "--longer", type=int, metavar="SECONDS", help="run what ran out of time again, with this limit"
    )
    asked = options.parse_args()
    if any(importlib.util.find_spec(package) is None for package in ("torchvision", "timm")):
        print('skipped: torchvision and timm are not installed; pip install ".[vision]"')
        return
    listed = json.loads((HERE / "public_models.json").read_text(encoding="utf-8"))
    server = multiprocessing.get_context("forkserver")  # that imports once what each process needs
    server.set_forkserver_preload(["torch", "torchvision", "timm", "karui.model"])
    if asked.longer:
        again(listed, server, asked.longer)
        return
    now = state()
    rows = kept(now) if asked.resume else {}
    chosen = [row for row in listed if asked.only is None or row["model"] in asked.only]
    waiting = [row for row in chosen if asked.only or (row["library"], row["model"]) not in rows]
    with ThreadPoolExecutor(asked.jobs) as pool:
        for done in as_completed([pool.submit(limited, row, server) for row in waiting]):
            row = done.result() | {"state": now}
            rows[row["library"], row["model"]] = row
            print(f"{len(rows)}/{len(chosen)} {json.dumps(row)}", flush=True)
            if asked.only is None:  # kept as it grows, so that a run that is stopped leaves what it has
                ordered = [rows[key] for one in listed if (key := (one["library"], one["model"])) in rows]
                (RESULTS / "public_models.json").write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
                (RESULTS / "public_models.md").write_text(report(ordered, len(listed)), encoding="utf-8")


if __name__ == "__main__":
    main()
