"""The harm of candidates: how far each, alone, moves the model's output on calibration data. No labels are needed.

Much of what a large change does is undone as soon as normalisations see what comes to them now, which the first steps
of any training let them do: of ResNet-20, the last block of the first stage moves the output by 2.0 nats where it is
left out, and by 0.7 with its normalisations seen anew, and blocks change places in the order. So candidates that move
it far are judged that way. Source: Li et al. 2020, "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network
Pruning", section 3.3, who judge pruned networks so.

Data is streamed: for each batch the model's own outputs, then those of every candidate, tried one after the other on
one working copy whose values come back each time. So there are never more than two copies of the model here, and the
activations of one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from karui.errors import NeedError, require
from karui.measuring.bar import bar
from karui.measuring.inference import inference, tensors_of
from karui.model import Analysis, Classification, Model
from karui.recipes.budget.refusals import Refusals
from karui.technique.pruning.masking import silenced

if TYPE_CHECKING:
    from karui.technique import Bench, Candidate

SAMPLES, BATCH = 128, 128
FAR = 0.05
"""Harm from which on normalisations are seen anew: what moves the output less is told well enough without."""


def harms(
    model: Model,
    candidates: Sequence[Candidate],
    analysis: Analysis | None,
    bench: Bench,
    refusals: Refusals | None = None,
) -> list[float]:
    """The harm of each candidate; infinite where the output stops being finite.

    Args:
        model: what they were offered for; left as it is.
        candidates: what is tried.
        analysis: the coupled groups that cuts name; None where none of them cuts.
        bench: calibration data (its training inputs, a seeded subset).
        refusals: learns which candidates fail when they are tried; what is told of their harm means nothing.

    Raises:
        NeedError: there is no calibration data.
    """
    refusals = Refusals() if refusals is None else refusals
    require(bench.train is not None, "A budget needs calibration data.", "Give --data, or Bench(train=...).", NeedError)
    working = model.copy()
    totals, samples = [0.0] * len(candidates), 0
    with inference(working.module) as module:
        for inputs in bench.calibration(SAMPLES, BATCH):
            before = tensors_of(module(*inputs))
            count = len(tensors_of(inputs)[0])
            samples += count
            with bar("harm of candidates", len(candidates), bench.progress) as step:
                for number, candidate in enumerate(candidates):
                    with refusals.trying(candidate), tried(module, candidate, analysis):
                        totals[number] += count * _moved(module, inputs, before, model.task)
                    step()
    return [total / samples for total in totals]


def _moved(module: nn.Module, inputs: tuple[Any, ...], before: Sequence[Tensor], task: Any) -> float:
    """How far the outputs for a batch moved; where that is far, with normalisations seen anew if it is less so."""
    moved = change(before, tensors_of(module(*inputs)), task)
    if moved > FAR and len(tensors_of(inputs)[0]) > 1:
        with seen_anew(module) as norms:
            if norms:
                moved = min(moved, change(before, tensors_of(module(*inputs)), task))
    return moved


@contextmanager
def seen_anew(module: nn.Module) -> Iterator[list[_BatchNorm]]:
    """The module with its batch normalisations by the statistics of the batch; what they have kept stays as it is."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    modes = [layer.training for layer in norms]
    for layer in norms:
        layer.training, layer.track_running_stats = True, False
    try:
        yield norms
    finally:
        for layer, mode in zip(norms, modes, strict=True):
            layer.training, layer.track_running_stats = mode, True


@contextmanager
def tried(module: nn.Module, candidate: Candidate, analysis: Analysis | None) -> Iterator[nn.Module]:
    """The module as the candidate would have it, and as it was afterwards. Changes it in place meanwhile."""
    with ExitStack() as stack:
        for name, units in candidate.cut.items():
            assert analysis is not None  # noqa: S101  (who cuts has groups)
            stack.enter_context(silenced(module, analysis[name], units))
        if candidate.layers is not None:
            stack.enter_context(_swapped(module, candidate.layers()))
        yield module


@contextmanager
def _swapped(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other layers at these paths, also where one is held under several names."""
    places = []
    for path, layer in layers.items():
        old = module.get_submodule(path)
        for parent in module.modules():
            places += [(parent, name, old, layer) for name, held in parent._modules.items() if held is old]  # noqa: SLF001  (`named_children` tells each once)
    try:
        for parent, name, _, layer in places:
            setattr(parent, name, layer.eval())
        yield
    finally:
        for parent, name, old, _ in places:
            setattr(parent, name, old)


def change(before: Sequence[Tensor], after: Sequence[Tensor], task: Any) -> float:
    """How far outputs moved, for one sample: 0 where they are equal, about 1 where little of them is left.

    Of a classifier, the Kullback-Leibler divergence of its probabilities, in nats (for each position); of any other
    output, the squared distance as a share of its variance over the batch. Several outputs are averaged.

    Example:
        >>> change([torch.tensor([[0.0], [2.0]])], [torch.tensor([[0.0], [1.0]])], None)
        0.5
    """
    if isinstance(task, Classification) and len(before) == 1:
        old, new = (functional.log_softmax(t.double(), 1) for t in (before[0], after[0]))
        found = [(old.exp() * (old - new)).sum(1).mean()]
    else:
        pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True) if a.is_floating_point()]
        found = [(a - b).square().mean() / (a - a.mean(0, keepdim=True)).square().mean().clamp(1e-12) for a, b in pairs]
    value = float(torch.stack(found).mean())
    return max(value, 0.0) if value == value and value != float("inf") else float("inf")  # noqa: PLR0124  (nan)
