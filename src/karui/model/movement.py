"""What data movement says of the labels: they move alike.

Views, slices, concatenations and shuffles run on the labels as they run on the data, so that merged qkv, LSTM gates
and nested concatenations come out right by construction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from karui.model.rules import Call, broadcast, rule, tensors_in, unknown

FACTOR = "a pixel shuffle keeps its factor"

if TYPE_CHECKING:
    from karui.model.trace import Tracer


@rule(
    "clone detach alias to _to_copy contiguous lift_fresh lift_fresh_copy zero fill uniform normal random "
    "exponential set_data detach_copy view_as_real_copy positive empty_like zeros_like ones_like "
    "full_like rand_like randn_like bernoulli_ randint_like"
)
def same(tracer: Tracer, call: Call) -> None:
    """The output has the input's labels."""
    if call.result is not call.args[0]:
        source = tracer.value(call.args[0])
        tracer.set(call.result, source.dims, source.origin)


@rule("view _unsafe_view reshape _reshape_alias view_copy _reshape_copy")
def reshape(tracer: Tracer, call: Call) -> None:
    """Folds and splits dimensions; a view of a type keeps them."""
    source = tracer.value(call.args[0])
    if tuple(call.args[0].shape) == tuple(call.result.shape):
        tracer.set(call.result, source.dims, source.origin)
    elif call.args[0].numel() != call.result.numel() or not call.result.numel():
        tracer.set(
            call.result, tuple(tracer.labels.fixed(n, "it is viewed as another type") for n in call.result.shape)
        )
    else:
        tracer.set(call.result, tracer.labels.reshape(source.dims, call.result.shape), source.origin)


@rule("as_strided as_strided_ as_strided_copy")
def restride(tracer: Tracer, call: Call) -> None:
    """Another memory order of the same shape keeps the labels; anything else is unknown."""
    source = tracer.value(call.args[0])
    if [len(d) for d in source.dims] == list(call.result.shape):
        if call.result is not call.args[0]:
            tracer.set(call.result, source.dims, source.origin)
    else:
        unknown(tracer, call)


@rule("permute permute_copy")
def permute(tracer: Tracer, call: Call) -> None:
    """Dimensions in another order."""
    dims = call.get("dims")
    source = tracer.value(call.args[0])
    tracer.set(call.result, tuple(source.dims[d] for d in dims), source.origin)


@rule("t transpose t_copy transpose_copy numpy_T")
def transpose(tracer: Tracer, call: Call) -> None:
    """Two dimensions change places."""
    source = tracer.value(call.args[0])
    dims = list(source.dims)
    if len(dims) > 1:
        one, other = call.get("dim0", 0), call.get("dim1", 1)
        dims[one], dims[other] = dims[other], dims[one]
    tracer.set(call.result, tuple(dims), source.origin)


@rule("unsqueeze squeeze unsqueeze_copy squeeze_copy")
def squeeze(tracer: Tracer, call: Call) -> None:
    """Dimensions of size one come and go."""
    source = tracer.value(call.args[0])
    tracer.set(call.result, tracer.labels.reshape(source.dims, call.result.shape), source.origin)


@rule("expand expand_copy")
def expand(tracer: Tracer, call: Call) -> None:
    """A dimension of one becomes many that are all the same: new indices, free to go."""
    source = tracer.value(call.args[0])
    lead = call.result.ndim - len(source.dims)
    dims = []
    for place, size in enumerate(call.result.shape):
        old = source.dims[place - lead] if place >= lead else None
        dims.append(old if old is not None and len(old) == size else tracer.labels.fresh(size))
    tracer.set(call.result, tuple(dims))


@rule("repeat")
def repeat(tracer: Tracer, call: Call) -> None:
    """Copies lie one after another."""
    source = tracer.value(call.args[0])
    lead = call.result.ndim - len(source.dims)
    dims = []
    for place, times in enumerate(call.args[1]):
        old = source.dims[place - lead] if place >= lead else tracer.labels.fixed(1, "")
        dims.append(tracer.labels.fresh(times) if len(old) == 1 else np.tile(old, times))
    tracer.set(call.result, tuple(dims))


