"""Factored layers: one linear map written as a chain of standard layers with nothing between them.

A chain has no non-linearity, no normalisation and no bias but the last one, so it is one affine map, and `dense()` says
which: the single standard layer that computes the same. Stride, padding and dilation stay with the factor that sees
space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError, require

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
FUNCTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
NORMS: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class FactoredLinear(nn.Sequential):
    """`Linear(in_features, rank)` without bias, then `Linear(rank, out_features)`.

    Example:
        >>> FactoredLinear(64, 8, 10)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool = True) -> None:
        super().__init__(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias))
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights drawn so that the outputs spread as far as those of one linear layer of torch do at its start.

        The first factor keeps the variance, the last one takes it to where torch's own rule would.
        """
        first, last = self.children()
        assert isinstance(first, nn.Linear)  # noqa: S101  (narrows the type; built so above)
        assert isinstance(last, nn.Linear)  # noqa: S101
        last.reset_parameters()
        nn.init.normal_(first.weight, std=self.in_features**-0.5)
        if last.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(last.bias, -bound, bound)

    def settings(self) -> dict[str, Any]:
        """What `FactoredLinear(**settings)` rebuilds it from."""
        last = self[1]
        assert isinstance(last, nn.Linear)  # noqa: S101  (narrows the type; built so above)
        return {
            "in_features": self.in_features,
            "rank": self.rank,
            "out_features": self.out_features,
            "bias": last.bias is not None,
        }

    def dense(self) -> nn.Linear:
        """The one linear layer that computes the same."""
        first, last = self[0], self[1]
        assert isinstance(first, nn.Linear)  # noqa: S101
        assert isinstance(last, nn.Linear)  # noqa: S101
        layer = nn.Linear(self.in_features, self.out_features, bias=last.bias is not None)
        product = last.weight.double() @ first.weight.double()
        return _fill(layer.to(first.weight), product, last.bias)


class FactoredConv(nn.Sequential):
    """A chain of convolutions in 1, 2 or 3 dimensions of space.

    `stages` holds the settings of each convolution, as `torch.nn.Conv2d` takes them. Only the last may have a bias.

    Example:
        >>> pointwise, spatial = {"in_channels": 8, "out_channels": 2, "kernel_size": 1, "bias": False}, {
        ...     "in_channels": 2, "out_channels": 8, "kernel_size": 3, "padding": 1}
        >>> FactoredConv([pointwise, spatial])(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, stages: Sequence[dict[str, Any]], dimensions: int = 2) -> None:
        convolution = CONVOLUTIONS[dimensions]
        super().__init__(*(convolution(**{key: _untupled(value) for key, value in stage.items()}) for stage in stages))
        self.dimensions = dimensions
        biased = [number for number, stage in enumerate(self.stages[:-1]) if stage.bias is not None]
        require(not biased, f"stage {biased} of a chain has a bias; only the last may have one", error=SurgeryError)
        self.reset_parameters()

    @property
    def stages(self) -> list[Any]:
        """Its convolutions, first to last."""
        return list(self.children())

    def reset_parameters(self) -> None:
        """Weights drawn so that the chain spreads its outputs as far as one convolution of torch does at its start.

        Each stage but the last keeps the variance; torch's own rule would take a third of it at every stage.
        """
        for stage in self.stages:
            stage.reset_parameters()
        for stage in self.stages[:-1]:
            nn.init.normal_(stage.weight, std=stage.weight[0].numel() ** -0.5)

    def settings(self) -> dict[str, Any]:
        """What `FactoredConv(**settings)` rebuilds it from."""
        return {"stages": [conv_settings(stage) for stage in self.stages], "dimensions": self.dimensions}

    def dense(self) -> nn.Module:
        """The one (ungrouped) convolution that computes the same.

        Raises:
            SurgeryError: there is none, since a stage pads along a dimension that an earlier one has blurred.
        """
        kernel, stride, padding = _expanded(self.stages[0]), list(self.stages[0].stride), _padding(self.stages[0])
        for stage in self.stages[1:]:
            padding = _joined(padding, stage, stride, list(kernel.shape[2:]))
            kernel = _TRANSPOSED[self.dimensions](_expanded(stage), kernel, stride=tuple(stride))
            stride = [a * b for a, b in zip(stride, stage.stride, strict=True)]
        last = self.stages[-1]
        modes = {stage.padding_mode for stage in self.stages if any(_pads(stage))} or {"zeros"}
        require(len(modes) == 1, f"a chain pads in more than one way: {sorted(modes)}", error=SurgeryError)
        layer = CONVOLUTIONS[self.dimensions](
            self.stages[0].in_channels,
            last.out_channels,
            tuple(kernel.shape[2:]),  # pyright: ignore[reportArgumentType]
            stride=tuple(stride),  # pyright: ignore[reportArgumentType]
            padding=padding if isinstance(padding, str) else tuple(padding),  # pyright: ignore[reportArgumentType]
            bias=last.bias is not None,
            padding_mode=modes.pop(),
        )
        return _fill(layer.to(last.weight), kernel, last.bias)


