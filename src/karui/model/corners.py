"""The proof on corners of images: in double precision on a sixteenth of the pixels, in single precision on all.

What a cut changes are channels, and a convolution treats every place alike; so a corner tells as much of them, at a
small part of the cost. It is believed only where the network runs on it the operators that it runs on the whole, on the
same weights; and the whole input must agree within the rounding of the network's own precision, so that what only the
whole shows is not missed. Whatever does not come out here is proved on the whole input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from karui.model.copying import stateless
from karui.model.path import Path, seen
from karui.model.running import difference, double, joined, outputs, run_double, tensors
from karui.model.sight import look, zeroed
from karui.model.verdict import FAINT, SLACK, Proof
from karui.model.walking import all_tensors, lent

if TYPE_CHECKING:
    from karui.model.hollow import Hollow
    from karui.model.proof import Candidate

# The corner's side is this part of the image's, and at least so many pixels.
PART = 4
LEAST = 8

Inputs = tuple[Any, ...]


def prove_on_corners(
    dense: nn.Module, candidate: Candidate, pair: tuple[Inputs, Inputs], light: Hollow, single: list[Tensor]
) -> Proof | None:
    """The proof of a cut that keeps the own forward, if it comes out on corners; None where the whole must decide.

    The floor is the least that rounding can be, of the order of one unit in the last place of the output, so that
    nothing need be measured. A network in double precision, or whose units barely show, is left to the whole proof.

    Args:
        dense: the whole model.
        candidate: its cut.
        pair: the example and the random input.
        light: the cut model, whose weights are there only while it runs.
        single: what that gives for the random input.
    """
    small = corners(pair[0]), corners(pair[1])
    kind = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.float64)
    if (
        small[0] is None
        or small[1] is None
        or kind is torch.float64
        or not (stateless(dense) and stateless(light.module))
    ):
        return None
    analysis, removed = candidate.analysis, candidate.removed
    path = Path()
    try:
        sight = look(dense, analysis, removed, small[1], training=False, path=path)
        if sight.unseen or path.ran != seen(analysis.trace):
            return None
        both = double(joined(small[0], small[1]))
        masked = zeroed(dense, analysis, removed, torch.float64)
        wide = _in_double(dense, both, masked)
        with lent(dense, {place: masked.pop(place).to(kind) for place in list(masked)}):
            whole = outputs(dense, pair[1])
        gap = difference(wide, shrunk := _in_double(light.fill(torch.float64), both))
    except Exception:  # noqa: BLE001  (foreign code: what it cannot do with a corner, it may with the whole)
        return None
    floor, scale = torch.finfo(torch.float64).eps / 2, _scale(shrunk)
    effect = difference([t[len(t) // 2 :] for t in shrunk], sight.output)
    found = Proof(gap, floor * scale, effect)
    if not (found.holds and FAINT * scale < effect < float("inf")):
        return None
    return found if difference(whole, single) <= SLACK * torch.finfo(kind).eps / 2 * _scale(single) else None


def _in_double(module: nn.Module, inputs: Inputs, others: Mapping[int, Tensor] | None = None) -> list[Tensor]:
    """What a module without state gives in double precision, with other parameters where there are some."""
    given = {
        id(t): t.detach().double()
        for t in all_tensors(module)
        if t.is_floating_point() and not (others and id(t) in others)
    }
    with lent(module, given | dict(others or {})):
        return run_double(module, inputs)


def _scale(made: list[Tensor]) -> float:
    """The largest number among outputs."""
    return max((float(t.abs().max()) for t in made if t.numel()), default=0.0)


def corners(inputs: Inputs) -> Inputs | None:
    """The inputs with a corner of each image [batch, channels, height, width] or volume; None where none is larger."""
    small = tree_map(_corner, inputs)
    same = all(a.shape == b.shape for a, b in zip(tensors(small), tensors(inputs), strict=True))
    return None if same else small


def _corner(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 4:
        return value
    return value[(..., *(slice(max(LEAST, -(-n // PART))) for n in value.shape[2:]))].contiguous()
