"""The mask keeper: pruned weights stay exactly zero while the rest trains.

Momentum, Adam's moments and weight decay would revive a pruned weight or move it in secret. Here its gradient is zeroed
before the optimiser sees it and its value is zeroed again after each step. The masks are buffers of the module, so that
a checkpoint holds them and a resumed training goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from karui.errors import SettingError, did_you_mean, require
from karui.numerics.selection import keep_largest_overall
from karui.train.influence import Influence, Moment

Masks = Mapping[str, Bool[Tensor, "..."]]

SUFFIX = "_survivors"
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def connections(module: nn.Module, skip: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The weights that single-weight pruning may touch: matrices and kernels, by parameter name; a shared one once.

    Biases, normalisations and other vectors are no connections.

    Args:
        module: the network.
        skip: names or shell patterns ("layer3.*") of layers or parameters to leave out, with all that lies inside.

    Raises:
        SettingError: a name in `skip` is nowhere in the network.

    Example:
        >>> list(connections(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), skip=["2"]))
        ['0.weight']
    """
    skip = tuple(skip)
    known = [*dict(module.named_modules()), *dict(module.named_parameters())]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in known):
            did_you_mean(pattern, known, "The layer to skip", SettingError)
    found = {}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        matrix = parameter.ndim >= 2 and parameter.is_floating_point() and "weight" in leaf
        if matrix and not meant(name, skip) and not isinstance(module.get_submodule(owner), _NORMS):
            found[name] = parameter
    return found


def meant(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern means this parameter, its layer, or a module around it.

    Example:
        >>> meant("layer3.0.conv.weight", ["layer3"]), meant("layer3.0.conv.weight", ["layer?.0.bn"])
        (True, False)
    """
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, pattern) for pattern in patterns for path in above)


def zero_masks(module: nn.Module, skip: Iterable[str] = ()) -> dict[str, Bool[Tensor, "..."]]:
    """Masks of what an earlier pruning left, by parameter name: False where a weight is exactly zero.

    Tensors without a zero are not listed, nor those of zeros only (a last layer may start at zero and must train).

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.weight.data = torch.tensor([[0.5, 0.0]])
        >>> zero_masks(net)["weight"].tolist()
        [[True, False]]
    """
    masks = {name: weight.detach() != 0 for name, weight in connections(module, skip).items()}
    return {name: mask for name, mask in masks.items() if mask.any() and not mask.all()}


def masks_by_chance(module: nn.Module, keep: float, seed: int) -> dict[str, Bool[Tensor, "..."]]:
    """Masks of connections drawn by chance over all layers alike: the control that a criterion must beat.

    Args:
        module: the network.
        keep: share of the connections that survive, in (0, 1].
        seed: of the draw.

    Example:
        >>> int(masks_by_chance(nn.Linear(10, 4), keep=0.25, seed=0)["weight"].sum())
        10
    """
    draw = torch.Generator().manual_seed(seed)
    chances = {name: torch.rand(weight.shape, generator=draw) for name, weight in connections(module).items()}
    alive = {name: torch.ones_like(chance, dtype=torch.bool) for name, chance in chances.items()}
    return keep_largest_overall(chances, alive, round(keep * sum(chance.numel() for chance in chances.values())))


@torch.no_grad()
def zero_pruned(module: nn.Module, masks: Masks) -> None:
    """Set what the masks prune to +0.0 in place; the rest keeps every bit.

    (A product with the mask would leave -0.0 in place of negative weights, which packs badly.)
    """
    for name, mask in masks.items():
        module.get_parameter(name).masked_fill_(~mask, 0.0)


def density(masks: Masks) -> float:
    """Share of the masked weights that survive.

    Example:
        >>> density({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        0.25
    """
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / total if total else 1.0


@dataclass(frozen=True, eq=False)
class MaskKeeper(Influence):
    """Keeps pruned weights exactly zero through a training.

    Settings:
        masks: by parameter name, True where a weight survives.

    Relations: two keepers in one training keep what both let live. `zero_masks` reads the masks off a pruned model.

    Example:
        >>> keeper = MaskKeeper({"weight": torch.tensor([[True, False]])})
        >>> net = nn.Linear(2, 1)
        >>> keeper.attach(net)
        >>> net.weight[0, 1].item()
        0.0
        >>> list(keeper.finish(net).state_dict())
        ['weight', 'bias']
    """

    masks: Masks

    def attach(self, module: nn.Module) -> None:
        """Zero what is pruned, put the masks beside their weights, and keep gradients off.

        Raises:
            SettingError: a mask has no parameter of its name and shape.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        for name, mask in self.masks.items():
            require(
                shapes.get(name) == tuple(mask.shape),
                f"A mask of shape {tuple(mask.shape)} is for '{name}', which the model has {_shape(shapes.get(name))}.",
                "Make the masks from this very model.",
                SettingError,
            )
            owner, leaf = _owner(module, name)
            parameter = module.get_parameter(name)
            known = owner._buffers.get(leaf + SUFFIX)  # noqa: SLF001  (no public look-up that may fail)
            here = mask.to(parameter.device, copy=True)
            owner.register_buffer(leaf + SUFFIX, here if known is None else known & here)
            if parameter.requires_grad:
                parameter.register_hook(_Gate(owner, leaf))
        zero_pruned(module, self.held(module))

    def narrow(self, module: nn.Module, masks: Masks) -> None:
        """While a training is under way: what these masks prune is pruned too."""
        for name, mask in masks.items():
            module.get_buffer(name + SUFFIX).logical_and_(mask)
        zero_pruned(module, self.held(module))

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Zero again what decay or momentum may have moved."""
        del moment
        zero_pruned(module, self.held(module))

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the masks off; the weights hold the zeros."""
        zero_pruned(module, self.held(module))
        for name in self.masks:
            owner, leaf = _owner(module, name)
            owner._buffers.pop(leaf + SUFFIX, None)  # noqa: SLF001
            hooks = module.get_parameter(name)._backward_hooks or {}  # noqa: SLF001
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Gate)]:
                del hooks[key]
        return module

    def held(self, module: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
        """The masks as the module holds them, which a checkpoint may have restored."""
        held = dict(module.named_buffers(remove_duplicate=False))
        return {name: held[name + SUFFIX] for name in self.masks if name + SUFFIX in held}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not" if shape is None else f"in shape {shape}"


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


class _Gate:
    """A gradient hook that knows its own kind: taken off without a handle, which would be state of the influence."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        self.owner, self.name = owner, leaf + SUFFIX

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(~self.owner.get_buffer(self.name), 0.0)
