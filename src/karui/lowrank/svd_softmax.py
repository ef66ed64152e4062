"""SVD-Softmax: Shim, Lee, Choi, Boo, Sung 2017, "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
Networks", NIPS (survey 25).

The output layer of a language model multiplies one vector with a row for every word, and few words matter. Turn the
input so that its leading coordinates carry most of the energy (the SVD of the trained weight, once), preview all logits
from a window of those, and complete the dot product only for the words with the largest previews. All other words keep
their preview in the normaliser, so every word keeps a probability. Nothing is trained.

It pays for vocabularies of ten thousand words and more, at small batches (a step of text generation). It does not pay
for small vocabularies, where the rotation costs more than it saves, nor for large batches, where gathering the rows of
each position's own words costs more than a dense product; it never makes the model smaller.

What was measured flatters it in one respect: small word models put few different words first (about 40 over 12,279
positions of WikiText-2, 280 among the first ten, at perplexity 211 against 433 of word frequencies alone), so agreeing
with them on the best words is easy; perplexity is the harder score. A random basis in place of the singular one agrees
on 99.4 % of the best words there, too, and is worse in perplexity only: 33 % higher against 0.3 %
(`results/svd_softmax.md`). The output layers started small (standard deviation 0.02), as language models' do.

Paper -> here: `V` -> out_features, `D` -> in_features, `W` -> window, `N` -> full_view; see
`karui.layers.svd_softmax` for the tensors.

DEPARTURE: window and full view are given as shares of width and vocabulary, so that one setting serves models of any
size; a tuner finds the cheapest pair for a wanted agreement, where the paper sweeps by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import NeedError, require
from karui.layers.svd_softmax import SvdSoftmaxHead, operations, rotate
from karui.lowrank._output import output_layer
from karui.lowrank._scan import Seen
from karui.model import Note, Regression, replace_layers
from karui.model.taps import layer_at
from karui.technique import Bench, Candidate, Card, technique

if TYPE_CHECKING:
    from karui.model import Model

_WINDOWS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_OFFERED = (0.25, 0.125)
"""Windows that a budget is offered, the mild one first."""
_FULL_VIEWS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)


@technique(
    Card(
        survey=25,
        slug="svd_softmax",
        title="SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks",
        kind="forward",
        reduces=("time",),
        identity={"window": 1.0},
        quick={"layer": "head", "window": 0.25, "full_view": 0.3},
        pays="output layers over ten thousand words and more, at small batches",
        costs="small vocabularies, large batches; the model becomes no smaller and is for inference only; shown on "
        "weak word models, on whose few best words it is easy to agree",
    )
)
@dataclass(frozen=True, kw_only=True)
class SvdSoftmax:
    """Give the output layer preview logits for all words and exact ones for the most likely.

    Settings:
        window: share of the input's width that the preview uses, in (0, 1]; 1 makes every logit exact.
        full_view: share of the vocabulary whose logits are made exact, in (0, 1].
        target: wanted agreement with the exact layer, in (0, 1]: the cheapest window and full view that reach it on
            calibration inputs are taken instead. None keeps to `window` and `full_view`.
        top: how many of the best words the agreement looks at.
        samples: calibration inputs that the tuner looks at.
        layer: path of the output layer; it is then replaced even where that does not pay. "" finds the last linear
            layer, and leaves it where it does not pay.

    Needs: nothing; calibration inputs if `target` is given.

    Raises:
        SettingError: a setting is out of range, or `layer` names no linear layer.
        NeedError: there is nothing to tune on.

    Relations: `SvdRestructuring` (11) truncates the layer for good, and makes it smaller.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Linear(32, 5000), example=(torch.zeros(1, 32),))
        >>> print(*SvdSoftmax().remarks(model))
        (the model itself): window 4 of 32, full view 150 of 5,000: 160,000 -> 25,224 multiply-adds
    """

    window: float = 0.125
    full_view: float = 0.03
    target: float | None = None
    top: int = 1
    samples: int = 512
    layer: str = ""

    def __post_init__(self) -> None:
        require(0 < self.window <= 1, f"window is {self.window}; give a share of the width in (0, 1], as 0.125")
        require(0 < self.full_view <= 1, f"full_view is {self.full_view}; give a share of the words in (0, 1], as 0.03")
        within = self.target is None or 0 < self.target <= 1
        require(within, f"target is {self.target}; give an agreement in (0, 1], for example 0.98")
        require(self.top >= 1, f"top is {self.top}; give a number of words from 1")
        require(self.samples >= 1, f"samples is {self.samples}; give a number from 1, for example 512")

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its output layer replaced."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        hint = "Give Bench(train=...), or a window and a full_view instead of a target."
        ready = self.target is None or bench.train is not None
        require(ready, "'svd_softmax' needs calibration inputs to reach its target.", hint, NeedError)
        one, reason = self._head(model)
        if one is None:
            return model.evolve(model.module, Note(f"SVD-Softmax: nothing replaced: {reason}"))
        found: dict[str, Any] = {}
        window, full_view = self._sizes(one.layer)
        if self.target is not None:
            hidden = inputs_of(model, one.path, bench, self.samples)
            window, full_view, agreement = tune(one.layer, hidden, self.target, self.top)
            found = {"agreement": agreement, "top": self.top, "samples": len(hidden)}
        if not self._worth(one.layer, window, full_view):
            return model.evolve(model.module, Note(f"SVD-Softmax: nothing replaced: {_told(one, window, full_view)}"))
        head = SvdSoftmaxHead.from_linear(one.layer, window, full_view)
        new = replace_layers(model, {one.path: head}, f"SVD-Softmax: {_told(one, window, full_view)}")
        macs = [one.outputs * one.layer.weight.numel(), one.outputs * _cost(one.layer, window, full_view)]
        told = {"layer": one.path, **head.settings(), "macs": macs, **found}
        return new.evolve(new.module, Note("SVD-Softmax: the output layer is for inference only", told))

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with the output layer, and why."""
        one, reason = self._head(model)
        if one is None:
            return (reason,)
        window, full_view = self._sizes(one.layer)
        told = _told(one, window, full_view)
        if self.target is not None:
            return (f"{one.path or '(the model itself)'}: window and full view are tuned on calibration inputs",)
        return (
            told if self._worth(one.layer, window, full_view) else f"left as it is, since it would not save: {told}",
        )

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]:
        """For a budget: the output layer at a few windows, where it then does half of the multiply-adds or fewer."""
        del bench, multiple  # windows follow from the vocabulary; the menu strikes off what is measured slower
        one, _ = self._head(model)
        if one is None:
            return
        for share in _OFFERED:
            alone = replace(self, layer=one.path, window=share, target=None)
            window, full_view = alone._sizes(one.layer)  # noqa: SLF001  (of its own class)
            if 2 * _cost(one.layer, window, full_view) <= one.layer.weight.numel():
                yield _candidate(alone, one, window, full_view)

    def _head(self, model: Model) -> tuple[Seen | None, str]:
        """The output layer as the example met it, or why there is none."""
        if not self.layer and isinstance(model.task, Regression):
            return None, "the task is a regression; SVD-Softmax is for logits of classes"
        return output_layer(model, self.layer, _objection, shared=True)

    def _sizes(self, layer: nn.Linear) -> tuple[int, int]:
        return counted(self.window, layer.in_features), counted(self.full_view, layer.out_features)

    def _worth(self, layer: nn.Linear, window: int, full_view: int) -> bool:
        return bool(self.layer) or _cost(layer, window, full_view) < layer.weight.numel()