@rule("cat concatenate")
def cat(tracer: Tracer, call: Call) -> None:
    """Labels are concatenated too; those of the other dimensions merge."""
    dim = call.get("dim") % call.result.ndim
    parts = [tracer.value(t).dims for t in call.args[0] if tuple(t.shape) != (0,)]
    dims = list(parts[0])
    for place in range(call.result.ndim):
        if place == dim:
            dims[place] = np.concatenate([p[place] for p in parts])
        else:
            for p in parts[1:]:
                tracer.labels.merge(parts[0][place], p[place])
    tracer.set(call.result, tuple(dims))


@rule("stack")
def stack(tracer: Tracer, call: Call) -> None:
    """A new dimension, one index for each tensor, which all stay."""
    dim = call.get("dim") % call.result.ndim
    first = call.args[0][0]
    dims = list(broadcast(tracer, [(tracer.value(t).dims, t.shape) for t in call.args[0]], first.shape))
    dims.insert(dim, tracer.labels.fixed(len(call.args[0]), "the tensors of a stack keep their number"))
    tracer.set(call.result, tuple(dims))


@rule(
    "split unsafe_split split_with_sizes unsafe_split_with_sizes chunk unsafe_chunk split_copy "
    "split_with_sizes_copy tensor_split"
)
def split(tracer: Tracer, call: Call) -> None:
    """Each part has its part of the labels."""
    source = tracer.value(call.args[0])
    dim = call.get("dim") % call.args[0].ndim
    start = 0
    for part in call.result:
        size = part.shape[dim]
        dims = list(source.dims)
        dims[dim] = dims[dim][start : start + size]
        start += size
        tracer.set(part, tuple(dims), source.origin)


@rule("slice slice_copy")
def slice_(tracer: Tracer, call: Call) -> None:
    """The labels that are kept."""
    source = tracer.value(call.args[0])
    dim = call.get("dim") % call.args[0].ndim
    window = slice(*(call.get(name) for name in ("start", "end", "step")))
    dims = list(source.dims)
    dims[dim] = dims[dim][window]
    tracer.set(call.result, tuple(dims), source.origin)


@rule("select select_copy")
def select(tracer: Tracer, call: Call) -> None:
    """One index, named by its number, must stay; its dimension goes."""
    source = tracer.value(call.args[0])
    dim = call.get("dim") % call.args[0].ndim
    index = call.get("index")
    taken = source.dims[dim]
    tracer.labels.lock(taken[index : index + 1 or None], "it is picked by its number")
    tracer.set(call.result, tuple(d for k, d in enumerate(source.dims) if k != dim), source.origin)


@rule("unbind unbind_copy")
def unbind(tracer: Tracer, call: Call) -> None:
    """Every index becomes a tensor of its own, and must stay."""
    source = tracer.value(call.args[0])
    dim = call.get("dim") % call.args[0].ndim
    tracer.labels.lock(source.dims[dim], "it is picked by its number")
    for part in call.result:
        tracer.set(part, tuple(d for k, d in enumerate(source.dims) if k != dim), source.origin)


@rule("flip roll")
def reorder(tracer: Tracer, call: Call) -> None:
    """The labels are flipped or rolled alike."""
    source = tracer.value(call.args[0])
    dims = list(source.dims)
    over = call.get("dims") or []
    over = over if isinstance(over, (list, tuple)) else [over]
    shifts = call.get("shifts")
    if not over:
        unknown(tracer, call)
        return
    for place, dim in enumerate(over):
        if shifts is None:
            dims[dim] = dims[dim][::-1]
        else:
            tracer.labels.lock(dims[dim], "roll shifts it by a number")
            dims[dim] = np.roll(dims[dim], shifts[place] if isinstance(shifts, (list, tuple)) else shifts)
    tracer.set(call.result, tuple(dims))