class FullMapLinear(nn.Module):
    """A linear layer on a flattened feature map, as a chain of convolutions whose spatial kernel is the whole map.

    Takes `[batch, channels * height * width]` as the linear layer did, and gives `[batch, out_features]`.

    Example:
        >>> core = {"in_channels": 4, "out_channels": 10, "kernel_size": [3, 3]}
        >>> FullMapLinear((4, 3, 3), [core])(torch.zeros(2, 36)).shape
        torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], stages: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.chain = FactoredConv(stages, dimensions=len(self.shape) - 1)

    def settings(self) -> dict[str, Any]:
        """What `FullMapLinear(**settings)` rebuilds it from."""
        return {"shape": list(self.shape), "stages": self.chain.settings()["stages"]}

    def forward(self, flat: Float[Tensor, "batch features"]) -> Float[Tensor, "batch outputs"]:
        """The map restored, the chain, and flat again."""
        return self.chain(flat.unflatten(1, self.shape)).flatten(1)

    def dense(self) -> nn.Linear:
        """The one linear layer that computes the same."""
        conv = self.chain.dense()
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # noqa: S101
        layer = nn.Linear(math.prod(self.shape), conv.out_channels, bias=conv.bias is not None)
        return _fill(layer.to(conv.weight), conv.weight.flatten(1), conv.bias)


def factor_linear(
    linear: nn.Linear,
    left: Float[Tensor, "outputs rank"],
    right: Float[Tensor, "rank inputs"],
    bias: Float[Tensor, "outputs"] | None = None,
) -> FactoredLinear:
    """The factored layer with weight `left right` and the bias of `linear`, or another, in its type, place and mode."""
    bias = linear.bias if bias is None else bias
    layer = FactoredLinear(linear.in_features, left.shape[1], linear.out_features, bias is not None)
    return adopt(layer, linear, (right, left), bias)


def factor_conv(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    core: Float[Tensor, "groups rank_out rank_in *kernel"],
    *,
    inner: Float[Tensor, "groups channels rank_in"] | None = None,
    outer: Float[Tensor, "groups each rank_out"] | None = None,
    bias: Float[Tensor, "filters"] | None = None,
) -> FactoredConv:
    """A channel decomposition of `conv`, group by group: pointwise `inner`, spatial `core`, pointwise `outer`.

    A factor that is not given is left out. The core keeps stride, padding and dilation (a pointwise layer with stride
    would drop positions that the core needs), the last layer the bias, or another one that is given.
    """
    groups, rank_out, rank_in = core.shape[:3]
    spatial = {**conv_settings(conv), "in_channels": groups * rank_in, "out_channels": groups * rank_out, "bias": False}
    ones = [1] * (core.ndim - 3)
    stages, weights = [spatial], [core.flatten(0, 1)]
    if inner is not None:
        stages.insert(0, _pointwise(conv.in_channels, groups * rank_in, groups))
        weights.insert(0, inner.transpose(1, 2).flatten(0, 1).reshape(groups * rank_in, -1, *ones))
    if outer is not None:
        stages.append(_pointwise(groups * rank_out, conv.out_channels, groups))
        weights.append(outer.flatten(0, 1).reshape(conv.out_channels, rank_out, *ones))
    bias = conv.bias if bias is None else bias
    stages[-1]["bias"] = bias is not None
    return adopt(FactoredConv(stages, dimensions=core.ndim - 3), conv, weights, bias)


def factor_full_map(
    linear: nn.Linear,
    shape: tuple[int, ...],
    core: Float[Tensor, "rank_out rank_in *map"],
    *,
    inner: Float[Tensor, "channels rank_in"] | None = None,
    outer: Float[Tensor, "filters rank_out"] | None = None,
) -> FullMapLinear:
    """The same for a linear layer on a flattened map of `shape`, channels first: a convolution over all of it."""
    conv = as_conv(linear, shape)
    chain = factor_conv(
        conv,
        core.unsqueeze(0),
        inner=None if inner is None else inner.unsqueeze(0),
        outer=None if outer is None else outer.unsqueeze(0),
    )
    layer = FullMapLinear(shape, chain.settings()["stages"])
    layer.chain = chain
    return layer.train(linear.training)


def as_conv(linear: nn.Linear, shape: tuple[int, ...]) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A linear layer on a flattened map of `shape` as the convolution whose kernel is the whole map."""
    conv = CONVOLUTIONS[len(shape) - 1](shape[0], linear.out_features, shape[1:], bias=linear.bias is not None)  # pyright: ignore[reportArgumentType]
    conv = _fill(conv.to(linear.weight), linear.weight.reshape(-1, *shape), linear.bias)
    return conv.requires_grad_(linear.weight.requires_grad)


