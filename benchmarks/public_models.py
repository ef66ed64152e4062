"""Public models with random weights, about 30 % of the channels cut by L1 and proved: how many, how fast, and what not.

The smallest member, by parameters, of each family of torchvision (27) and timm (105), as listed in
`public_models.json`: torchvision's classifiers by the paper that they come from, three networks for segmentation and
one for video; of timm one for each of its 98 modules, and seven families that share a module with another. Each model
runs in a process of its own with a limit of 90 seconds of processor time and 12 GB of memory. Groups that a
normalisation across channels mixes are cut too, and told apart ("up to normalisation"). Needs torchvision and timm (the
extra `vision`).

    python benchmarks/public_models.py [--only NAME] [--jobs 2] [--resume]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from karui.errors import KaruiError

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
CPU_SECONDS, MEMORY, SHARE = 90, 12 << 30, 0.3
SMALLER = 0.85


def one(library: str, name: str) -> dict[str, Any]:
    """Cut one model, in this process."""
    import torch

    from karui.model import Model, coupled_groups, remove_units, resolve

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = resolve(f"{library}:{name}").replay(None, ()).eval()
    model = Model(net, (torch.randn(1, *_size(library, name, net)),))
    row: dict[str, Any] = {"library": library, "model": name, "before": model.parameters}
    started = time.process_time()
    try:
        analysis = coupled_groups(model)
        removed, inexact = {}, 0
        for group in analysis.groups:
            units = round(SHARE * group.size)
            if group.sources and units:
                scores = torch.stack([group.rows(net, source).abs().sum(1) for source in group.sources]).sum(0)
                removed[group.name] = scores.argsort()[:units]
                inexact += not group.exact
        row |= {"groups": len(removed), "up to normalisation": inexact}
        light = remove_units(model, removed, allow_normalisation=True, analysis=analysis)
        row |= {"outcome": "proved", "after": light.parameters}
    except KaruiError as error:
        row |= {"outcome": "refused", "reason": error.message}
    return row | {"seconds": round(time.process_time() - started, 2)}


def _size(library: str, name: str, net: Any) -> tuple[int, ...]:
    if library == "timm":
        return tuple(net.pretrained_cfg.get("input_size", (3, 224, 224)))
    if name == "r3d_18":
        return (3, 16, 112, 112)
    return (3, 299, 299) if "inception" in name else (3, 224, 224)


def limited(library: str, name: str) -> dict[str, Any]:
    """The row of one model, from a process with limits."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--one", library, name],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, preexec_fn=limits,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    told = done.stderr.strip().splitlines()
    out_of_time = done.returncode in (-24, -9)  # SIGXCPU, or the kill that follows it
    reason = f"no result within {CPU_SECONDS} s of processor time" if out_of_time else (told or ["no output"])[-1]
    return {"library": library, "model": name, "outcome": "out of time" if out_of_time else "crashed", "reason": reason}


def report(rows: list[dict[str, Any]], listed: int) -> str:
    """The counts, and a line for each model."""
    proved = [row for row in rows if row["outcome"] == "proved"]
    smaller = [row for row in proved if row["after"] <= SMALLER * row["before"]]
    exact = [row for row in smaller if not row["up to normalisation"]]
    refused = [row for row in rows if row["outcome"] == "refused"]
    lost = [row for row in rows if row["outcome"] in ("crashed", "out of time")]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    told = (
        f"{len(rows)} of the {listed} models listed were run. {len(proved)} were cut and proved, {len(smaller)} of "
        f"them smaller by 15 % or more ({len(exact)} with no normalisation across channels, "
        f"{len(smaller) - len(exact)} up to it). {len(refused)} were refused with a reason, {len(lost)} crashed or ran "
        f"out of time. Median {median(seconds):.1f} s of processor time to analyse, cut and prove; random weights."
    )
    lines = [
        f"# Public models, cut by {SHARE:.0%} and proved",
        "",
        told,
        "",
        "| library | model | outcome | parameters left | up to normalisation | seconds | reason |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        left = f"{row['after'] / row['before']:.0%}" if "after" in row else ""
        cells = [row["library"], row["model"], row["outcome"], left, row.get("up to normalisation", "")]
        reason = str(row.get("reason", "")).replace("|", "/").replace("\n", " ")[:200]
        lines.append("| " + " | ".join(map(str, [*cells, row.get("seconds", ""), reason])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the list, and keep the results."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--one", nargs=2, metavar=("LIBRARY", "MODEL"), help="cut one model and print its row")
    options.add_argument("--only", help="models whose name contains this; keeps nothing")
    options.add_argument("--jobs", type=int, default=1, help="models at a time")
    options.add_argument("--resume", action="store_true", help="keep the rows of results/ whose outcome is 'proved'")
    asked = options.parse_args()
    if asked.one:
        print(json.dumps(one(*asked.one)))
        return
    if any(importlib.util.find_spec(package) is None for package in ("torchvision", "timm")):
        print('skipped: torchvision and timm are not installed; pip install ".[vision]"')
        return
    listed = json.loads((HERE / "public_models.json").read_text(encoding="utf-8"))
    chosen = [row for row in listed if asked.only is None or asked.only in row["model"]]
    kept = {}
    if asked.resume:
        known = json.loads((RESULTS / "public_models.json").read_text(encoding="utf-8"))
        kept = {(row["library"], row["model"]): row for row in known if row["outcome"] == "proved"}

    def row_of(model: dict[str, str]) -> dict[str, Any]:
        key = (model["library"], model["model"])
        return kept[key] if key in kept else limited(*key)

    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for row in pool.map(row_of, chosen):
            rows.append(row)
            print(f"{len(rows)}/{len(chosen)} {row['model']}: {row['outcome']}", flush=True)
            if asked.only is None:  # kept as it grows, so that a run that is stopped leaves what it has
                (RESULTS / "public_models.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                (RESULTS / "public_models.md").write_text(report(rows, len(listed)), encoding="utf-8")


if __name__ == "__main__":
    main()
