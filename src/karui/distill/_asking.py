"""Asking once, before anything is trained: whether a teacher fits the student, and whether there are classes at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from karui.errors import KaruiError, NeedError, require, told
from karui.measuring.inference import inference, tensors_of
from karui.model import Classification, Detection, Model, Regression
from karui.model.importing import told_of

SAME_CLASSES = "A teacher must know the same classes, or give as many numbers."
FIT = (
    "Give a teacher that was made for such inputs, or a function that brings them to its form: teacher=file.py:factory."
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def ask(slug: str, teacher: Model, student: Model) -> Any:
    """What a teacher says of the student's example.

    Raises:
        NeedError: it does not take such inputs.
    """
    device = next((p.device for p in teacher.module.parameters()), torch.device("cpu"))
    inputs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, student.example)
    try:
        with inference(teacher.module) as module:
            return module(*inputs)
    except KaruiError:
        raise
    except Exception as failure:  # the teacher is foreign code and may raise anything
        raise NeedError(
            f"'{slug}': the teacher {_takes(teacher, student)}, and the student is given {_shapes(student.example)}: "
            f"{told_of(failure)}",
            FIT,
        ) from failure


def require_alike(slug: str, said: Any, student: Model, remedy: str) -> None:
    """Refuse answers of another shape than the student's.

    Args:
        slug: of the technique.
        said: what the teacher says of the student's example.
        student: whose outputs are compared.
        remedy: what to do.

    Raises:
        NeedError: naming both shapes.
    """
    with inference(student.module) as module:
        own = module(*student.example)
    alike = [one.shape for one in tensors_of(own)] == [one.shape for one in tensors_of(said)]
    require(alike, f"'{slug}': the student gives {_shapes(own)} and the teacher {_shapes(said)}.", remedy, NeedError)


def require_classes(slug: str, model: Model, remedy: str) -> None:
    """Refuse a model whose outputs are no scores of classes: softened, numbers say nothing.

    A classification's are, with or without positions. Those of a task given by its loss and metric are where they are
    one tensor [batch, classes, ...] of two classes or more.

    Args:
        slug: of the technique.
        model: what is to learn.
        remedy: what to do.

    Raises:
        NeedError: naming the task, or what the model gives.
    """
    if isinstance(model.task, Classification):
        return
    if isinstance(model.task, Regression | Detection):
        given = f"the model's task is {type(model.task).__name__}"
        raise NeedError(f"'{slug}' learns from scores of classes, and {given}.", remedy)
    with inference(model.module) as module:
        said = module(*model.example)
    scores = isinstance(said, Tensor) and said.ndim >= 2 and said.shape[1] >= 2
    given = f"'{slug}' learns from scores of classes [batch, classes, ...], and the model gives {_shapes(said)}."
    require(scores, given, remedy, NeedError)


def _shapes(values: Any) -> str:
    return " and ".join(map(told, tensors_of(values))) or told(values)


def _takes(teacher: Model, student: Model) -> str:
    """What a teacher takes: its own example's shape, or what its first layer says."""
    if _shapes(teacher.example) != _shapes(student.example):
        return f"takes {_shapes(teacher.example)}"
    for path, layer in teacher.module.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            return f"begins with '{path}', which takes {layer.in_channels} channels"
        if isinstance(layer, nn.Linear):
            return f"begins with '{path}', which takes {layer.in_features} numbers"
    return "does not take the inputs"
