"""ResNet-20 and ResNet-56 with their published CIFAR-10 weights, compressed: what is gained and what it costs.

Filter pruning (62) at 30 and 50 % of the filters, Tucker-2 (12), magnitude pruning with retraining (63) at 90 % of the
weights, and filter pruning followed by distillation (30). For each: accuracy on all 10,000 test pictures before and
after fine-tuning, multiply-accumulates, bytes, and time in ONNX Runtime at batch sizes 1 and 64 on one thread, dense
and compressed in turns.

The fine-tuning sees 13,500 of the 50,000 training pictures; the published weights have seen all of them. Trained
networks and checkpoints are kept in `.cache/benchmarks/cifar_resnets`, so that a run that was killed goes on; `--only`
does the part of one network, so that two processes can share the work. `--smoke` runs everything on a few pictures and
keeps nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from _common import CACHE, Ledger, cifar10, data_folder, publish, table
from karui.architectures.cifar_resnet import load_cifar_weights
from karui.artifact import load, save
from karui.data import Splits
from karui.distill import KnowledgeDistillation
from karui.lowrank import Tucker2
from karui.measuring import Clock, compare, evaluate
from karui.measuring.engines import OnnxRuntime
from karui.measuring.values import bytes_text
from karui.model import Classification, Model, resolve
from karui.sparsify import L1Filters, MagnitudePruning
from karui.technique import Bench, Technique, Then
from karui.train import SGD, Cosine, Training

NETWORKS = ("resnet20", "resnet56")
PUBLISHED = {"resnet20": 9173, "resnet56": 9339}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A compression: the technique without its training, and with it."""

    name: str
    bare: Technique
    whole: Technique


