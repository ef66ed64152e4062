"""The ways of factorising that `low_rank_table` compares, each set for a number of times that its quantity shrinks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karui.layers.svd_softmax import operations
from karui.lowrank import (
    AsymmetricNonlinear,
    BiclusteredCp,
    BiclusteredSvd,
    CompressionAwareTraining,
    CpDecomposition,
    Flattened,
    GroupBrainDamage,
    Lcnn,
    LowRankAndSparse,
    LowRankExpansion,
    LowRankFilters,
    LowRankOutput,
    LowRankRegularization,
    ProductQuantization,
    RankConstrainedTopology,
    SeparableFilters,
    SicLayers,
    SpatialBottleneck,
    SvdRestructuring,
    SvdSoftmax,
    Topological,
    Tucker2,
)
from karui.measuring import count
from karui.model import Model
from karui.model.taps import layer_at
from karui.technique import Bench, Technique
from karui.train import Influence
from karui.train.masks import MaskKeeper, zero_masks

RATIOS = (2, 4)
SHARES = tuple(step / 50 for step in range(2, 50))
SPEEDUPS = tuple(1.2 * 1.06**step for step in range(40))
PARTS = tuple(step / 9 for step in range(1, 10))

Size = Callable[[Any, Model], float]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One technique, and how it is set.

    Settings:
        name: with its survey number.
        of: what shall be 2 and 4 times fewer.
        make: the technique at a setting, without training.
        knobs: settings among which the nearest is looked for; empty where `make` takes the number of times itself.
        size: what is left at a setting, of the whole.
        ordered: whether more is left the further a setting stands in `knobs` (or less, all along).
        whole: the technique with its own training of that many passes; None trains what it gives as every network is.
        influence: what acts on that training where the technique asks for it, given its settings and what it gave.
        kind: "fitted" to the trained network, "trained" (changed while it trains), "taught" (layers drawn anew in
            the trained network, and taught the responses of those they replace), "scratch" (all drawn anew, and
            trained as long as the dense network was), or "inference" (for inference only).
    """

    name: str
    of: str
    make: Callable[[Any], Any]
    knobs: Sequence[Any] = ()
    size: Size | None = None
    ordered: bool = True
    whole: Callable[[Any, int], Technique] | None = None
    influence: Callable[[Any, Model, Bench], Influence] | None = None
    kind: str = "fitted"

    def setting(self, model: Model, times: int) -> Any:
        """The setting that comes nearest to `times` fewer."""
        if self.size is None:
            return times
        size = self.size

        @functools.cache
        def left(place: int) -> float:
            return size(self.make(self.knobs[place]), model)

        low, high = 0, len(self.knobs) - 1
        if self.ordered:
            rising = left(high) > left(low)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if (left(middle) > 1 / times) == rising else (middle, high)
        return self.knobs[min(range(low, high + 1), key=lambda place: abs(left(place) - 1 / times))]


def told(step: Any) -> str:
    """The settings of a technique that are not its defaults."""
    own = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if getattr(step, f.name) != f.default}
    own.pop("epochs", None)
    return ", ".join(f"{name}={value}" for name, value in own.items())


def macs_left(step: Any, model: Model) -> float:
    """Share of the network's multiply-adds."""
    return 1 - sum(c.macs[0] - c.macs[1] for c in step.choose(model)) / count(model).macs


def parameters_left(step: Any, model: Model) -> float:
    """Share of the network's parameters."""
    return 1 - sum(c.parameters[0] - c.parameters[1] for c in step.choose(model)) / model.parameters


def layer_left(step: Any, model: Model) -> float:
    """Share of the parameters of the layers that are replaced."""
    taken = [c.parameters for c in step.choose(model) if c.replaced]
    return sum(after for _, after in taken) / max(sum(before for before, _ in taken), 1) if taken else 1.0


def bytes_left(step: Any, model: Model) -> float:
    """Share of the bytes: of each replaced layer codebooks in single precision, and codes of as few bits as serve."""
    left = 4 * model.parameters
    for choice in step.choose(model):
        if choice.replaced:
            (size, words), (channels, each) = choice.ranks, choice.full
            codes = math.ceil(math.log2(words)) / 8 * channels / size * each
            left += 4 * (choice.parameters[1] - choice.parameters[0]) + codes
    return left / (4 * model.parameters)


def softmax_left(step: SvdSoftmax, model: Model) -> float:
    """Share of the output layer's multiply-adds."""
    layer: Any = layer_at(model.module, step.layer)
    words, width = layer.weight.shape
    done = operations(words, width, max(1, round(step.window * width)), max(1, round(step.full_view * words)))
    return done / layer.weight.numel()


def tuned(step: Any, passes: int) -> Technique:
    """The technique with its own fine-tuning."""
    return replace(step, epochs=passes)


