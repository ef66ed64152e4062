"""What reductions and sliding windows say of the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from karui.model.rules import Call, pointwise, rule, tensors_in

if TYPE_CHECKING:
    from karui.model.trace import Tracer

WEIGHT_NORM = "the norm that a weight is divided by counts it"


def axes_of(dim: Any, ndim: int) -> list[int]:
    """A dimension argument as a list of non-negative dimensions; none given means all."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    return [d % max(ndim, 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def reduced(tracer: Tracer, call: Call, say: Callable[[np.ndarray], None]) -> None:
    """Take dimensions away, saying something of their labels."""
    source = tracer.value(call.args[0])
    over = axes_of(call.get("dim"), call.args[0].ndim)
    for d in over:
        say(source.dims[d])
    for out in tensors_in(call.result):
        if not isinstance(out, Tensor):
            continue
        if out.ndim == len(source.dims):
            one = tracer.labels.fixed(1, "")
            tracer.set(out, tuple(one if k in over else d for k, d in enumerate(source.dims)))
        else:
            tracer.set(out, tuple(d for k, d in enumerate(source.dims) if k not in over))


@rule("sum linalg_vector_norm norm nansum")
def total(tracer: Tracer, call: Call) -> None:
    """A sum: an index that is zero may as well not be there. But what is left of a weight has another norm."""
    if "norm" in call.name and not tracer.value(call.args[0]).data:
        reduced(tracer, call, lambda d: tracer.labels.normalised(d, WEIGHT_NORM))
    else:
        reduced(tracer, call, lambda _: None)


@rule("mean var std var_mean std_mean")
def average(tracer: Tracer, call: Call) -> None:
    """A statistic counts its indices."""
    name = call.name
    reduced(tracer, call, lambda d: tracer.labels.normalised(d, f"{name} counts it"))


@rule("amax amin max min argmax argmin any all prod logsumexp median mode nanmedian aminmax kthvalue")
def extremum(tracer: Tracer, call: Call) -> None:
    """An extremum over cut indices is another one than over zeros."""
    name = call.name
    inputs = [t for t in tensors_in(call.args) if isinstance(t, Tensor)]
    if len(inputs) > 1:
        pointwise(tracer, call)
    else:
        reduced(tracer, call, lambda d: tracer.labels.lock(d, f"{name} is taken over it"))


@rule(
    "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod logcumsumexp sort topk cummax "
    "cummin argsort"
)
def along(tracer: Tracer, call: Call) -> None:
    """All indices of one dimension have a say in each: they stay. The other dimensions pass."""
    source = tracer.value(call.args[0])
    name = call.name
    if call.args[0].ndim == 0:
        tracer.set(call.result, ())
        return
    dim = call.get("dim", -1) % call.args[0].ndim
    tracer.labels.lock(source.dims[dim], f"{name} runs over it")
    for out in tensors_in(call.result):
        if isinstance(out, Tensor):
            ends = tracer.labels.fixed(out.shape[dim], f"{name} runs over it")
            tracer.set(out, tuple(ends if k == dim else d for k, d in enumerate(source.dims)))


def spatial(tracer: Tracer, tensor: Tensor, result: Any, kept: int, what: str) -> None:
    """The first `kept` dimensions pass; the others are mixed by position, and stay."""
    source = tracer.value(tensor)
    for d in source.dims[kept:]:
        tracer.labels.lock(d, f"{what} runs over it")
    for out in tensors_in(result):
        if isinstance(out, Tensor):
            rest = tuple(tracer.labels.fixed(n, f"{what} runs over it") for n in out.shape[kept:])
            tracer.set(out, (*source.dims[:kept], *rest))


def _windows(name: str) -> int:
    return next((k for k in (3, 2, 1) if f"{k}d" in name), 2)


@rule(
    "max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d adaptive_max_pool1d mkldnn_max_pool2d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d max_pool1d_with_indices "
    "fractional_max_pool2d"
)
def window(tracer: Tracer, call: Call) -> None:
    """Pooling, resizing, padding: channels pass."""
    name = call.name
    tensor = call.args[0]
    where = _windows(name) if "linear" not in name else int(name[name.index("d") - 1 :][0])
    spatial(tracer, tensor, call.result, tensor.ndim - where, name)


@rule("grid_sampler_2d grid_sampler_3d")
def sample(tracer: Tracer, call: Call) -> None:
    """Reading at positions: channels pass."""
    for labels in tracer.value(call.args[1]).dims:
        tracer.labels.lock(labels, "it holds positions")
    spatial(tracer, call.args[0], call.result, 2, call.name)
