"""What a structured pruning may touch, and how much of each group: `Scope` and `Quota`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from karui.errors import SettingError, did_you_mean, require
from karui.model import layer_at, taps
from karui.technique.pruning.selection import removed_count

if TYPE_CHECKING:
    from karui.model import Analysis, Group, Model

MapSize = tuple[int, ...]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Pruning(Protocol):
    """The settings that a technique that cuts units has in common with the others; see `Scope` and `Quota`."""

    @property
    def ratio(self) -> float:
        """Share of the units cut in each group."""
        ...

    @property
    def ratios(self) -> Mapping[str, float]:
        """Shares of single layers."""
        ...

    @property
    def multiple(self) -> int:
        """What is kept is a multiple of this."""
        ...

    @property
    def skip(self) -> tuple[str, ...]:
        """Layers left whole."""
        ...

    @property
    def tied(self) -> bool:
        """Whether tied groups are cut."""
        ...

    @property
    def linear(self) -> bool:
        """Whether other layers than convolutions are cut."""
        ...

    @property
    def allow_normalisation(self) -> bool:
        """Whether groups that a normalisation mixes are cut."""
        ...


def layer_of(tensor: str) -> str:
    """Path of the layer that owns a parameter: `layer1.0.conv1` for `layer1.0.conv1.weight`."""
    return tensor.rpartition(".")[0]


def layers_of(group: Group) -> tuple[str, ...]:
    """Paths of the layers that make the group's units, once each."""
    return tuple(dict.fromkeys(layer_of(name) for name in group.sources))


@torch.no_grad()
def map_sizes(model: Model) -> dict[str, MapSize]:
    """The size of the maps that each layer makes of the example, without batch and channels: () for features."""
    working = model.copy().module.eval()
    paths = [path for path, layer in working.named_modules() if isinstance(layer, (*_CONVOLUTIONS, nn.Linear))]
    with taps(working, paths) as seen:
        working(*model.example)
    features = {path for path in seen if isinstance(working.get_submodule(path), nn.Linear)}
    return {path: () if path in features else tuple(value.shape[2:]) for path, value in seen.items()}


def makers(group: Group, sizes: Mapping[str, MapSize]) -> tuple[str, ...]:
    """The layers that write into the group's maps at full size; a gate, which only scales whole maps, is none.

    Of a squeeze-excite block that is the convolution, not the layer that makes the gate.
    """
    paths = layers_of(group)
    largest = max((math.prod(sizes.get(path, ())) for path in paths), default=0)
    return tuple(path for path in paths if math.prod(sizes.get(path, ())) == largest)


def projection(group: Group, analysis: Analysis, module: nn.Module) -> str | None:
    """The weight of the projection on the shortcut of a tied group, if it can be told.

    It is the 1x1 convolution that reads what other layers read too (the block's input); the layers on the branch read
    maps of their own.
    """
    readers: dict[str, set[str]] = {}
    for other in analysis.groups:
        mine = {layer_of(member.tensor) for member in other.members if member.role == "in"}
        for path in mine:
            readers.setdefault(path, set()).update(mine)
    layers = dict(module.named_modules())
    found = [
        name
        for name in group.sources
        if isinstance(layer := layers.get(layer_of(name)), _CONVOLUTIONS)
        and max(layer.kernel_size) == 1
        and len(readers.get(layer_of(name), ())) > 1
    ]
    return found[0] if len(found) == 1 else None


def judged(group: Group, analysis: Analysis, module: nn.Module, sizes: Mapping[str, MapSize]) -> Group:
    """The group with the sources that it is scored by.

    Those are the weights of its makers; where several layers are tied and one is a projection, the projection's alone.
    """
    paths = makers(group, sizes)
    chosen = projection(group, analysis, module) if len(paths) > 1 else None
    kept = (chosen,) if chosen else tuple(name for name in group.sources if layer_of(name) in paths)
    return replace(group, sources=kept)


def matches(group: Group, pattern: str) -> bool:
    """Whether a name or shell pattern means this group, or a layer that makes its units."""
    return any(fnmatchcase(path, pattern) for path in (group.name, *layers_of(group)))


def check_patterns(patterns: Sequence[str], groups: Sequence[Group], what: str) -> None:
    """Refuse a pattern that names no group, with the closest names.

    Raises:
        SettingError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(matches(group, pattern) for group in groups):
            did_you_mean(pattern, [path for group in groups for path in layers_of(group)], what, SettingError)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which coupled groups may be cut.

    Settings:
        skip: names of groups or layers left whole, or shell patterns of them ("layer3.*").
        tied: whether groups that several layers write into (a shortcut's) are cut too.
        linear: whether units of other layers than convolutions are cut too.
        allow_normalisation: whether groups are cut that a normalisation across channels mixes.
    """

    skip: tuple[str, ...] = ()
    tied: bool = False
    linear: bool = True
    allow_normalisation: bool = False

    @classmethod
    def of(cls, settings: Pruning) -> Scope:
        """The scope that a technique's settings say."""
        return cls(
            skip=tuple(settings.skip),
            tied=settings.tied,
            linear=settings.linear,
            allow_normalisation=settings.allow_normalisation,
        )

    def refusal(self, group: Group, module: nn.Module, sizes: Mapping[str, MapSize]) -> str:
        """Why the group is left whole; empty where it may be cut."""
        paths = makers(group, sizes)
        if any(matches(group, pattern) for pattern in self.skip):
            return "skipped by the settings"
        if not paths:
            return "no weight makes its units"
        if len(paths) > 1 and not self.tied:
            return f"{len(paths)} layers write into the same maps ({', '.join(paths[:4])}); set tied=true"
        if not group.exact and not self.allow_normalisation:
            return f"{group.reason or 'a normalisation mixes its channels'}; set allow_normalisation=true"
        convolution = any(isinstance(layer_at(module, path), _CONVOLUTIONS) for path in paths)
        if not convolution and not self.linear:
            return "no convolution makes its units; set linear=true"
        return ""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How much of each group goes.

    Settings:
        ratio: share of the units cut in each group, in [0, 1).
        ratios: shares of single groups or layers (or shell patterns), which `ratio` then does not touch.
        multiple: what is kept is a multiple of this many units.

    Raises:
        SettingError: a share or the multiple is out of range.
    """

    ratio: float = 0.3
    ratios: Mapping[str, float] = field(default_factory=dict, hash=False)
    multiple: int = 1

    def __post_init__(self) -> None:
        for name, share in (
            ("ratio", self.ratio),
            *((f"ratios['{key}']", value) for key, value in self.ratios.items()),
        ):
            require(0 <= share < 1, f"{name} is {share}; give a share in [0, 1), for example 0.3")
        require(self.multiple >= 1, f"multiple is {self.multiple}; give a whole number of units, 1 or more")

    @classmethod
    def of(cls, settings: Pruning) -> Quota:
        """The quota that a technique's settings say."""
        return cls(ratio=settings.ratio, ratios=settings.ratios, multiple=settings.multiple)

    @property
    def nothing(self) -> bool:
        """Whether every share is 0."""
        return self.ratio == 0 and not any(self.ratios.values())

    def share(self, group: Group) -> float:
        """The share asked of a group; of several patterns that match, the first counts."""
        return next((share for key, share in self.ratios.items() if matches(group, key)), self.ratio)

    def counts(self, groups: Sequence[Group], shares: Mapping[str, float]) -> dict[str, int]:
        """Units to remove of each group that loses any."""
        counts = {group.name: removed_count(group.size, shares[group.name], self.multiple) for group in groups}
        return {name: count for name, count in counts.items() if count}
