"""Layers with maps: which ones of two networks correspond, where the user names none."""

from __future__ import annotations

from karui.distill._layouts import Channels, Layout, layout_at, layouts_of
from karui.errors import SettingError, require
from karui.model import Model


def last_of_each_size(model: Model, channels: Channels = "auto") -> tuple[str, ...]:
    """The last layer that gives maps of each size in space, largest maps first: the ends of a network's stages.

    Maps of one position say nothing of where the network looks, and are left out; so are layers of which it is not
    known which dimension holds their channels (`channels` takes the user's word).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 1))
        >>> last_of_each_size(Model(net, example=(torch.zeros(1, 1, 8, 8),)))
        ('1', '3')
    """
    last: dict[tuple[int, ...], str] = {}
    for path, layout in layouts_of(model, channels).items():
        space = layout.shape[1:]
        if layout.has_map:
            last.pop(space, None)
            last[space] = path
    return tuple(last.values())


def paired_layers(
    slug: str,
    student: Model,
    teacher: Model,
    layers: tuple[str, ...],
    teacher_layers: tuple[str, ...],
    *,
    channels: Channels = "auto",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers of student and teacher that belong together: those named, or the ends of their stages.

    Args:
        slug: the technique's name, for errors.
        student: who learns.
        teacher: who teaches.
        layers: paths in the student; empty looks for them.
        teacher_layers: paths in the teacher, in the same order; empty takes the student's paths where the teacher has
            them, and looks for its own otherwise.
        channels: where they are in the layers' outputs, as the user says.

    Raises:
        SettingError: the numbers of layers differ, or there are none.
    """
    own = layers or last_of_each_size(student, channels)
    known = {path for path, _ in teacher.module.named_modules()}
    same = bool(layers) and all(path in known for path in own)
    theirs = teacher_layers or (own if same else last_of_each_size(teacher, channels))
    require(len(own) > 0, f"'{slug}': no layer of the student gives maps over space.", _NAME, SettingError)
    require(
        len(own) == len(theirs),
        f"'{slug}': layers of the student ({', '.join(own)}) and of the teacher ({', '.join(theirs)}) do not pair.",
        _NAME,
        SettingError,
    )
    return own, theirs


def fitting_maps(
    slug: str, student: Model, teacher: Model, paths: tuple[tuple[str, ...], tuple[str, ...]], channels: Channels
) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    """The layouts of paired layers.

    Args:
        slug: the technique's name, for errors.
        student: who learns.
        teacher: who teaches.
        paths: of both, as `paired_layers` gives them.
        channels: as there.

    Raises:
        UsageError: there is no such layer.
        SettingError: one gives no map, it cannot be known which of its dimensions is which, or two that belong together
            have maps of different dimensions.
    """
    own = tuple(layout_at(slug, student, path, "student", channels, maps=True) for path in paths[0])
    theirs = tuple(layout_at(slug, teacher, path, "teacher", channels, maps=True) for path in paths[1])
    for a, b, path, other in zip(own, theirs, *paths, strict=True):
        require(
            len(a.shape) == len(b.shape),
            f"'{slug}': layer '{path}' of the student gives channels and positions {a.shape}, '{other}' of the teacher "
            f"{b.shape}.",
            "Name layers whose maps have as many dimensions.",
            SettingError,
        )
    return own, theirs


def hint_pair(
    student: Model, teacher: Model, layer: str, teacher_layer: str, channels: Channels = "auto"
) -> tuple[str, str]:
    """The guided layer and the hint layer: those named, or the middle ones (of the teacher's, the nearest that fits).

    Layers of which it is not known where their channels are have to be named.

    Raises:
        SettingError: no pair fits.
    """
    layer = layer or _middle("student", _known(student, channels))
    if teacher_layer:
        return layer, teacher_layer
    theirs = _known(teacher, channels)
    guided = layout_at("fitnets_hint", student, layer, "student", channels).shape
    paths = list(theirs)
    middle = paths.index(_middle("teacher", theirs))
    nearest = sorted(paths, key=lambda path: abs(paths.index(path) - middle))
    for path in nearest:
        space, wanted = guided[1:], theirs[path][1:]
        if len(space) == len(wanted) and all(a >= b for a, b in zip(space, wanted, strict=True)):
            return layer, path
    given = f"the nearest, '{nearest[0]}', gives {theirs[nearest[0]]}"
    raise SettingError(
        f"'fitnets_hint': no layer of the teacher fits the student's '{layer}', which gives shape {guided}: {given}.",
        "Name layer and teacher_layer; maps of the student must be at least as large as the teacher's.",
    )


def _known(model: Model, channels: Channels) -> dict[str, tuple[int, ...]]:
    """By path, channels and positions of the layers where they are known."""
    return {path: layout.shape for path, layout in layouts_of(model, channels).items() if layout.channels}


def _middle(whose: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """The middle one of the layers that give maps over space; of all layers where none does."""
    maps = [path for path, shape in shapes.items() if len(shape) > 1 and max(shape[1:]) > 1] or list(shapes)
    require(
        len(maps) > 0,
        f"'fitnets_hint': no layer of the {whose} gives a tensor of which the channels are known.",
        "Name layer and teacher_layer, and set channels='first' or channels='last'.",
        SettingError,
    )
    return maps[(len(maps) - 1) // 2]


_NAME = "Name them: layers=(...) in the student, teacher_layers=(...) in the teacher, in the same order."
