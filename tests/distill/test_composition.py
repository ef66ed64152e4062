"""The retraining of other techniques under a teacher that they know nothing of: `bench.under(...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from karui.data import Splits
from karui.distill import AttentionTransfer, KnowledgeDistillation
from karui.lowrank import Tucker2
from karui.model import Classification, Model
from karui.sparsify import L1Filters, MagnitudePruning
from karui.technique import Bench, Technique
from karui.train import Adam, Constant, Influence, Moment, Together, Training

STEPS: dict[str, Technique] = {
    "l1_filter_pruning": L1Filters(ratio=0.5, epochs=1),
    "tucker2": Tucker2(ratio=0.3, epochs=1),
    "iterative_magnitude_pruning": MagnitudePruning(keep=0.08, epochs=1),
}
each = pytest.mark.parametrize(
    "step", [pytest.param(step, id=slug, marks=pytest.mark.paper(30)) for slug, step in STEPS.items()]
)


def bench_of(data: Splits, train: Any, seed: int = 0) -> Bench:
    training = Training(epochs=10, batch_size=32, optimizer=Adam(lr=2e-3), schedule=Constant())
    return Bench(train=train, validation=data.validation, test=data.test, training=training, seed=seed)


@pytest.fixture(scope="module")
def dense(digits: Splits) -> Model:
    """A CNN that has seen all digits; it is what is compressed, and the teacher."""
    torch.manual_seed(0)
    layers: Sequence[nn.Module] = (
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    model = Model(nn.Sequential(*layers), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    return bench_of(digits, digits.train).fit(model, epochs=12)


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


class Watch(Influence):
    """Keeps what the parts before it made of the loss."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        plain = nn.functional.cross_entropy(moment.outputs, moment.targets)
        self.losses.append((plain.item(), loss.item()))
        return loss


@each
def test_retraining_runs_under_the_teacher(dense: Model, digits: Splits, step: Technique):
    bench, before, watch = bench_of(digits, Subset(digits.train, range(96))), state(dense), Watch()
    teaching = KnowledgeDistillation(teacher=dense.copy(), weight=1.0).influence(dense, bench)
    plain, taught = step.apply(dense, bench), step.apply(dense, bench.under(Together(teaching, watch)))
    assert watch.losses
    assert all(abs(hard - loss) > 1e-4 for hard, loss in watch.losses), "no label counts at weight 1"
    assert {n: v.shape for n, v in state(taught).items()} == {n: v.shape for n, v in state(plain).items()}
    assert any(not torch.equal(value, state(plain)[name]) for name, value in state(taught).items())
    assert all(torch.equal(value, before[name]) for name, value in state(dense).items())


def test_two_terms_of_distillation_fold_into_one_training(dense: Model, digits: Splits):
    bench, watch = bench_of(digits, Subset(digits.train, range(96))), Watch()
    soft = KnowledgeDistillation(teacher=dense.copy(), weight=0.5).influence(dense, bench)
    maps = AttentionTransfer(teacher=dense.copy(), layers=("5",)).influence(dense, bench)
    start = L1Filters(ratio=0.5, epochs=0).apply(dense, bench)
    fitted = bench.fit(start, epochs=1, influence=Together(soft, maps, watch))
    both = [loss for _, loss in watch.losses]
    watch.losses.clear()
    bench.fit(start, epochs=1, influence=Together(soft, watch))
    assert both[0] > watch.losses[0][1], "the maps add to the soft targets, from the first step"
    assert not any(name.startswith("_") for name, _ in fitted.module.named_modules())
