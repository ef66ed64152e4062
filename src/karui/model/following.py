"""What follows a layer: the normalisation and the ReLU through which its output, and nothing else of it, is used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from karui.model.taps import layer_at
from karui.model.trace import mode_of
from karui.model.value import Model

_RELU = ("relu", "relu_")
# A ReLU and the largest value of a window may change places: both keep the order of numbers.
_PASSING = ("dropout", "max_pool")


@dataclass(frozen=True)
class Following:
    """The function of each channel by which a network goes on from a layer: `relu(scale x + shift)`, or without ReLU.

    Settings:
        scale, shift: of the batch normalisation that alone uses the output, in evaluation mode; None without one.
        relu: whether nothing but a ReLU uses the result, perhaps after dropout or the largest value of a window.
    """

    scale: Float[Tensor, "channels"] | None = None
    shift: Float[Tensor, "channels"] | None = None
    relu: bool = False

    def normalised(self, rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
        """Outputs of the layer, one a row, behind the batch normalisation."""
        if self.scale is None or self.shift is None:
            return rows
        return (rows.double() * self.scale + self.shift).to(rows)

    def describe(self) -> str:
        """In a few words."""
        parts = ["batch normalisation"] * (self.scale is not None) + ["ReLU"] * self.relu
        return " and ".join(parts) or "no ReLU of its own"


@dataclass(frozen=True)
class _Use:
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Uses(TorchFunctionMode):
    """Every function that took tensors and gave some, in order; tensors are kept alive, so that ids are unique."""

    found: list[_Use] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        taken = tuple(id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        made = tuple(t for t in tree_leaves(result) if isinstance(t, Tensor))
        if taken and made:
            name = getattr(func, "__name__", "").partition(".")[0]
            self.found.append(_Use(name, taken, made, args, kwargs))
            self.alive.append((args, kwargs, result))
        return result


def followings(model: Model, paths: Iterable[str]) -> dict[str, Following]:
    """What follows each of these layers, as one run on the example shows it.

    A layer that is called several times, followed by different things, has no one following: it is told as followed by
    nothing. The same holds where the output is used in more than one way, or leaves the network.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> told = followings(Model(net, example=(torch.zeros(1, 3, 8, 8),)), ["0", "3"])
        >>> [one.describe() for one in told.values()]
        ['batch normalisation and ReLU', 'no ReLU of its own']
    """
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            del layer, inputs
            outputs[path].append(output)

        return hook

    layers = {path: layer_at(model.module, path) for path in outputs}
    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad(), mode_of(model.module, training=False), _Uses() as uses:
            results = model.module(*model.example)
    finally:
        for handle in handles:
            handle.remove()
    given = {id(t) for t in tree_leaves(results) if isinstance(t, Tensor)}
    return {
        path: _agreed([_following(tensor, layers[path], uses.found, given) for tensor in tensors])
        for path, tensors in outputs.items()
    }


def _agreed(found: list[Following]) -> Following:
    if not found:
        return Following()
    first = found[0]
    same = all(one.relu == first.relu and _equal(one.scale, first.scale) for one in found)
    return first if same and all(_equal(one.shift, first.shift) for one in found) else Following()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return b is None if a is None else b is not None and torch.equal(a, b)


def _following(tensor: Tensor, layer: nn.Module, uses: list[_Use], given: set[int]) -> Following:
    scale = shift = None
    use = _only(tensor, uses, given)
    channels_second = not isinstance(layer, nn.Linear) or tensor.ndim == 2
    if use is not None and use.name == "batch_norm" and channels_second:
        affine = _affine(*use.args, **use.kwargs)
        if affine is not None:
            (scale, shift), tensor = affine, use.outputs[0]
            use = _only(tensor, uses, given)
    while use is not None and any(name in use.name for name in _PASSING):
        tensor = use.outputs[0]
        use = _only(tensor, uses, given)
    return Following(scale, shift, relu=use is not None and use.name in _RELU)


def _only(tensor: Tensor, uses: list[_Use], given: set[int]) -> _Use | None:
    """The one function that uses a tensor as it is; None if there are several, or the network gives it out."""
    found = [use for use in uses if id(tensor) in use.inputs and not _idle(use)]
    # What a function wrote in place is another value from there on.
    if found and found[0].outputs[0] is tensor:
        return found[0]
    return found[0] if len(found) == 1 and id(tensor) not in given else None


def _idle(use: _Use) -> bool:
    """Dropout in evaluation mode may give back what it was given."""
    return "dropout" in use.name and id(use.outputs[0]) in use.inputs


def _affine(  # noqa: PLR0917  (the order of torch.nn.functional.batch_norm)
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, in float64, of a batch normalisation that uses its running statistics; else None."""
    del input, momentum, cudnn_enabled
    if training or running_mean is None or running_var is None:
        return None
    mean, variance = running_mean.detach().double(), running_var.detach().double()
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias.detach().double()