@rule("constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> None:
    """Padded indices are new ones, free to go, where the dimension is free; else they stay like the others."""
    widths = call.get("pad")
    dims = list(tracer.value(call.args[0]).dims)
    for place in range(len(widths) // 2):
        left, right = widths[2 * place], widths[2 * place + 1]
        dim = len(dims) - 1 - place
        old = dims[dim]
        if left == right == 0:
            continue
        if old.max(initial=-1) < 0:
            dims[dim] = tracer.labels.fixed(call.result.shape[dim], tracer.labels.reasons[-1 - int(old[0])])
            continue
        old = old[max(-left, 0) : len(old) - max(-right, 0)]
        ends = [_free(tracer, max(width, 0)) for width in (left, right)]
        dims[dim] = np.concatenate([ends[0], old, ends[1]])
    tracer.set(call.result, tuple(dims))


def _free(tracer: Tracer, size: int) -> np.ndarray:
    """Labels that nothing binds, also for a single index (one padded channel may go; others remain)."""
    tracer.labels.count += size
    return np.arange(tracer.labels.count - size, tracer.labels.count)


@rule("full zeros ones empty rand randn new_zeros new_ones new_full new_empty empty_strided new_empty_strided")
def create(tracer: Tracer, call: Call) -> None:
    """A tensor made on the way: its indices are all alike, so free to go."""
    tracer.set(call.result, tuple(tracer.labels.fresh(n) for n in call.result.shape))


@rule("arange linspace logspace eye tril_indices triu_indices scalar_tensor range randperm randint")
def count(tracer: Tracer, call: Call) -> None:
    """A tensor that counts positions: they stay."""
    tracer.set(call.result, tuple(tracer.labels.fixed(n, "its positions are counted") for n in call.result.shape))


@rule("index index_select gather take_along_dim")
def index(tracer: Tracer, call: Call) -> None:
    """Indexing by a tensor: the dimension that is looked up stays, the others pass."""
    source = tracer.value(call.args[0])
    name = call.name
    reason = "it is looked up by index"
    for t in tensors_in(call.args[1:]):
        if isinstance(t, Tensor):
            for labels in tracer.value(t).dims:
                tracer.labels.lock(labels, "it is an index")
    if name == "index":
        places = [k for k, t in enumerate(call.args[1]) if t is not None]
        plain = all(call.args[1][k].dtype != torch.bool for k in places)
        adjacent = plain and places == list(range(places[0], places[-1] + 1))
        if adjacent:
            for k in places:
                tracer.labels.lock(source.dims[k], reason)
            wide = call.result.ndim - (call.args[0].ndim - len(places))
            new = [tracer.labels.fixed(n, reason) for n in call.result.shape[places[0] : places[0] + wide]]
            tracer.set(call.result, (*source.dims[: places[0]], *new, *source.dims[places[-1] + 1 :]))
            return
    elif name == "index_select":
        dim = call.get("dim") % call.args[0].ndim
        tracer.labels.lock(source.dims[dim], reason)
        new = tracer.labels.fixed(call.result.shape[dim], reason)
        tracer.set(call.result, tuple(new if k == dim else d for k, d in enumerate(source.dims)))
        return
    unknown(tracer, call)


@rule("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """[C r r, H, W] becomes [C, H r, W r]."""
    factor = call.args[1]
    *lead, c, h, w = tracer.value(call.args[0]).dims
    channels, rows, columns = tracer.labels.unfold(c, [len(c) // factor**2, factor, factor])
    tracer.labels.lock(rows, FACTOR)
    tracer.labels.lock(columns, FACTOR)
    tracer.set(call.result, (*lead, channels, tracer.labels.fold([h, rows]), tracer.labels.fold([w, columns])))


@rule("pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """[C, H r, W r] becomes [C r r, H, W]."""
    factor = call.args[1]
    *lead, c, h, w = tracer.value(call.args[0]).dims
    high, rows = tracer.labels.unfold(h, [len(h) // factor, factor])
    wide, columns = tracer.labels.unfold(w, [len(w) // factor, factor])
    for labels in (high, wide, rows, columns):
        tracer.labels.lock(labels, FACTOR)
    tracer.set(call.result, (*lead, tracer.labels.fold([c, rows, columns]), high, wide))


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """Channels as a grid [groups, C / groups], transposed."""
    lead, c, *rest = tracer.value(call.args[0]).dims
    groups, each = tracer.labels.unfold(c, [call.args[1], len(c) // call.args[1]])
    tracer.labels.lock(groups, "a channel shuffle keeps its number of groups")
    tracer.set(call.result, (lead, tracer.labels.fold([each, groups]), *rest))


@rule("im2col")
def im2col(tracer: Tracer, call: Call) -> None:
    """Each channel becomes a run of its window's positions."""
    source = tracer.value(call.args[0])
    c = source.dims[-3]
    for d in source.dims[-2:]:
        tracer.labels.lock(d, "im2col runs over it")
    places = tracer.labels.fixed(call.result.shape[-2] // len(c), "im2col runs over it")
    last = tracer.labels.fixed(call.result.shape[-1], "im2col runs over it")
    tracer.set(call.result, (*source.dims[:-3], tracer.labels.fold([c, places]), last))
