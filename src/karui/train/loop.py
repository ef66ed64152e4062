"""The one training loop: `fit`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karui.data import Batches
from karui.errors import NeedError, TrainingError, require
from karui.model import Model, Note, copied
from karui.train.checkpoint import read, restore
from karui.train.fingerprint import fingerprint
from karui.train.influence import Influence
from karui.train.launch import launch
from karui.train.randomness import reseed, undisturbed
from karui.train.run import Job, Run
from karui.train.training import Training
from karui.train.turn import Turn

REMARK = "remark on"
"""Marks notes of what acted on a training; its value is the training's label."""


def fit(
    model: Model,
    train: Any,
    *,
    training: Training | None = None,
    seed: int = 0,
    influence: Influence | None = None,
    turns: tuple[Turn, ...] | None = None,
    checkpoints: Path | None = None,
    label: str = "train",
    progress: bool = False,
) -> Model:
    """A trained copy of a model, in evaluation mode. The lineage gets a note with settings, seed and learning curve.

    Before it come notes of what the influence and the turns have to say, such as whether a teacher's answers are kept.

    The same arguments give the same weights, bit for bit, also when a run was killed and called again with the same
    `checkpoints`: it goes on from the last checkpoint. The global random generators are left as they were.

    Args:
        model: what to train; left as it is.
        train: data set of (input, target) pairs.
        training: how; by default `Training()`.
        seed: fixes the order of samples, augmentation, dropout and all else that is random.
        influence: what acts while the model trains.
        turns: parts of a step, each with parameters, objective and data of its own; by default one, ordinary training.
        checkpoints: folder for checkpoints; None keeps none.
        label: what the progress bar, the checkpoint and the note call this training.
        progress: whether a bar is shown (on a terminal only).

    Raises:
        NeedError: there is no data, or no task to take a loss from.
        TrainingError: the loss stopped being finite (the last good state is kept in the checkpoint), nothing can be
            trained, or a checkpoint is damaged.
        SettingError: the machine has no such device.
        UsageError: the influence taps a layer that is not there.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from karui.model import Regression
        >>> data = TensorDataset(torch.linspace(-1, 1, 64)[:, None], torch.linspace(-2, 2, 64)[:, None])
        >>> model = Model(nn.Linear(1, 1), example=(torch.zeros(1, 1),), task=Regression())
        >>> trained = fit(model, data, training=Training(epochs=30, batch_size=16))
        >>> round(trained.module.weight.item(), 1)
        2.0
    """
    training = training or Training()
    influence = influence or Influence()
    require(train is not None, "There is no training data.", "Give a data set of (input, target) pairs.", NeedError)
    batches = Batches(train)
    require(len(batches) > 0, "The training data has no samples.", "Give a data set that is not empty.", TrainingError)
    with undisturbed(), tempfile.TemporaryDirectory(prefix="karui-") as scratch:
        module = copied(model.module)
        reseed(seed, "attach")
        influence.attach(module)
        parts = turns or (Turn(),)
        file = None
        if checkpoints is not None:
            decisive = replace(training, checkpoint_seconds=0.0)  # how often it is written changes no outcome
            file = checkpoints / _name(label, module, model.task, train, decisive, seed, influence, parts)
        job = Job(
            module=module,
            task=model.task,
            batches=batches,
            training=training,
            seed=seed,
            influence=influence,
            turns=parts,
            checkpoint=file,
            outcome=Path(scratch) / "outcome.safetensors",
            label=label,
            progress=progress,
        )
        if training.channels_last:
            _lay_out(module, torch.channels_last)
        facts = _trained(job)
        if training.channels_last:
            _lay_out(module, torch.contiguous_format)  # files and surgery take tensors as they stand
        module = influence.finish(module)
    settings = {"label": label, "seed": seed, "samples": len(batches), "training": training.to_json(), **facts}
    lines = dict.fromkeys(line for one in (influence, *parts) for line in one.remarks)
    for line in lines:
        model = model.evolve(module, Note(line, {REMARK: label}))
    return model.evolve(module.eval(), Note(f"trained for {_epochs(training)} ({label})", settings))


def _lay_out(module: nn.Module, order: torch.memory_format) -> None:
    """Filters in another order of memory: a convolution computes in that of its weight, and passes it on."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)


def _name(label: str, *decisive: Any) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in label)
    return f"{plain}-{fingerprint(label, *decisive)}.safetensors"


def _epochs(training: Training) -> str:
    return f"{training.epochs} epoch{'' if training.epochs == 1 else 's'}"


def _trained(job: Job) -> dict[str, Any]:
    """Train the job's module in place, wherever its settings say; its learning curve and what else is to be told."""
    run = Run(job)
    here = launch(job.training, run, unused=len(job.turns) > 1 or type(job.influence) is not Influence)
    if not here:
        tensors, facts = read(job.outcome)
        restore(tensors, job.module)
        return facts
    return run.facts()
