"""What contractions and normalisations say of the labels.

The contracted index of both operands merges; the free indices pass to the output. A grouped convolution is a grid:
its channels are (group, channel within the group).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from karui.model.rules import Call, broadcast, rule, tensors_in

SPECTRAL = "the spectral norm that a weight is divided by counts it"
SHARED = "several query heads share one of keys and values"

if TYPE_CHECKING:
    from karui.model.trace import Tracer, Value


def passes(tracer: Tracer, value: Value, labels: np.ndarray) -> None:
    """A weight's labels go to the output: it produces these units."""
    if value.origin:
        tracer.trace.produced.setdefault(value.origin, []).append(labels)


def sums(tracer: Tracer, value: Value, labels: np.ndarray) -> None:
    """A weight's labels are summed over: it consumes these units."""
    if value.origin:
        tracer.trace.consumed.setdefault(value.origin, []).append(labels)


def product(tracer: Tracer, one: Tensor, other: Tensor, result: Tensor) -> None:
    """A matrix product [..., n, k] [..., k, m] of operands with equal leading dimensions (or none)."""
    a, b = tracer.value(one), tracer.value(other)
    inner = -2 if other.ndim > 1 else -1
    tracer.labels.merge(a.dims[-1], b.dims[inner])
    for value, free, contracted in (
        (a, a.dims[-2:-1], a.dims[-1]),
        (b, b.dims[-1:] if other.ndim > 1 else (), b.dims[inner]),
    ):
        sums(tracer, value, contracted)
        for labels in free:
            passes(tracer, value, labels)
    lead = broadcast(
        tracer, [(a.dims[:-2], one.shape[:-2]), (b.dims[:-2], other.shape[:-2])], result.shape[: max(one.ndim - 2, 0)]
    )
    tracer.set(result, (*lead, *a.dims[-2:-1], *(b.dims[-1:] if other.ndim > 1 else ())))


@rule("mm bmm")
def matmul(tracer: Tracer, call: Call) -> None:
    """Plain matrix products."""
    product(tracer, call.args[0], call.args[1], call.result)


@rule("mv dot vdot")
def vector(tracer: Tracer, call: Call) -> None:
    """Products with a vector. Of weights with a buffer they make a spectral norm: what is left has another one."""
    one, other = call.args[0], call.args[1]
    values = [tracer.value(one), tracer.value(other)]
    buffer = any(v.origin and not isinstance(t, nn.Parameter) for v, t in zip(values, (one, other), strict=True))
    if buffer and not any(value.data for value in values):
        tracer.labels.normalised(values[0].dims[-1], SPECTRAL)
    product(tracer, one, other, call.result)


@rule("addmm baddbmm addmv addbmm_")
def add_matmul(tracer: Tracer, call: Call) -> None:
    """A matrix product with something added."""
    product(tracer, call.args[1], call.args[2], call.result)
    dims = tracer.value(call.result).dims
    merged = broadcast(
        tracer, [(dims, call.result.shape), (tracer.value(call.args[0]).dims, call.args[0].shape)], call.result.shape
    )
    tracer.set(call.result, merged)


@rule("linear mkldnn_linear")
def linear(tracer: Tracer, call: Call) -> None:
    """[..., in] times [out, in] transposed."""
    x, w = tracer.value(call.args[0]), tracer.value(call.args[1])
    tracer.labels.merge(x.dims[-1], w.dims[1])
    sums(tracer, w, w.dims[1])
    passes(tracer, w, w.dims[0])
    bias = call.get("bias")
    if bias is not None:
        tracer.labels.merge(w.dims[0], tracer.value(bias).dims[0])
    tracer.set(call.result, (*x.dims[:-1], w.dims[0]))


