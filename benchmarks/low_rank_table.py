"""Chapter 2 in one table: every way of factorising at two and four times fewer, and which is fastest at equal error.

A perceptron on spoken digits, an LSTM on words, and ResNet-20 and ResNet-56 with their published CIFAR-10 weights. Each
way is set for 2 and 4 times fewer of what its paper is about (multiply-adds, parameters or bytes), and judged before
and after the same short training. Networks that the papers train from scratch are trained so where that is short; in
the ResNets their layers take the places of trained ones and are first taught the responses of these. Time in ONNX
Runtime at batch sizes 1 and 64, one thread, processor time, dense and light in turns.

A part (network x way x times x seed) that is finished is kept in `.cache/benchmarks/low_rank_table`, so that a run that
was killed goes on; of networks that have none there the results stay as they are. Seeds come one after the other, so
that `--report` can tell what there is at any time. `--only` does the parts of one network, and `--seed` those of one
seed, so that several processes can share the work; `--smoke` does everything on little and keeps nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from _common import CACHE, Ledger, files, interval, of_networks, publish, times
from _low_rank_nets import Net, acoustic, residual, words
from _low_rank_report import lines, page
from _low_rank_teaching import taught
from _low_rank_ways import RATIOS, Way, told
from karui.measuring import Clock, count
from karui.measuring.engines import OnnxRuntime
from karui.measuring.machine import this_machine
from karui.model import Model
from karui.technique import Bench

SEEDS = 3
NETS = {
    "acoustic": acoustic,
    "words": words,
    "resnet20": lambda: residual("resnet20"),
    "resnet56": lambda: residual("resnet56"),
}
FOLDER = CACHE / "low_rank_table"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A network under way: its finished parts, and the clock."""

    net: Net
    ledger: Ledger
    folder: Path
    clock: Clock

    def run(self, seed: int, ratios: Sequence[int]) -> None:
        """All parts of a seed."""
        self.ledger.once(f"{self.net.name}, dense, seed {seed}", lambda: self.control(seed))
        for ratio in ratios:
            for way in self.net.ways:
                key = f"{self.net.name}, {way.name}, {ratio}x"
                setting = self.ledger.once(f"{key}: setting", lambda w=way, r=ratio: self.setting(w, r))
                self.ledger.once(f"{key}, seed {seed}", lambda w=way, s=setting: self.part(w, s, seed))

    def setting(self, way: Way, ratio: int) -> Any:
        """What comes nearest to so many times fewer."""
        return way.setting(self.net.dense(0, self.folder), ratio)

    def control(self, seed: int) -> dict[str, Any]:
        """The dense network, as it is and after the same training."""
        dense, bench = self.net.dense(seed, self.folder), self.net.bench(seed)
        after = bench.fit(dense, epochs=self.net.passes, label="dense")
        counts = count(dense)
        return {
            "before": self.net.score(dense, bench),
            "after": self.net.score(after, bench),
            "parameters": counts.parameters,
            "macs": counts.macs,
            **files(dense),
        }

    def part(self, way: Way, setting: Any, seed: int) -> dict[str, Any]:
        """Scores of one way and seed; of the first seed also counts, bytes and times."""
        net, bench, dense = self.net, self.net.bench(seed), self.net.dense(seed, self.folder)
        step = way.make(tuple(setting) if isinstance(setting, list) else setting)
        started = time.process_time()
        light = step.apply(dense, bench)
        facts: dict[str, Any] = {"seconds": time.process_time() - started, "settings": told(step)}
        if way.kind == "scratch" and net.training and way.whole:
            light = way.whole(step, net.training.epochs).apply(dense, net.scratch(seed))
            facts["after"] = net.score(light, bench)
        else:
            if way.kind == "taught":
                light = taught(light, dense, [c.path for c in step.choose(dense) if c.replaced], bench)
            facts["before"] = facts["after"] = net.score(light, bench)
            if way.kind != "inference":
                light = self.trained(way, step, dense, light, bench)
                facts["after"] = net.score(light, bench)
        return facts if seed else {**facts, **self.measured(dense, light)}

    def trained(self, way: Way, step: Any, dense: Model, light: Model, bench: Bench) -> Model:
        """The light network after the short training: its own where the way has one."""
        if way.whole is not None:
            return way.whole(step, self.net.passes).apply(dense, bench)
        influence = way.influence(step, light, bench) if way.influence else None
        return bench.fit(light, epochs=self.net.passes, influence=influence, label=way.name)

    def measured(self, dense: Model, light: Model) -> dict[str, Any]:
        """Counts, bytes on disk, and times of both in turns."""
        counts = count(light)
        sizes = {"parameters": counts.parameters, "nonzero": counts.nonzero, "macs": counts.macs}
        return {**sizes, **files(light), "times": times(self.clock, dense, light)}


