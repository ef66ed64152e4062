"""The proof: the model with the units' outputs zeroed computes what the cut model does.

Both run in float64, on the example and on random inputs, through the user's own forward. Zeroed are all slices that
the units own: what makes them, and what reads them. Equal means within a measured rounding floor: the change of the
output when every weight moves by one unit in its last place. A cut of units that the output does not show would prove
nothing, so the units must be visible; where the weights hide them (a zeroed scale), they are drawn anew for the
proof.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from karui.errors import CaptureError, SurgeryError, require
from karui.model.groups import analyse
from karui.model.survivors import on_survivors
from karui.model.trace import Trace, brief, first, mode_of, plain_attention, run_traced, traced

if TYPE_CHECKING:
    from karui.model.cut import Cut
    from karui.model.graphform import Program
    from karui.model.groups import Analysis
    from karui.model.value import Model

Run = Callable[[nn.Module, tuple[Any, ...]], list[Tensor]]

# How far above the measured floor two equal computations may lie: the order of their sums differs.
SLACK = 256.0
# How far above the tolerance the units' effect must lie, for equality to mean anything.
CLEAR = 1e3
# How often weights are drawn anew where the units do not show.
DRAWS = 3


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


class BlindError(SurgeryError):
    """The units do not show in the output, so a proof would prove nothing."""


@contextmanager
def double_precision() -> Iterator[None]:
    """Tensors made on the way are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def outputs(module: nn.Module, inputs: tuple[Any, ...], *, training: bool = False) -> list[Tensor]:
    """The tensors that a module returns; its buffers and the random state stay as they are."""
    kept = torch.random.get_rng_state()
    buffers = {name: b.clone() for name, b in module.named_buffers()} if training else {}
    try:
        with torch.no_grad(), mode_of(module, training), plain_attention():
            made = functional_call(module, buffers, inputs)
    finally:
        torch.random.set_rng_state(kept)
    return [t.detach() for t in tree_leaves(made) if isinstance(t, Tensor)]


def run(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Outputs in evaluation mode and in double precision."""
    with double_precision():
        return outputs(module, inputs)


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


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut that is to be proved.

    Settings:
        step: the edit.
        analysis: the coupled groups that it was made from.
        removed: the units that go.
        programs: the captured programs of the whole model, where the cut model is to take its graph form.
    """

    step: Cut
    analysis: Analysis
    removed: Mapping[str, Tensor]
    programs: tuple[Program, Program] | None = None

    @property
    def exact(self) -> bool:
        """Whether no normalisation counts the units."""
        return all(self.analysis[name].exact for name in self.removed)

    def build(self, dense: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The cut model of a whole one, which is left as it is."""
        module = self.step.shrink(copy.deepcopy(dense))
        return module if self.programs is None else self.step.form(module, self.programs, dtype)

    def __str__(self) -> str:
        names = [f"'{name}'" for name in self.removed]
        return f"Cut of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"


def survivors_only(dense: nn.Module, step: Cut, example: tuple[Any, ...]) -> Run:
    """How to run the masked model with statistics over survivors only."""
    with double_precision():
        trace = traced(dense, example, training=False)
    found = analyse(trace, [])
    compute = on_survivors(found, found.dead(step.kept))

    def run_counted(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
        with double_precision():
            made = run_traced(module, inputs, Trace(exported=trace.exported), training=False, compute=compute)
        return [t for t in tree_leaves(made) if isinstance(t, Tensor)]

    return run_counted


def hidden(dense: nn.Module, candidate: Candidate, inputs: tuple[Any, ...]) -> list[str]:
    """Names of the groups of which no removed unit moves the output: to first order, by the slope of its scale."""
    parameters = {name: p.detach().requires_grad_(p.is_floating_point()) for name, p in dense.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    with torch.enable_grad(), mode_of(dense, False), plain_attention():
        made = functional_call(dense, parameters, inputs)
        leaves = [t for t in tree_leaves(made) if isinstance(t, Tensor) and t.requires_grad]
        loss = sum(
            ((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in leaves), torch.zeros(())
        )
        names = [name for name, p in parameters.items() if p.requires_grad] if leaves else []
        slopes = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True) if names else []
    effect = {n: (g * parameters[n]).detach() for n, g in zip(names, slopes, strict=True) if g is not None}

    def shows(name: str, units: Tensor) -> bool:
        for member in candidate.analysis[name].members:
            if member.tensor in effect:
                slices = effect[member.tensor].movedim(member.dim, 0)[member.indices[units]]
                if bool((slices.flatten(1).sum(1) != 0).any()):
                    return True
        return False

    return [name for name, units in candidate.removed.items() if not shows(name, units)]


def measure(dense: nn.Module, candidate: Candidate, inputs: list[tuple[Any, ...]]) -> Proof:
    """Masked against cut, on every input, in double precision."""
    cut = candidate.build(dense, torch.float64)
    masked = copy.deepcopy(dense)
    mask(masked, candidate.analysis, candidate.removed)
    run_masked = run if candidate.exact else survivors_only(dense, candidate.step, inputs[0])
    zeroed = [run_masked(masked, i) for i in inputs]
    gap = max(difference(z, run(cut, i)) for z, i in zip(zeroed, inputs, strict=True))
    jitter(masked, torch.Generator().manual_seed(1))
    scale = max((float(t.abs().max()) for t in zeroed[0] if t.numel()), default=0.0)
    floor = max(difference(run_masked(masked, inputs[0]), zeroed[0]), scale * 2.0**-53)
    return Proof(gap, floor, difference(run(dense, inputs[0]), zeroed[0]))


def jitter(module: nn.Module, generator: torch.Generator) -> None:
    """Move every weight by one unit in its last place, up or down; in place."""
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                sign = torch.randint(0, 2, p.shape, generator=generator, dtype=p.dtype) * 2 - 1
                p.mul_(1 + sign * torch.finfo(p.dtype).eps)


def prove(model: Model, candidate: Candidate) -> Proof:
    """Prove that a cut removes its units and changes nothing else.

    Raises:
        BlindError: some group's units do not show in the output, whatever the weights.
        SurgeryError: the cut model computes something else, or cannot run.
    """
    generator = torch.Generator().manual_seed(0)
    example = first(model.example)
    inputs = [tree_map(double, example), tree_map(lambda t: double(random_like(t, generator)), example)]
    drawn = model.module
    unseen: list[str] = []
    for attempt in range(DRAWS + 1):
        if attempt:
            drawn = copy.deepcopy(model.module)
            redraw(drawn, generator)
        unseen = hidden(drawn, candidate, example)
        if not unseen:
            found = _compared(copy.deepcopy(drawn).double(), candidate, inputs)
            if found.visible:
                return replace(found, redrawn=attempt > 0)
    which = ", ".join(f"'{name}'" for name in unseen[:4]) or "all"
    raise BlindError(
        f"{candidate}: units of {which} do not show in the output, so nothing can be proved.", "Leave the group whole."
    )


def _compared(dense: nn.Module, candidate: Candidate, inputs: list[tuple[Any, ...]]) -> Proof:
    """The measurement, refused where the two models differ."""
    try:
        found = measure(dense, candidate, inputs)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, CaptureError) as error:
        raise SurgeryError(f"{candidate}: the model does not run afterwards: {brief(error)}.") from error
    require(
        found.holds,
        f"{candidate}: the cut model differs from the masked one by {found.difference:.2g}, "
        f"where rounding explains {found.floor:.2g}.",
        "Leave the group whole.",
        SurgeryError,
    )
    return found