def each_dimension(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """One number for each dimension of space, as torch takes a single one for all of them."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def conv_settings(conv: Any) -> dict[str, Any]:
    """The settings of a convolution as JSON values; its class takes them back as keywords."""
    return {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": list(conv.kernel_size),
        "stride": list(conv.stride),
        "padding": conv.padding if isinstance(conv.padding, str) else list(conv.padding),
        "dilation": list(conv.dilation),
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
    }


def _pointwise(inputs: int, outputs: int, groups: int) -> dict[str, Any]:
    return {"in_channels": inputs, "out_channels": outputs, "kernel_size": 1, "groups": groups, "bias": False}


def _untupled(value: Any) -> Any:
    """JSON has lists where torch wants tuples."""
    return tuple(value) if isinstance(value, list) else value


def adopt(layer: Any, old: Any, weights: Sequence[Tensor], bias: Tensor | None) -> Any:
    """Give a chain its weights and bias, and the old layer's type, device, frozenness and mode."""
    stages = list(layer.children())
    layer.to(old.weight)
    with torch.no_grad():
        for stage, weight in zip(stages, weights, strict=True):
            stage.weight.copy_(weight)
        if bias is not None:
            stages[-1].bias.copy_(bias)
    layer.requires_grad_(old.weight.requires_grad)
    return layer.train(old.training)


def _fill(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _expanded(conv: Any) -> Float[Tensor, "filters channels *kernel"]:
    """The kernel of a grouped, dilated convolution as a full one: blocks on the diagonal, zeros between the taps."""
    each, channels = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    size = [dilation * (taps - 1) + 1 for dilation, taps in zip(conv.dilation, conv.kernel_size, strict=True)]
    kernel = torch.zeros(conv.out_channels, conv.in_channels, *size, dtype=torch.float64, device=conv.weight.device)
    taps = tuple(slice(None, None, dilation) for dilation in conv.dilation)
    for group in range(conv.groups):
        rows, columns = slice(group * each, (group + 1) * each), slice(group * channels, (group + 1) * channels)
        kernel[(rows, columns, *taps)] = conv.weight.detach()[rows].double()
    return kernel


def _pads(conv: Any) -> list[bool]:
    padding = _padding(conv)
    return [True] if isinstance(padding, str) else [amount != 0 for amount in padding]


def _padding(conv: Any) -> list[int] | str:
    """Padding at each side; "same" of a kernel of one tap, and "valid", are none."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    nothing = conv.padding == "valid" or all(taps == 1 for taps in conv.kernel_size)
    return [0] * len(conv.kernel_size) if nothing else conv.padding


def _joined(before: list[int] | str, stage: Any, stride: list[int], seen: list[int]) -> list[int] | str:
    """Padding of the stages before and of this one as that of a single layer; `seen` is the kernel so far.

    The later padding counts in steps of the earlier stride. It puts zeros (or copies) where the single layer would
    still see part of the input if an earlier kernel had looked along that dimension: then there is no single layer.
    """
    after = _padding(stage)
    if not isinstance(before, str) and not isinstance(after, str):
        pads = zip(stride, after, strict=True)
        plain = stage.padding_mode == "zeros" or all(step == 1 or not amount for step, amount in pads)
        fits = plain and all(taps == 1 or not amount for taps, amount in zip(seen, after, strict=True))
        require(fits, "a stage of the chain pads what an earlier one has blurred or subsampled", error=SurgeryError)
        return [a + step * b for a, b, step in zip(before, after, stride, strict=True)]
    if before == after and all(1 in pair for pair in zip(seen, stage.kernel_size, strict=True)):
        require(max(stride) == 1, f"a chain pads '{before}' behind a stride", error=SurgeryError)
        return before
    named, other = (before, after) if isinstance(before, str) else (after, before)
    pointwise = seen if isinstance(after, str) else list(stage.kernel_size)
    alone = not isinstance(other, str) and not any(other) and max(*pointwise, *stride) == 1
    require(alone, f"a chain that pads '{named}' has more than one stage that sees space", error=SurgeryError)
    return named
