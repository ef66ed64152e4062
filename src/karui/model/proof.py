"""The proof: the model with the units' outputs zeroed computes what the cut model does.

Both run in float64, on the example and on random inputs, through the user's own forward. Zeroed are all slices that
the units own: what makes them, and what reads them. Equal means within a measured rounding floor: the change of the
output when every weight moves by one unit in its last place. A cut of units that the output does not show would prove
nothing, so the units must be visible; where the weights hide them (a zeroed scale), they are drawn anew for the
proof.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from karui.errors import SurgeryError, require
from karui.model.trace import first, mode_of, plain_attention

if TYPE_CHECKING:
    from karui.model.cut import Cut
    from karui.model.groups import Analysis
    from karui.model.value import Model

# How far above the measured floor two equal computations may lie: the order of their sums differs.
SLACK = 256.0
# How far above the tolerance the units' effect must lie, for equality to mean anything.
CLEAR = 1e3


@dataclass(frozen=True)
class Proof:
    """What a proof measured.

    Settings:
        difference: largest difference between masked and cut output.
        floor: the measured rounding floor.
        effect: largest difference that zeroing the units makes at all.
        redrawn: whether the weights were drawn anew for the proof.
    """

    difference: float
    floor: float
    effect: float
    redrawn: bool = False

    @property
    def visible(self) -> bool:
        """Whether the units show in the output."""
        return self.effect > CLEAR * SLACK * self.floor

    @property
    def holds(self) -> bool:
        """Whether masked and cut model are equal."""
        return self.difference <= SLACK * self.floor


@contextmanager
def double_precision() -> Iterator[None]:
    """Tensors made on the way are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Outputs in evaluation mode, as a list of tensors."""
    with torch.no_grad(), mode_of(module, False), plain_attention(), double_precision():
        outputs = module(*inputs)
    return [t.detach() for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest absolute difference of two lists of outputs; infinite where shapes differ."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = (a.double() - b.double()).abs()
            gap = torch.where(a == b, torch.zeros_like(gap), gap)
            worst = max(worst, float(torch.nan_to_num(gap, nan=float("inf")).max()))
    return worst


def double(value: Any) -> Any:
    """Floating tensors in float64, others as they are."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def random_like(value: Any, generator: torch.Generator) -> Any:
    """A random input of the same shape and kind."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    if value.numel() and value.dtype != torch.bool:
        order = torch.randperm(value.numel(), generator=generator)
        return value.reshape(-1)[order].reshape(value.shape)
    return value


def mask(module: nn.Module, analysis: Analysis, removed: Mapping[str, Tensor]) -> None:
    """Zero every slice of a parameter that the removed units own, in place."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, units in removed.items():
            for member in analysis[name].members:
                if member.tensor in parameters:
                    parameters[member.tensor].index_fill_(member.dim, member.indices[units].reshape(-1), 0)


def redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight anew, at a scale that keeps activations alive; in place."""
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                fan = max(p[0].numel(), 1) if p.ndim > 1 else 1
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(noise * (2 / fan) ** 0.5 if p.ndim > 1 else 1 + 0.3 * noise)


def _measure(
    dense: nn.Module,
    step: Cut,
    analysis: Analysis,
    removed: Mapping[str, Tensor],
    inputs: list[tuple[Any, ...]],
) -> Proof:
    """Masked against cut, on every input."""
    cut = step.replay(copy.deepcopy(dense), inputs[0])
    masked = copy.deepcopy(dense)
    mask(masked, analysis, removed)
    whole = run(dense, inputs[0])
    zeroed = [run(masked, i) for i in inputs]
    gap = max(difference(z, run(cut, i)) for z, i in zip(zeroed, inputs, strict=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in masked.parameters():
            if p.is_floating_point():
                step_ = torch.randint(0, 2, p.shape, generator=generator, dtype=p.dtype) * 2 - 1
                p.mul_(1 + step_ * torch.finfo(p.dtype).eps)
    scale = max((float(t.abs().max()) for t in zeroed[0] if t.numel()), default=0.0)
    floor = max(difference(run(masked, inputs[0]), zeroed[0]), scale * 2.0**-53)
    return Proof(gap, floor, difference(whole, zeroed[0]))


def prove(model: Model, step: Cut, analysis: Analysis, removed: Mapping[str, Tensor]) -> Proof:
    """Prove that a cut removes these units and changes nothing else.

    Raises:
        SurgeryError: the cut computes something else, cannot run, or is blind: its units do not show in the output.
    """
    generator = torch.Generator().manual_seed(0)
    example = first(model.example)
    inputs = [tree_map(double, example), tree_map(lambda t: double(random_like(t, generator)), example)]
    dense = copy.deepcopy(model.module).double()
    groups = ", ".join(f"'{name}'" for name in list(removed)[:4]) + (" and others" if len(removed) > 4 else "")
    found = None
    for redrawn in (False, True):
        if redrawn:
            redraw(dense, generator)
        try:
            found = _measure(dense, step, analysis, removed, inputs)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            text = str(error).splitlines()[0] if str(error) else ""
            raise SurgeryError(
                f"Cut of {groups}: the model does not run afterwards: {type(error).__name__}: {text}."
            ) from error
        require(
            found.holds,
            f"Cut of {groups}: the cut model differs from the masked one by {found.difference:.2g}, "
            f"where rounding explains {found.floor:.2g}.",
            "Leave the group whole.",
            SurgeryError,
        )
        if found.visible:
            return found
    raise SurgeryError(
        f"Cut of {groups}: the units do not show in the output, so nothing can be proved.", "Leave the group whole."
    )
