"""Attention transfer (34): residual networks on colour pictures of 16 pixels, five seeds.

CIFAR-10 at half its size, so that five seeds of six arms can be had: a ResNet-20 that has seen all pictures teaches one
of half the channels on a part of them. `distillation_table` has whole pictures and a published teacher, at equal cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

from _common import CACHE, Ledger, apart, by_name, claims_table, half_sized_cifar10, publish, shown, table, unseen
from _distill_tasks import kept
from _mlp import accuracy
from karui.architectures.cifar_resnet import cifar_resnet
from karui.data import tensors_of
from karui.distill import AttentionTransfer, KnowledgeDistillation
from karui.distill.attention import attention_map, normalised
from karui.model import Classification, Model, taps
from karui.technique import Bench
from karui.train import SGD, Cosine, Influence, Moment, Training
from karui.train.guide import Guide

SEEDS, PICTURES, PASSES, TEACHER_PASSES, TEST = 5, 1500, 6, 4, 2000
LAYERS = ("layer1", "layer2", "layer3")
PLAIN, MAPS, SOFT, BOTH, BARE = "labels", "maps", "[30]", "maps and [30]", "maps that are not normalised"


def network(width: float, seed: int) -> Model:
    torch.manual_seed(seed)
    net = cifar_resnet(20, width=width)
    return Model(net, example=(torch.zeros(1, 3, 16, 16),), task=Classification())


def training(passes: int) -> Training:
    return Training(
        epochs=passes, batch_size=32, optimizer=SGD(lr=0.1, weight_decay=1e-4), schedule=Cosine(), channels_last=True
    )


@dataclass(frozen=True, eq=False)
class Bare(Influence):
    """The control: sums of squares are drawn together as they are, with the weight that normalised ones have."""

    guide: Guide

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's layers."""
        return LAYERS

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss and 1000 times the mean square of the differences."""
        _, shown_ = self.guide.told(moment.inputs)
        for layer in LAYERS:
            difference = attention_map(moment.taps[layer]) - attention_map(shown_[layer])
            loss = loss + 1000.0 * difference.square().mean()
        return loss


def likeness(model: Model, guide: Guide, x: Tensor) -> float:
    """Mean cosine of the maps of pictures never seen."""
    with torch.no_grad(), taps(model.module.eval(), LAYERS) as seen:
        model.module(x)
        _, shown_ = guide((x,))
        cosines = [(normalised(attention_map(seen[p])) * normalised(attention_map(shown_[p]))).sum(1) for p in LAYERS]
    return float(torch.cat(cosines).mean())


def arms(seed: int) -> dict[str, float]:
    whole = half_sized_cifar10(None, TEST)
    fresh = network(1.0, 100)
    full = Bench(train=whole.train, validation=whole.validation, test=whole.test, training=training(TEACHER_PASSES))
    teacher = kept(CACHE / "attention_transfer", "teacher", lambda: full.fit(fresh), fresh)
    few = half_sized_cifar10(PICTURES, TEST)
    bench = replace(full, train=few.train, training=training(PASSES), seed=seed)
    student, guide = network(0.5, seed), Guide(teacher, LAYERS)
    maps = AttentionTransfer(teacher=teacher, layers=LAYERS, teacher_layers=LAYERS, epochs=PASSES)
    soft = KnowledgeDistillation(teacher=teacher, epochs=PASSES, remember=PICTURES)
    made = {
        PLAIN: bench.fit(student),
        MAPS: maps.apply(student, bench),
        SOFT: soft.apply(student, bench),
        BOTH: replace(maps, soft=0.9).apply(student, bench),
    }
    told = {name: accuracy(model, few) for name, model in made.items()}
    clipped = replace(bench, training=replace(bench.training, clip_norm=1.0))
    told[BARE] = accuracy(clipped.fit(student, influence=Bare(guide)), few)
    x = tensors_of(few.test)[0][:500]
    cosines = {f"cosine, {name}": likeness(model, guide, x) for name, model in made.items()}
    return {"the teacher": accuracy(teacher, few)} | told | cosines


def chance(gain: dict[str, Any]) -> float:
    """Two-sided p of a paired t test that the difference is none."""
    values = torch.tensor(gain["values"], dtype=torch.float64)
    ratio = float(values.mean() / (values.std() / len(values) ** 0.5))
    return float(2 * student_t.sf(abs(ratio), len(values) - 1))


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    arm = told["arms"]
    line = ", ".join(f"{name} {shown(arm[name])}" for name in (PLAIN, MAPS, SOFT, BOTH, BARE))
    text = f"CIFAR-10 at 16 pixels, {PICTURES:,} pictures, {SEEDS} seeds: accuracy by {line} %"
    return {"attention_transfer": [text, *unseen(told["claims"])]}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "attention_transfer.json")
    runs = [ledger.once(f"seed {s}", lambda s=s: arms(s)) for s in range(SEEDS)]
    told = by_name(runs)
    gains = {
        "maps over labels": apart(runs, MAPS, PLAIN),
        "maps and [30] over [30]": apart(runs, BOTH, SOFT),
        "maps over [30]": apart(runs, MAPS, SOFT),
        "maps over those not normalised": apart(runs, MAPS, BARE),
        "cosine, maps over labels": apart(runs, f"cosine, {MAPS}", f"cosine, {PLAIN}"),
    }
    over, both = gains["maps over labels"], gains["maps and [30] over [30]"]
    claims = {
        "maps half a point better than labels, p below 0.1": over["mean"] >= 0.5 and chance(over) < 0.1,
        "maps and [30] no more than 0.3 points below [30]": both["mean"] >= -0.3,
        "without normalisation worse, on average": gains["maps over those not normalised"]["mean"] > 0,
        "cosine of held-out maps rises by 0.2": gains["cosine, maps over labels"]["mean"] >= 0.2,
    }
    scores = [[name, shown(told[name])] for name in ("the teacher", PLAIN, MAPS, SOFT, BOTH, BARE)]
    cosines = [[name, shown(told[f"cosine, {name}"])] for name in (PLAIN, MAPS, SOFT, BOTH)]
    text = f"""# Attention transfer (34)

CIFAR-10 at 16 pixels. The teacher is a ResNet-20 trained on 13,500 pictures ({TEACHER_PASSES} passes), the student one
of half the channels on {PICTURES:,} of them, {PASSES} passes in every arm (batches of 32, SGD, rate 0.1, cosine). Maps
of three stages, beta 1000; without normalisation gradients are clipped to a norm of 1, or training diverges at once.
Accuracy on {TEST:,} test pictures in percent, mean and 95 % interval of {SEEDS} seeds.

{table(["taught by", "accuracy, %"], scores)}

Cosine of the student's and the teacher's maps, 500 test pictures:

{table(["taught by", "cosine"], cosines)}

{table(["difference", "seed by seed"], [[name, shown(one)] for name, one in gains.items()])}

{claims_table(claims)}
"""
    values = {"arms": told, "gains": gains, "claims": claims}
    publish("attention_transfer", values, text, measured(values))


if __name__ == "__main__":
    main()