@torch.no_grad()
def tune(
    layer: nn.Linear, hidden: Float[Tensor, "samples inputs"], target: float, top: int = 1
) -> tuple[int, int, float]:
    """The cheapest window and full view of a grid that reach an agreement on these inputs, and that agreement.

    Agreement is the share of the exact layer's `top` best words that are among the `top` best of the approximation.
    Where no pair of the grid reaches it, the full view takes all words, which is exact.
    """
    turned, rotation = (part.to(hidden) for part in rotate(layer.weight))
    inputs, logits = hidden @ rotation.T, layer(hidden)
    best = logits.topk(min(top, layer.out_features)).indices
    # Everything is exact when all words are in full view, so there is always an answer.
    found = (counted(_WINDOWS[0], layer.in_features), layer.out_features, 1.0)
    for share in _WINDOWS:
        window = counted(share, layer.in_features)
        previews = nn.functional.linear(inputs[:, :window], turned[:, :window], layer.bias)
        for view in _FULL_VIEWS:
            full_view = max(best.shape[1], counted(view, layer.out_features))
            if _cost(layer, window, full_view) >= _cost(layer, *found[:2]):
                break
            words = previews.topk(full_view).indices
            mixed = previews.scatter(1, words, logits.gather(1, words))
            agreement = agreed(best, mixed.topk(best.shape[1]).indices)
            if agreement >= target:
                found = (window, full_view, agreement)
                break
    return found


def agreed(exact: Tensor, found: Tensor) -> float:
    """Share of the words in `exact` `[samples, top]` that are in the same row of `found`, whatever their order."""
    return float((exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1).double().mean())


def counted(share: float, whole: int) -> int:
    """A share as a number, at least 1."""
    return max(1, math.ceil(share * whole - 1e-9))


@torch.no_grad()
def inputs_of(model: Model, path: str, bench: Bench, samples: int) -> Float[Tensor, "samples inputs"]:
    """What the layer at `path` is given on calibration inputs, one row for each position, at most `samples` rows."""
    kept: list[Tensor] = []
    layer = layer_at(model.module, path)
    handle = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach().flatten(0, -2)))
    modes = [(part, part.training) for part in model.module.modules()]
    model.module.eval()
    try:
        for batch in bench.calibration(samples):
            model.module(*batch)
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode
    rows = torch.cat(kept)
    return rows[torch.linspace(0, len(rows) - 1, min(samples, len(rows))).long()]


def _objection(layer: Any) -> str:
    return "" if isinstance(layer, nn.Linear) else f"{type(layer).__name__} is no linear layer"


def _candidate(alone: SvdSoftmax, one: Seen, window: int, full_view: int) -> Candidate:
    return Candidate(
        place=one.path,
        technique=alone,
        text=f"window {window} of {one.layer.in_features}, full view {full_view} of {one.layer.out_features:,}",
        layers=lambda: {one.path: SvdSoftmaxHead.from_linear(one.layer, window, full_view).eval()},
    )


def _cost(layer: nn.Linear, window: int, full_view: int) -> int:
    return operations(layer.out_features, layer.in_features, window, full_view)


def _told(one: Seen, window: int, full_view: int) -> str:
    outputs, inputs = one.layer.out_features, one.layer.in_features
    before, after = (one.outputs * each for each in (outputs * inputs, _cost(one.layer, window, full_view)))
    macs = f"{before:,} -> {after:,} multiply-adds"
    name = one.path or "(the model itself)"
    return f"{name}: window {window} of {inputs}, full view {full_view} of {outputs:,}: {macs}"