@rule("embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    """Rows are looked up; the width passes."""
    table = tracer.value(call.args[0])
    tracer.labels.lock(table.dims[0], "it is looked up by index")
    passes(tracer, table, table.dims[1])
    tracer.set(call.result, (*tracer.value(call.args[1]).dims, table.dims[1]))


@rule("convolution _convolution mkldnn_convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Channels contract with the weight's; positions are mixed, and stay."""
    x, w = tracer.value(call.args[0]), tracer.value(call.args[1])
    place = call.args[0].ndim - (call.args[1].ndim - 1)
    groups = call.get("groups")
    reason = "a convolution runs over it"
    for d in (*x.dims[place + 1 :], *w.dims[2:]):
        tracer.labels.lock(d, reason)
    if call.get("transposed"):
        source, out = w.dims[0], _transposed(tracer, x.dims[place], w.dims, groups)
    else:
        source, out = w.dims[1], _direct(tracer, x.dims[place], w.dims, groups)
    sums(tracer, w, source if groups == 1 else x.dims[place])
    passes(tracer, w, out)
    if groups > 1 and w.origin:
        channels = tracer.trace.counts
        channels.append((w.origin, "in_channels", x.dims[place]))
        channels.append((w.origin, "out_channels", out))
    bias = call.get("bias")
    if bias is not None:
        tracer.labels.merge(out, tracer.value(bias).dims[0])
    rest = tuple(tracer.labels.fixed(n, reason) for n in call.result.shape[place + 1 :])
    tracer.set(call.result, (*x.dims[:place], out, *rest))


def _direct(tracer: Tracer, channels: np.ndarray, weight: Sequence[np.ndarray], groups: int) -> np.ndarray:
    """Labels of the output channels of a weight [out, in / groups, ...]."""
    out, inner = weight[0], weight[1]
    if groups == 1:
        tracer.labels.merge(channels, inner)
    elif groups == len(channels) == len(out):
        tracer.labels.merge(channels, out)
    else:
        group = tracer.labels.fresh(groups)
        _grid(tracer, channels, group, inner)
        _grid(tracer, out, group, tracer.labels.fresh(len(out) // groups))
    return out


def _transposed(tracer: Tracer, channels: np.ndarray, weight: Sequence[np.ndarray], groups: int) -> np.ndarray:
    """Labels of the output channels of a weight [in, out / groups, ...]."""
    tracer.labels.merge(channels, weight[0])
    if groups == 1:
        return weight[1]
    group = tracer.labels.fresh(groups)
    _grid(tracer, channels, group, tracer.labels.fresh(len(channels) // groups))
    return tracer.labels.fold([group, weight[1]])


def _grid(tracer: Tracer, target: np.ndarray, group: np.ndarray, each: np.ndarray) -> None:
    if len(each) == 1:
        tracer.labels.merge(target, group)
    else:
        tracer.labels.grid(target, [group, each])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math_for_mps"
)
def attention(tracer: Tracer, call: Call) -> None:
    """Queries [..., n, e] with keys [..., m, e], then values [..., m, v]; softmax over m."""
    q, k, v = (tracer.value(t).dims for t in call.args[:3])
    tracer.labels.merge(q[-1], k[-1])
    tracer.labels.merge(k[-2], v[-2])
    for heads in zip(q[:-2], k[:-2], v[:-2], strict=True):
        for other in heads[1:]:
            if len(other) == len(heads[0]):
                tracer.labels.merge(heads[0], other)
            elif len(other) > 1:
                tracer.labels.lock(heads[0], SHARED)
                tracer.labels.lock(other, SHARED)
    tracer.labels.lock(k[-2], "softmax runs over it")
    mask = call.get("attn_mask")
    if mask is None:
        mask = call.get("attn_bias")
    if mask is not None:
        scores = (*q[:-1], k[-2])
        broadcast(
            tracer,
            [(scores, [len(d) for d in scores]), (tracer.value(mask).dims, mask.shape)],
            [len(d) for d in scores],
        )
    tracer.set(call.result[0], (*q[:-1], v[-1]))
    for other in tensors_in(call.result[1:]):
        if isinstance(other, Tensor):
            tracer.set(
                other,
                q[: other.ndim]
                if other.shape == call.args[0].shape[: other.ndim]
                else tuple(tracer.labels.fixed(n, "a fused attention made it") for n in other.shape),
            )


@rule("mkldnn_rnn_layer")
def rnn_layer(tracer: Tracer, call: Call) -> None:
    """One layer of an LSTM: gates [4, hidden] stacked in each weight."""
    x, first, second, b1, b2, hx, cx = (tracer.value(t) for t in call.args[:7])
    hidden = len(second.dims[1])
    units = second.dims[1]
    tracer.labels.merge(x.dims[-1], first.dims[1])
    sums(tracer, first, first.dims[1])
    sums(tracer, second, units)
    gates = len(first.dims[0]) // hidden
    for value in (first, second, b1, b2):
        if len(value.dims[0]) == gates * hidden:
            tracer.labels.merge(value.dims[0], np.tile(units, gates))
    passes(tracer, first, first.dims[0])
    passes(tracer, second, second.dims[0])
    for state in (hx, cx):
        tracer.labels.merge(state.dims[-1], units)
    tracer.set(call.result[0], (*x.dims[:-1], units))
    tracer.set(call.result[1], (*hx.dims[:-1], units))
    tracer.set(call.result[2], (*cx.dims[:-1], units))
    if call.result[3] is not None:
        tracer.set(call.result[3], tuple(tracer.labels.fixed(n, "scratch memory") for n in call.result[3].shape))


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update miopen_batch_norm"
)
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Each channel by itself; with the batch's statistics, every other dimension is counted."""
    x = tracer.value(call.args[0])
    channel = x.dims[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        given = call.get(name)
        if given is not None:
            tracer.labels.merge(channel, tracer.value(given).dims[0])
    if call.get("training", False) or call.get("running_mean") is None:
        for k, d in enumerate(x.dims):
            if k != 1:
                tracer.labels.normalised(d, "a batch statistic counts it")
    for place, out in enumerate(tensors_in(call.result)):
        if isinstance(out, Tensor):
            tracer.set(
                out,
                x.dims
                if place == 0
                else (channel,)
                if out.shape == call.args[0].shape[1:2]
                else tuple(tracer.labels.fixed(n, "scratch memory") for n in out.shape),
            )


@rule("native_layer_norm _fused_rms_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """Statistics over the last dimensions."""
    x = tracer.value(call.args[0])
    kept = call.args[0].ndim - len(call.get("normalized_shape"))
    for name in ("weight", "bias"):
        given = call.get(name)
        if given is not None:
            for one, other in zip(x.dims[kept:], tracer.value(given).dims, strict=True):
                tracer.labels.merge(one, other)
    for d in x.dims[kept:]:
        tracer.labels.normalised(d, "layer normalisation counts it")
    one = tracer.labels.fixed(1, "")
    for place, out in enumerate(tensors_in(call.result)):
        tracer.set(out, x.dims if place == 0 else (*x.dims[:kept], *[one] * (out.ndim - kept)))


@rule("native_group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """Statistics over the channels of each group."""
    x = tracer.value(call.args[0])
    channel, groups = x.dims[1], call.get("group")
    for name in ("weight", "bias"):
        given = call.get(name)
        if given is not None:
            tracer.labels.merge(channel, tracer.value(given).dims[0])
    if groups == 1:
        tracer.labels.normalised(channel, "group normalisation counts it")
        group = tracer.labels.fixed(1, "")
    elif groups == len(channel):
        group = channel
    else:
        group, each = tracer.labels.unfold(channel, [groups, len(channel) // groups])
        tracer.labels.normalised(each, "group normalisation counts it")
    weight = call.get("weight")
    if weight is not None and tracer.value(weight).origin:
        tracer.trace.counts.append((tracer.value(weight).origin, "num_groups", group))
    for d in x.dims[2:]:
        tracer.labels.normalised(d, "group normalisation counts it")
    for place, out in enumerate(tensors_in(call.result)):
        tracer.set(out, x.dims if place == 0 else (x.dims[0], group))
