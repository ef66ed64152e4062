"""Tucker-2 with ranks by variational Bayes: Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression of Deep Convolutional
Neural Networks for Fast and Low Power Mobile Applications", ICLR, arXiv 1511.06530 (survey 12).

The whole network is compressed in one shot, in three steps. Ranks: for every kernel, global analytic variational
Bayes (`karui.numerics.evbmf`) tells how much of the unfolding along the inputs, and along the outputs, is more than
noise; there is no search. Decomposition: Tucker-2 projects both channel modes and leaves space whole, so a convolution
becomes a pointwise one, a smaller spatial one and a pointwise one. Fine-tuning: the whole network, a few epochs.

It pays for convolutions with many channels that were trained to convergence. It does not pay for kernels that are full
rank already (small networks, depthwise convolutions, networks pruned before), which are left and reported; and the
added pointwise layers are bound by memory, so time falls less than multiply-adds do: measure it. In narrow networks
variational Bayes takes more for noise than the network can spare: ResNet-20 for CIFAR-10 does not recover in a short
fine-tuning (`results/cifar_resnets.md`); give `ratio` there.

Paper -> here: `K` -> the kernel, `S`, `T` (input and output channels) -> channels, filters, `R3` -> rank_in, `R4` ->
rank_out, `U^(3)` -> inner, `U^(4)` -> outer, core tensor `C` -> core.

DEPARTURE: a mode that keeps its full rank gets no pointwise layer, which could only rotate it.

DEPARTURE: variational Bayes may find nothing but noise in a mode, above all in small layers (a first convolution, an
output layer over few classes), whose directions all matter although none stands out. The method takes a rank of 0 as 1;
on small trained networks that lost the accuracy, so such a mode keeps its full rank here. `noise_rank=1` gives the
method's own rule.

DEPARTURE: the groups of a grouped convolution are decomposed one by one and share the largest of their ranks; the
paper has no grouped convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import factor_conv, factor_full_map
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import (
    carry_out,
    factor_matrix,
    fine_tune,
    require_data,
    require_fine_tuning,
    require_ranks,
    tracked,
)
from karui.lowrank._per_layer import rank_ladder
from karui.lowrank._scan import Seen, scan
from karui.numerics.evbmf import evbmf
from karui.numerics.tucker import tucker2
from karui.numerics.unfold import split_groups, unfold
from karui.technique import Bench, Candidate, Card, technique

if TYPE_CHECKING:
    from karui.model import Model


@technique(
    Card(
        survey=12,
        slug="tucker2",
        title="Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio": 1.0, "epochs": 0},
        quick={"ratio": 0.4, "epochs": 1},
        arxiv="1511.06530",
        pays="convolutions with many channels in a network trained to convergence, with data to fine-tune on",
        costs="small or depthwise kernels; time falls less than multiply-adds, as pointwise layers are bound by memory",
    )
)
@dataclass(frozen=True, kw_only=True)
class Tucker2:
    """Decompose every convolution over both channel modes, at ranks that the kernel itself tells, and fine-tune.

    The first convolution keeps its input channels (Tucker-1). A linear layer on a flattened feature map is a
    convolution over the whole map; other linear layers get an SVD at the rank of the same estimate.

    Settings:
        ratio: share of the full rank for both modes of every layer, in (0, 1]; None finds ranks by variational Bayes.
        noise_rank: rank of a mode in which variational Bayes finds nothing but noise; 0 leaves the mode whole.
        ranks: ranks of single layers, as (path, rank_in, rank_out); they go before the other settings. A linear layer
            that gets an SVD takes the second.
        pointwise: whether convolutions with a kernel of one position are decomposed too, by SVD; the paper leaves them.
        fully_connected: whether linear layers are decomposed too.
        sweeps: most sweeps of HOOI that refine the start from HOSVD.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: nothing; training data and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to fine-tune on.

    Relations: `SvdRestructuring` (11) is for linear layers and takes ranks from the share of the spectrum.

    Example:
        >>> import karui
        >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> model = karui.Model(net, example=(torch.zeros(1, 16, 8, 8),))
        >>> light = Tucker2(ratio=0.25, epochs=0).apply(model, karui.Bench())
        >>> [type(layer).__name__ for layer in light.module]
        ['FactoredConv', 'ReLU', 'FactoredConv']
    """

    ratio: float | None = None
    noise_rank: int = 0
    ranks: tuple[tuple[str, int, int], ...] = ()
    pointwise: bool = False
    fully_connected: bool = True
    sweeps: int = 20
    skip: tuple[str, ...] = ()
    epochs: int = 10
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, inner, outer) for path, inner, outer in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        within = self.ratio is None or 0 < self.ratio <= 1
        require(within, f"ratio is {self.ratio}; give a share of the full rank in (0, 1], for example 0.4")
        told = f"noise_rank is {self.noise_rank}; give 0 to leave the mode whole, or a rank"
        require(self.noise_rank >= 0, told)
        for path, inner, outer in self.ranks:
            require(min(inner, outer) >= 1, f"ranks has {inner}, {outer} for '{path}'; give numbers from 1")
        require(self.sweeps >= 0, f"sweeps is {self.sweeps}; give 0 or more, for example 20")
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The decomposed model, fine-tuned."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("tucker2", model, bench, self.epochs)
        seen, left = self._scan(model)
        choices, layers = [], {}
        for one in tracked(seen, "decompose", shown=bench.progress):
            choice = self.choice(one)
            if choice.replaced:
                layers[one.path], error = self.build(one, choice)
                choice = replace(choice, error=error)
            choices.append(choice)
        extra = {"ranks": "variational Bayes" if self.ratio is None else f"{self.ratio} of full"}
        decomposed = carry_out(model, (*choices, *left), layers, "Tucker-2", extra)
        if not layers:
            return decomposed
        return fine_tune(decomposed, bench, self.epochs, self.learning_rate, "fine-tune the decomposed network")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The ranks (input, output) of each layer, or the reason why it is left."""
        seen, left = self._scan(model)
        return (*map(self.choice, seen), *left)

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]:
        """For a budget: each convolution at lower and lower ranks, the same share of both modes."""
        seen, _ = self._scan(model)
        for one in seen:
            if isinstance(one.layer, nn.Linear) or _is_matrix(one):
                continue
            filters, channels = kernel_of(one).shape[1:3]
            # A side of one channel has no ladder, and keeps its rank.
            outer = rank_ladder(filters, multiple) or (filters,)
            inner = (channels,) * len(outer) if one.first else rank_ladder(channels, multiple) or (channels,)
            # The shorter ladder waits at its end, so that a narrow side does not end the other's.
            for rung in range(max(len(outer), len(inner))):
                ranks = (inner[min(rung, len(inner) - 1)], outer[min(rung, len(outer) - 1)])
                alone = replace(self, ratio=1.0, ranks=((one.path, *ranks),), epochs=0)
                choice = alone.choice(one)
                if choice.replaced:
                    yield _candidate(alone, one, choice)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, self._objection, self.skip)
        require_ranks([path for path, *_ in self.ranks], seen, left)
        return seen, left

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "" if self.fully_connected else "linear layers are left (fully_connected=False)"
        if all(taps == 1 for taps in layer.kernel_size) and not self.pointwise:
            return "pointwise convolutions are left (pointwise=False)"
        return ""

    def choice(self, one: Seen) -> Choice:
        """Ranks by the setting; then the layer is left if that would not save anything."""
        kernel, own = kernel_of(one), [ranks for path, *ranks in self.ranks if path == one.path]
        filters, channels, taps = *kernel.shape[1:3], math.prod(kernel.shape[3:])
        if _is_matrix(one):
            full = min(filters, channels)
            rank, remark = (own[0][1], "") if own else self._rank(kernel, 0, full, "its weight")
            return _costed(one, kernel, (min(rank, full),), (full,), remark)
        outer, told_outer = (own[0][1], "") if own else self._rank(kernel, 0, filters, "its outputs")
        inner, told_inner = (own[0][0], "") if own else (channels, "")
        if not own and not one.first:
            inner, told_inner = self._rank(kernel, 1, channels, "its inputs")
        # A core cannot hold more directions in one mode than the other mode and space together span.
        inner = channels if inner >= channels else min(inner, outer * taps)
        outer = filters if outer >= filters else min(outer, inner * taps)
        remark = "; ".join(filter(None, (told_inner, told_outer)))
        return _costed(one, kernel, (inner, outer), (channels, filters), remark)

    def _rank(
        self, kernel: Float[Tensor, "groups filters channels *kernel"], mode: int, full: int, name: str
    ) -> tuple[int, str]:
        """The rank of a mode, the largest that any group asks for, and what to tell of it."""
        if self.ratio is not None:
            return max(1, math.ceil(self.ratio * full - 1e-9)), ""
        found = max(evbmf(unfold(block, (mode,))).rank for block in kernel)
        if found:
            return found, ""
        taken = min(self.noise_rank or full, full)
        return taken, f"variational Bayes finds nothing but noise in {name}, taken at rank {taken}"

    def build(self, one: Seen, choice: Choice) -> tuple[nn.Module, float]:
        """The factored layer and its relative error. A mode of full rank is folded back into the core."""
        if len(choice.ranks) == 1:
            return factor_matrix(one.layer, choice.ranks[0])
        kernel, (rank_in, rank_out) = kernel_of(one), choice.ranks
        parts = [tucker2(block, rank_out, rank_in, sweeps=self.sweeps) for block in kernel]
        core, inner, outer = (torch.stack([getattr(p, name) for p in parts]) for name in ("core", "inner", "outer"))
        energies = kernel.flatten(1).square().sum(1)
        lost = (energies * torch.tensor([part.error for part in parts]).double().square()).sum()
        error = float((lost / energies.sum().clamp(min=1e-300)).sqrt())
        factors: dict[str, Any] = {"inner": inner, "outer": outer}
        if rank_in == kernel.shape[2]:
            core, factors["inner"] = torch.einsum("gqp...,gcp->gqc...", core, inner), None
        if rank_out == kernel.shape[1]:
            core, factors["outer"] = torch.einsum("gqp...,gnq->gnp...", core, outer), None
        if not isinstance(one.layer, nn.Linear):
            return factor_conv(one.layer, core, **factors), error
        single = {name: None if factor is None else factor[0] for name, factor in factors.items()}
        return factor_full_map(one.layer, one.map, core[0], **single), error


