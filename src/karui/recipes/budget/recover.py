"""Recovery: fine-tuning a compressed network, with the dense one as its teacher where the task has soft targets."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from karui.distill import KnowledgeDistillation
from karui.model import Classification

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

TRIAL = 24
"""Steps that are timed to tell how many epochs fit into some minutes."""


def recover(model: Model, dense: Model, bench: Bench, epochs: int, label: str) -> Model:
    """The model trained for so many passes; as it is where nothing can be trained.

    Args:
        model: what was compressed.
        dense: what it was made from; teaches classifiers (survey 30). Other tasks learn from the targets alone.
        bench: data and training.
        epochs: passes over the training data.
        label: of the training, for its bar and checkpoint.
    """
    if not epochs or bench.train is None or model.task is None:
        return model
    influence = None
    if isinstance(model.task, Classification):
        teacher = KnowledgeDistillation(teacher=dense, epochs=epochs)
        influence = teacher.influence(model, bench)
    return bench.fit(model, epochs=epochs, influence=influence, label=label)


def epochs_within(minutes: float, model: Model, bench: Bench) -> int:
    """How many passes of recovery fit into a time, told from a few steps; at least one."""
    from karui.data.splits import take

    if bench.train is None or model.task is None:
        return 0
    import torch

    count = min(len(bench.train), TRIAL * bench.training.batch_size)
    few = replace(bench, train=take(bench.train, torch.arange(count)), checkpoints=None, progress=False)
    recover(model, model.copy(), few, 1, "warm up")
    started = time.perf_counter()
    recover(model, model.copy(), few, 1, "how long a step takes")
    each = (time.perf_counter() - started) / count * len(bench.train)
    return max(1, int(60 * minutes / each))