def collected(net: Net, parts: dict[str, Any]) -> dict[str, Any]:
    """What is finished of a network: the dense one, and a row for each way and number of times."""

    def over(key: str) -> list[dict[str, Any]]:
        return [parts[f"{key}, seed {s}"] for s in range(SEEDS) if f"{key}, seed {s}" in parts]

    controls, rows = over(f"{net.name}, dense"), []
    if not controls:
        return {"rows": [], "missing": []}
    for way in net.ways:
        for ratio in RATIOS:
            runs = over(f"{net.name}, {way.name}, {ratio}x")
            if runs and "macs" in runs[0]:
                rows.append({"way": way.name, "of": way.of, "fewer": ratio, "kind": way.kind, **_row(runs)})
    done = {(row["way"], row["fewer"]) for row in rows}
    missing = [f"{way.name} {ratio}x" for ratio in RATIOS for way in net.ways if (way.name, ratio) not in done]
    return {"about": net.about, "unit": net.unit, "dense": _row(controls), "rows": rows, "missing": missing}


def _row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {
        part: _interval([run[part] for run in runs if part in run]) for part in ("before", "after") if part in runs[0]
    }
    return {**runs[0], **scores, "seeds": len(runs)}


def _interval(values: list[float]) -> dict[str, Any]:
    """As `interval`; of a single value only itself, as it tells nothing of its spread."""
    return interval(values) if len(values) > 1 else {"mean": values[0], "values": values}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique."""
    return lines(told)


def _little(net: Net) -> Net:
    def bench(seed: int) -> Bench:
        whole = net.bench(seed)
        return replace(whole, train=Subset(whole.train, range(128)))

    return replace(net, bench=bench, training=net.training and replace(net.training, epochs=1))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="one seed, little data; keeps nothing")
    options.add_argument("--report", action="store_true", help="tell what is finished; measure nothing")
    options.add_argument("--only", choices=NETS, help="the parts of this network alone; tells nothing")
    options.add_argument("--seed", type=int, choices=range(SEEDS), help="the parts of this seed alone; tells nothing")
    asked = options.parse_args()
    made = {name: make() for name, make in NETS.items() if asked.only in (None, name)}
    torch.set_num_threads(1)
    clock = Clock(threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, seconds=3)
    if asked.smoke:
        quick = replace(clock, rounds=5, seconds=2)
        with tempfile.TemporaryDirectory() as scratch:
            ledgers = {name: Ledger(Path(scratch) / f"{name}.json") for name in made}
            for name, net in made.items():
                little = Session(net=_little(net), ledger=ledgers[name], folder=Path(scratch), clock=quick)
                little.run(0, RATIOS[:1])
            here = {"machine": str(this_machine())}
            print(page({name: here | collected(net, ledgers[name].parts) for name, net in made.items()}))
        return
    ledgers = {(name, seed): Ledger(FOLDER / f"{name}-{seed}.json") for name in made for seed in range(SEEDS)}
    for (name, seed), ledger in ledgers.items():
        if asked.seed in (None, seed) and not asked.report:
            Session(net=made[name], ledger=ledger, folder=FOLDER, clock=clock).run(seed, RATIOS)
    if asked.only is None and asked.seed is None:
        parts = {name: dict(ChainMap(*(ledgers[name, seed].parts for seed in range(SEEDS)))) for name in made}
        begun = {name: collected(net, parts[name]) for name, net in made.items()}
        values = of_networks("low_rank_table", {name: net for name, net in begun.items() if net["rows"]})
        publish("low_rank_table", {"networks": values}, page(values), measured({"networks": values}))


if __name__ == "__main__":
    main()