def kernel_of(one: Seen) -> Float[Tensor, "groups filters channels *kernel"]:
    """The weight in float64, a block for each group; that of a linear layer on a feature map as a kernel over it."""
    weight, layer = one.layer.weight.detach().double(), one.layer
    if not isinstance(layer, nn.Linear):
        return split_groups(weight, layer.groups)
    return split_groups(weight if _is_matrix(one) else weight.reshape(-1, *one.map), 1)


def _is_matrix(one: Seen) -> bool:
    """Whether the layer has no space to see: Tucker-2 of a matrix is its SVD."""
    if isinstance(one.layer, nn.Linear):
        return math.prod(one.map[1:]) == 1 or len(one.map) > 4
    return all(taps == 1 for taps in one.layer.kernel_size)


def _costed(one: Seen, kernel: Tensor, ranks: tuple[int, ...], full: tuple[int, ...], remark: str) -> Choice:
    """What the layer costs at these ranks, before and after; it is left where they are full or save nothing."""
    if ranks == full:
        return Choice(one.path, reason=remark or f"its rank is full ({' x '.join(map(str, full))})")
    groups, dense = kernel.shape[0], kernel.numel()
    stages = list(_stages(one, kernel, ranks))
    bias = one.layer.weight.shape[0] if one.layer.bias is not None else 0
    factored, macs = groups * sum(size for size, _ in stages), groups * sum(size * places for size, places in stages)
    choice = Choice(
        one.path,
        ranks=ranks,
        full=full,
        parameters=(dense + bias, factored + bias),
        macs=(dense * one.outputs, macs),
        remark=remark,
    )
    return unless_larger(choice)


def _stages(one: Seen, kernel: Tensor, ranks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(parameters, positions) of each layer of the chain, for one group: the first works at the input's positions."""
    filters, channels = kernel.shape[1:3]
    if len(ranks) == 1:
        yield ranks[0] * channels, one.outputs
        yield ranks[0] * filters, one.outputs
        return
    rank_in, rank_out = ranks
    taps = math.prod(kernel.shape[3:])
    if rank_in != channels:
        yield channels * rank_in, one.inputs * (taps if isinstance(one.layer, nn.Linear) else 1)
    yield taps * rank_in * rank_out, one.outputs
    if rank_out != filters:
        yield rank_out * filters, one.outputs


def _candidate(alone: Tucker2, one: Seen, choice: Choice) -> Candidate:
    text = f"rank {' x '.join(map(str, choice.ranks))} of {' x '.join(map(str, choice.full))}"
    return Candidate(place=one.path, technique=alone, text=text, layers=lambda: {one.path: alone.build(one, choice)[0]})
