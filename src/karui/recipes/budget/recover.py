"""Recovery: fine-tuning a compressed network, with the dense one as its teacher where that has something to teach."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm

from karui.measuring.inference import inference, tensors_of
from karui.model import Note
from karui.recipes.budget.harm import change
from karui.recipes.budget.lesson import teaching
from karui.train import range_test

if TYPE_CHECKING:
    from torch import Tensor

    from karui.model import Model
    from karui.technique import Bench

TRIAL = 24
"""Steps that are timed to tell how many epochs fit into some minutes."""
STEPS = 60
"""Steps of the test for a learning rate."""
SEEN, BATCH = 512, 128
"""Samples that normalisations see anew, and how many at a time."""


def recover(model: Model, dense: Model, bench: Bench, epochs: int, label: str) -> Model:
    """The model trained for so many passes; as it is where nothing can be trained.

    All recoveries draw the same samples, so that what the teacher says is kept (in `bench.checkpoints`, where there is
    such a folder) and serves them all.

    Args:
        model: what was compressed.
        dense: what it was made from; teaches as `lesson` says. Where it has nothing to teach the lineage tells why.
        bench: data and training.
        epochs: passes over the training data.
        label: of the training, for its bar and checkpoint.
    """
    if not epochs or bench.train is None or model.task is None:
        return model
    return bench.fit(model, epochs=epochs, influence=teaching(model, dense, bench, epochs), label=label)


def settled(model: Model, dense: Model, bench: Bench) -> Model:
    """The model with its batch normalisations seen anew on calibration data, where that brings it nearer to the dense.

    For networks that no training follows: its first steps do the same, and harms are judged with it.

    Args:
        model: what was compressed.
        dense: what its outputs are held against.
        bench: calibration data.
    """
    if bench.train is None or not norms_of(model):
        return model
    fresh = model.copy()
    see_anew(fresh, bench)
    nearer = distance(fresh, dense, bench) < distance(model, dense, bench)
    return fresh.evolve(fresh.module, Note("batch normalisations seen anew", {"samples": SEEN})) if nearer else model


def norms_of(model: Model) -> list[_BatchNorm]:
    """The batch normalisations that keep what they have seen."""
    return [n for n in model.module.modules() if isinstance(n, _BatchNorm) and n.track_running_stats]


def see_anew(model: Model, bench: Bench) -> None:
    """Normalisations forget what they have seen, and see calibration data, in place."""
    norms = norms_of(model)
    with inference(model.module) as module:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for inputs in bench.calibration(SEEN, BATCH):
            if len(tensors_of(inputs)[0]) > 1:
                module(*inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def distance(model: Model, dense: Model, bench: Bench) -> float:
    """How far the outputs of a model are from those of the dense one, for a batch of calibration data."""
    inputs = next(iter(bench.calibration(BATCH, BATCH)))

    def told(each: Model) -> list[Tensor]:
        with inference(each.module) as module:
            return tensors_of(module(*inputs))

    return change(told(dense), told(model), model.task)


def rate_for(model: Model, dense: Model, bench: Bench) -> float | None:
    """The learning rate that recovery bears, by a short range test; None where nothing can be trained."""
    if bench.train is None or model.task is None:
        return None
    found = range_test(
        model,
        bench.train,
        training=bench.training,
        influence=teaching(model, dense, replace(bench, checkpoints=None), 0),
        seed=bench.seed,
        steps=STEPS,
        progress=bench.progress,
    )
    return found.rate


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
