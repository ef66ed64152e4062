"""Layers with maps: which ones of two networks correspond, where the user names none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from karui.errors import SettingError, require
from karui.measuring.inference import inference
from karui.model import Model


def sizes_of_outputs(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape, without the batch, that each layer gives for the model's example; in the order in which they end.

    A layer that holds others comes after them; one that is called several times is told as its last call left it.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            del layer, inputs
            shapes.pop(path, None)
            if isinstance(output, Tensor) and output.ndim >= 2:
                shapes[path] = tuple(output.shape[1:])

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in model.module.named_modules() if path]
    try:
        with inference(model.module) as module:
            module(*model.example)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def last_of_each_size(model: Model) -> tuple[str, ...]:
    """The last layer that gives maps of each size in space, largest maps first: the ends of a network's stages.

    Maps of one position say nothing of where the network looks, and are left out.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 1))
        >>> last_of_each_size(Model(net, example=(torch.zeros(1, 1, 8, 8),)))
        ('1', '3')
    """
    last: dict[tuple[int, ...], str] = {}
    for path, shape in sizes_of_outputs(model).items():
        space = shape[1:]
        if space and any(length > 1 for length in space):
            last.pop(space, None)
            last[space] = path
    return tuple(last.values())


def paired_layers(
    slug: str, student: Model, teacher: Model, layers: tuple[str, ...], teacher_layers: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers of student and teacher that belong together: those named, or the ends of their stages.

    Args:
        slug: the technique's name, for errors.
        student: who learns.
        teacher: who teaches.
        layers: paths in the student; empty looks for them.
        teacher_layers: paths in the teacher, in the same order; empty takes the student's paths where the teacher has
            them, and looks for its own otherwise.

    Raises:
        SettingError: the numbers of layers differ, or there are none.
    """
    own = layers or last_of_each_size(student)
    known = {path for path, _ in teacher.module.named_modules()}
    same = bool(layers) and all(path in known for path in own)
    theirs = teacher_layers or (own if same else last_of_each_size(teacher))
    require(len(own) > 0, f"'{slug}': no layer of the student gives maps over space.", _NAME, SettingError)
    require(
        len(own) == len(theirs),
        f"'{slug}': layers of the student ({', '.join(own)}) and of the teacher ({', '.join(theirs)}) do not pair.",
        _NAME,
        SettingError,
    )
    return own, theirs


_NAME = "Name them: layers=(...) in the student, teacher_layers=(...) in the teacher, in the same order."