def cases(epochs: int) -> tuple[Case, ...]:
    """The compressions, each fine-tuned for the same number of passes (63: half of them after each of two rounds)."""

    def filters(ratio: float, passes: int) -> Technique:
        return L1Filters(ratio=ratio, epochs=passes)

    def weights(passes: int) -> Technique:
        return MagnitudePruning(keep=0.1, rounds=2 if passes else 1, epochs=passes // 2, rate=1.0)

    distilled = Then(filters(0.5, 0), KnowledgeDistillation(epochs=epochs))
    return (
        Case(name="[62] 30 % of filters", bare=filters(0.3, 0), whole=filters(0.3, epochs)),
        Case(name="[62] 50 % of filters", bare=filters(0.5, 0), whole=filters(0.5, epochs)),
        Case(
            name="[62] 30 %, multiples of 8",
            bare=L1Filters(ratio=0.3, multiple=8, epochs=0),
            whole=L1Filters(ratio=0.3, multiple=8, epochs=epochs),
        ),
        Case(name="[12] ranks by variational Bayes", bare=Tucker2(epochs=0), whole=Tucker2(epochs=epochs)),
        Case(name="[12] half of the ranks", bare=Tucker2(ratio=0.5, epochs=0), whole=Tucker2(ratio=0.5, epochs=epochs)),
        Case(name="[63] 90 % of weights", bare=weights(0), whole=weights(epochs)),
        Case(name="[62] 50 %, then [30]", bare=filters(0.5, 0), whole=distilled),
    )


def published(name: str) -> Model:
    """The network with the weights that others trained."""
    origin = resolve(f"karui.architectures.cifar_resnet:{name}")
    module = origin.replay(None, ())
    module.load_state_dict(load_cifar_weights(data_folder() / "cifar10_resnets" / f"{name}.npz"))
    return Model(module.eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification(), lineage=(origin,))


def make_bench(data: Splits, folder: Path) -> Bench:
    training = Training(
        batch_size=128,
        optimizer=SGD(lr=0.02, weight_decay=1e-4),
        schedule=Cosine(),
        augment=data.augment,
    )
    return Bench(
        train=data.train,
        validation=data.validation,
        test=data.test,
        training=training,
        checkpoints=folder / "checkpoints",
        progress=True,
    )


def accuracy(model: Model, data: Splits) -> dict[str, Any]:
    score = evaluate(model, data.test)
    return {"right": round(score.value * score.count), "of": score.count, **score.to_json()}


@dataclass(frozen=True, kw_only=True)
class Session:
    """One network, and where its finished parts are kept."""

    network: str
    dense: Model
    data: Splits
    bench: Bench
    ledger: Ledger
    folder: Path

    def row(self, case: Case) -> dict[str, Any]:
        """All that is told of one compression."""
        key = f"{self.network} {case.name}"
        told = {"network": self.network, "case": case.name, "dense": self.judged(f"{self.network} dense", self.dense)}
        before = self.ledger.once(
            f"{key}: before", lambda: accuracy(case.bare.apply(self.dense, self.bench), self.data)
        )
        light = self.compressed(key, case)
        after = self.judged(f"{key}: after", light)
        facts = self.ledger.once(f"{key}: measured", lambda: in_turns(self.dense, light))
        return {**told, "before": before, "after": after, "seconds": self.ledger.parts.get(f"{key}: seconds"), **facts}

    def judged(self, key: str, model: Model) -> dict[str, Any]:
        """Accuracy on the test pictures."""
        return self.ledger.once(key, lambda: accuracy(model, self.data))

    def compressed(self, key: str, case: Case) -> Model:
        """The compressed and fine-tuned network, from its folder if it is there."""
        where = self.folder / "".join(c if c.isalnum() else "-" for c in key)
        if not (where / "model.json").is_file():
            started = time.perf_counter()
            save(case.whole.apply(self.dense, self.bench), where)
            self.ledger.once(f"{key}: seconds", lambda: time.perf_counter() - started)
        return load(where)


def in_turns(dense: Model, light: Model) -> dict[str, Any]:
    """Counts, bytes on disk and times of both, dense and compressed in turns."""
    clock = Clock(threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, rounds=25)
    found = compare(dense, light, clock=clock)
    with tempfile.TemporaryDirectory() as scratch:
        heavy, lean = save(dense, Path(scratch) / "dense"), save(light, Path(scratch) / "light")
    told = {
        "parameters": [found.dense.parameters, found.light.parameters],
        "nonzero": [found.dense.counts.nonzero, found.light.counts.nonzero],
        "macs": [found.dense.macs, found.light.macs],
        "weights file": [heavy.weights_bytes, lean.weights_bytes],
        "onnx file": [heavy.onnx_bytes, lean.onnx_bytes],
        "lineage": [edit.describe() for edit in light.lineage],
    }
    for batch in clock.batches:
        times = [side.time("onnxruntime", batch) for side in (found.dense, found.light)]
        ratio = found.ratio("time", "onnxruntime", batch, 1)
        told[f"time at batch {batch}"] = [*(str(timing) for timing in times), str(ratio).partition("): ")[2]]
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique: of a pipeline under its last step."""
    slugs = {
        "[62]": "l1_filter_pruning",
        "[12]": "tucker2",
        "[63]": "iterative_magnitude_pruning",
        "[30]": "knowledge_distillation",
    }
    lines: dict[str, list[str]] = {}
    for row in told["rows"]:
        last = max(slugs, key=row["case"].rfind)
        dense, after = (f"{100 * row[part]['value']:.2f}" for part in ("dense", "after"))
        times = [f"batch {batch} {row[f'time at batch {batch}'][2]}" for batch in (1, 64)]
        lines.setdefault(slugs[last], []).append(
            f"CIFAR-10 {row['network']}, {row['case'].removeprefix(f'{last} ')}: accuracy {dense} to {after} % after "
            f"{told['epochs']} passes of fine-tuning (one training), MACs {_change(row['macs'], _millions)}, weights "
            f"file {_change(row['weights file'], bytes_text)}; ONNX Runtime, one thread: {', '.join(times)}"
        )
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="a few pictures, two passes; keeps nothing")
    options.add_argument("--epochs", type=int, default=8, help="passes of fine-tuning")
    options.add_argument("--only", choices=NETWORKS, help="train and measure one network; writes no results")
    options.add_argument("--threads", type=int, default=1, help="threads of the training")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    data = cifar10()
    if asked.smoke:
        few = replace(data, train=Subset(data.train, range(256)), test=Subset(data.test, range(300)))
        with tempfile.TemporaryDirectory() as scratch:
            print(report(run(few, Path(scratch), 2, NETWORKS[:1]), len(few.train), 2))
        return
    rows = run(data, CACHE / "cifar_resnets", asked.epochs, [asked.only] if asked.only else NETWORKS)
    for row in rows:
        if row["dense"]["right"] != PUBLISHED[row["network"]]:
            raise SystemExit(f"{row['network']} gets {row['dense']['right']} right: are weights and pictures whole?")
    if asked.only:
        print(report(rows, len(data.train), asked.epochs))
        return
    values = {"epochs": asked.epochs, "pictures": len(data.train), "rows": rows}
    publish("cifar_resnets", values, report(rows, len(data.train), asked.epochs), measured(values))


def run(data: Splits, folder: Path, epochs: int, networks: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each network and compression."""
    bench, rows = make_bench(data, folder), []
    for network in networks:
        ledger = Ledger(folder / f"{network}.json")
        session = Session(
            network=network, dense=published(network), data=data, bench=bench, ledger=ledger, folder=folder
        )
        rows += [session.row(case) for case in cases(epochs)]
    return rows


def report(rows: list[dict[str, Any]], pictures: int, epochs: int) -> str:
    """The two tables, with what a reader must know of them."""
    head = [
        "network",
        "compression",
        "dense",
        "before fine-tuning",
        "after",
        "MACs",
        "nonzero",
        "weights file",
        "ONNX file",
    ]
    lines = [
        [
            row["network"],
            row["case"],
            *(_percent(row[part]) for part in ("dense", "before", "after")),
            _change(row["macs"], _millions),
            _change(row["nonzero"], lambda n: f"{n / 1e3:.0f} k"),
            _change(row["weights file"], bytes_text),
            _change(row["onnx file"], bytes_text),
        ]
        for row in rows
    ]
    times = [
        [row["network"], row["case"], f"{batch}", *row[f"time at batch {batch}"]] for row in rows for batch in (1, 64)
    ]
    return f"""# CIFAR ResNets, compressed

Published weights, fine-tuned for {epochs} passes over {pictures:,} pictures. Accuracy in percent of the test pictures
with its 95 % interval; one training each, so that differences of a few tenths of a point mean nothing.

{table(head, lines)}

ONNX Runtime, one thread, processor time of a batch, dense and compressed in turns: median and quartiles. Weights that
are zero (63) are left out of the weights file; a dense engine multiplies them as any other.

{table(["network", "compression", "batch", "dense", "compressed", "ratio"], times)}
"""


def _percent(told: dict[str, Any]) -> str:
    return f"{100 * told['value']:.2f} [{100 * told['low']:.2f}, {100 * told['high']:.2f}]"


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f} M"


def _change(pair: Sequence[float], text: Callable[[float], str]) -> str:
    return f"{text(pair[0])} to {text(pair[1])}"


if __name__ == "__main__":
    main()