def halves(step: Any, passes: int) -> Technique:
    """Half of the passes for the technique's own training, the others for tuning what it gives."""
    return replace(step, epochs=passes // 2, tuning=passes - passes // 2)


def zeros_kept(step: Any, light: Model, bench: Bench) -> Influence:
    """What keeps single weights at zero that are so."""
    del step, bench
    return MaskKeeper(zero_masks(light.module))


def own(step: Any, light: Model, bench: Bench) -> Influence:
    """What the technique itself asks of a training."""
    return step.influence(light, bench)


def dictionaries(share: float, model: Model) -> tuple[tuple[str, int], ...]:
    """Sizes of dictionaries as a share of the channels of each 3x3 convolution."""
    convs = [(path, m) for path, m in model.module.named_modules() if getattr(m, "kernel_size", None) == (3, 3)]
    return tuple((path, max(1, round(share * layer.weight.shape[1]))) for path, layer in convs)


def of_convolutions(dense: Model) -> tuple[Way, ...]:
    """The ways for a convolutional network that was trained."""
    fewer = {"of": "multiply-adds", "size": macs_left}
    drawn: dict[str, Any] = {"draw": False, "epochs": 0}
    again = {**fewer, "kind": "taught", "knobs": PARTS}
    return (
        Way(name="[12] Tucker-2", make=lambda k: Tucker2(ratio=k, epochs=0), knobs=SHARES, **fewer),
        Way(
            name="[13] scheme 2, responses",
            make=lambda k: LowRankExpansion(speedup=k, images=100, iterations=20),
            knobs=SPEEDUPS,
            **fewer,
        ),
        Way(
            name="[14] separable filters",
            make=lambda k: SeparableFilters(speedup=k, restarts=1),
            knobs=SPEEDUPS,
            **fewer,
        ),
        Way(
            name="[16] reconstruction",
            of="multiply-adds",
            make=lambda k: AsymmetricNonlinear(speedup=float(k), images=300),
        ),
        Way(
            name="[17] CP",
            make=lambda k: CpDecomposition(share=k, epochs=0, sweeps=20, iterations=10),
            knobs=SHARES,
            **fewer,
        ),
        Way(name="[18] biclusters, outer products", make=lambda k: BiclusteredCp(speedup=k), knobs=SPEEDUPS, **fewer),
        Way(
            name="[18] biclusters, two SVDs",
            make=lambda k: BiclusteredSvd(ratio_in=k, ratio_out=k),
            knobs=SHARES,
            **fewer,
        ),
        Way(
            name="[22] two convolutions", make=lambda k: LowRankRegularization(share=k, epochs=0), knobs=SHARES, **fewer
        ),
        Way(
            name="[19] product quantisation",
            of="bytes",
            make=lambda k: ProductQuantization(conv_sub_dim=k[0], conv_codewords=k[1], images=100),
            knobs=tuple((size, words) for size in (4, 8) for words in (16, 32, 64, 128)),
            size=bytes_left,
            ordered=False,
        ),
        Way(
            name="[24] low rank plus sparse",
            of="parameters",
            make=lambda k: LowRankAndSparse(budget=1 / k, sparse_share=0.5, images=100, sweeps=10),
            influence=zeros_kept,
        ),
        Way(
            name="[26] group-wise brain damage",
            make=lambda k: GroupBrainDamage(density=k, epochs=0, tuning=0),
            knobs=SHARES,
            whole=halves,
            kind="trained",
            **fewer,
        ),
        Way(
            name="[28] compression-aware training",
            of="parameters",
            make=lambda k: CompressionAwareTraining(share=k, warmup=0, epochs=0),
            knobs=SHARES,
            size=parameters_left,
            whole=halves,
            kind="trained",
        ),
        Way(name="[15] flattened", make=lambda k: Flattened(share=k, **drawn), **again),
        Way(name="[20] single intra-channel", make=lambda k: SicLayers(share=k, **drawn), **again),
        Way(name="[20] topological", make=lambda k: Topological(share=k, **drawn), **again),
        Way(name="[20] spatial bottleneck", make=lambda k: SpatialBottleneck(share=k, changing=True, **drawn), **again),
        Way(name="[21] low-rank filters", make=lambda k: LowRankFilters(join=False, share=k, **drawn), **again),
        Way(
            name="[29] lookups",
            of="parameters",
            make=lambda k: Lcnn(sizes=dictionaries(k, dense), **drawn),
            knobs=SHARES,
            size=parameters_left,
            influence=own,
            kind="taught",
        ),
    )


def of_layers() -> tuple[Way, ...]:
    """The ways for a perceptron."""
    fewer = {"of": "parameters"}
    layer = {"of": "parameters of its layer", "size": layer_left, "kind": "scratch", "whole": tuned}
    return (
        Way(name="[11] SVD restructuring", make=lambda k: SvdRestructuring(budget=1 / k, epochs=0), **fewer),
        Way(
            name="[28] compression-aware training",
            make=lambda k: CompressionAwareTraining(share=k, warmup=0, epochs=0),
            knobs=SHARES,
            size=parameters_left,
            whole=halves,
            kind="trained",
            **fewer,
        ),
        Way(name="[23] low-rank output", make=lambda k: LowRankOutput(rank=k, epochs=0), knobs=range(1, 60), **layer),
        Way(
            name="[27] rank-constrained first layer",
            make=lambda k: RankConstrainedTopology(rank=k, epochs=0),
            knobs=range(1, 16),
            **layer,
        ),
    )


def of_words() -> tuple[Way, ...]:
    """The ways for the output layer of a language model."""
    return (
        Way(
            name="[11] SVD restructuring",
            of="parameters of its layer",
            make=lambda k: SvdRestructuring(rank=k, epochs=0),
            knobs=range(4, 128, 2),
            size=layer_left,
        ),
        Way(
            name="[25] SVD-softmax",
            of="multiply-adds of its layer",
            make=lambda k: SvdSoftmax(window=k, full_view=0.05, layer="head"),
            knobs=SHARES,
            size=softmax_left,
            kind="inference",
        ),
        Way(
            name="[23] low-rank output",
            of="parameters of its layer",
            make=lambda k: LowRankOutput(rank=k, epochs=0),
            knobs=range(4, 128, 2),
            size=layer_left,
            whole=tuned,
            kind="scratch",
        ),
    )
