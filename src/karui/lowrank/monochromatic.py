"""Monochromatic first layers: Denton, Zaremba, Bruna, LeCun, Fergus 2014, "Exploiting Linear Structure Within
Convolutional Networks for Efficient Evaluation", NIPS, arXiv 1404.0736 (survey 18), section 3.2.1.

A filter over a picture's colours is nearly one spatial filter times one colour. The colours of all filters are
clustered, so that the picture is mixed into a few coloured maps once, and every filter convolves one of them.

It pays for first layers with many filters of a large kernel (5x5 and more). It does not pay on gray pictures, nor
deeper in a network, whose filters see more than one direction of their channels; `BiclusteredCp` is for those.

Paper -> here: `W_n` -> the filter over (channels, positions), `u_n` -> its colour, `C'` -> colours.

DEPARTURE: each spatial filter is fitted once more to the colour of its cluster (`refit`), which never raises the
error; without it the filter stays the leading singular vector, as in the paper.

DEPARTURE: a colour and its negative are one, and filters are flipped to fit; the authors' code relies on k-means alone.

DEPARTURE: an approximation of the weighted kernel, weighed back, is monochromatic no more; so in the metrics "maha" and
"datacov" the factors descend in the metric by back-propagation, all at once.

DEPARTURE: "maha" takes the class that the network puts first as the right one, where the authors know the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.errors import require
from karui.layers.monochromatic import mono_kernel, monochromatic_conv
from karui.lowrank._above import layer_by_layer
from karui.lowrank._biclusters import relative
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import require_data, require_fine_tuning, require_ranks
from karui.lowrank._metrics import metric_needs, metric_of, require_metric
from karui.lowrank._per_layer import Offering, PerLayer
from karui.lowrank._scan import Seen, scan
from karui.lowrank._watching import Shelf
from karui.numerics.clusters import kmeans
from karui.numerics.metrics import descend
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need


def monochrome(
    kernel: Float[Tensor, "filters channels taps"],
    colours: int,
    *,
    even: bool = False,
    refit: bool = True,
    restarts: int = 100,
    seed: int = 0,
) -> tuple[Float[Tensor, "colours channels"], Float[Tensor, "filters taps"], Int[Tensor, "filters"]]:
    """Colours, spatial filters and the colour of each filter (section 3.2.1): `W[n] ~ colours[labels[n]] filters[n]^T`.

    A colour is the mean of the unit vectors of its cluster, so it is shorter than 1 where they differ.
    """
    left, values, right = torch.linalg.svd(kernel.double(), full_matrices=False)
    found = kmeans(left[:, :, 0], colours, even=even, either_sign=True, restarts=restarts, seed=seed)
    filters = found.signs[:, None] * values[:, :1] * right[:, 0]
    if refit:
        own = found.centres[found.labels]
        filters = torch.einsum("nc,nct->nt", own, kernel.double()) / own.square().sum(1, keepdim=True).clamp(min=1e-300)
    return found.centres, filters, found.labels


_QUICK = 10
"""Random starts for a candidate of a budget."""


@technique(
    Card(
        survey=18,
        slug="monochromatic",
        title="Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"colours": 0, "ranks": ()},
        quick={"ranks": (("last", 6),), "restarts": 5},
        arxiv="1404.0736",
        pays="first layers on colour pictures with many filters of a large kernel",
        costs="gray pictures, inner layers; engines that are slow at depthwise layers (then take even colours)",
    )
)
@dataclass(frozen=True, kw_only=True)
class Monochromatic(PerLayer, Offering):
    """Let each filter of the first convolution see one of a few colours.

    Settings:
        colours: mixtures of the input's channels; 0 leaves the first convolution.
        ranks: colours of single convolutions, as (path, colours) pairs; they go before `colours`.
        even: whether all colours have the same number of filters, so that the layer is one grouped convolution.
        refit: whether each spatial filter is fitted again to its cluster's colour.
        metric: "l2", "maha" (weights that the loss is sensitive to count more) or "datacov" (responses count).
        images: calibration inputs of the two.
        positions: random positions of each that "datacov" looks at.
        iterations: most steps of descent in these metrics.
        restarts: random starts of the clusters.
        skip: paths of layers to leave.
        epochs: passes over the data after each layer, in which only the layers above it are trained.
        learning_rate: of these; None takes the bench's.

    Needs: nothing; calibration inputs for other metrics than "l2"; labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs, or nothing to train on.

    Relations: `BiclusteredCp` and `BiclusteredSvd`, for the layers above.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Conv2d(3, 32, 5), example=(torch.zeros(1, 3, 16, 16),))
        >>> light = Monochromatic(colours=4).apply(model, karui.Bench())
        >>> [tuple(part.weight.shape) for part in light.module.children()]
        [(4, 3, 1, 1), (32, 1, 5, 5)]
    """

    narrow: ClassVar[int] = 3

    colours: int = 6
    ranks: tuple[tuple[str, int], ...] = ()
    even: bool = False
    refit: bool = True
    metric: str = "l2"
    images: int = 256
    positions: int = 20
    iterations: int = 50
    restarts: int = 100
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, colours) for path, colours in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        require(self.colours >= 0, f"colours is {self.colours}; give 0 or more, for example 6")
        for path, colours in self.ranks:
            require(colours >= 1, f"ranks has {colours} for '{path}'; give a number from 1")
        require_metric(self.metric)
        for name in ("images", "positions", "restarts"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give a number from 1")
        require(self.iterations >= 0, f"iterations is {self.iterations}; give 0 or more, for example 50")
        require_fine_tuning(self.epochs, self.learning_rate)

    def needs(self) -> tuple[Need, ...]:
        """What these settings need: the plain metric looks at kernels alone."""
        return metric_needs(self.metric)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with monochromatic layers, the layers above trained if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("monochromatic", model, bench, self.epochs)

        def build(current: Model, one: Seen, choice: Choice) -> tuple[nn.Module, float, str]:
            return self._build(current, one, choice, bench)

        extra = {"metric": self.metric, "even": self.even}
        settings: Any = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        settings["shelf"] = Shelf.of(self, model, bench)
        seen = self._scan(model)[0]
        return layer_by_layer(
            model, bench, seen, self.choose(model), build, name="Monochromatic", extra=extra, **settings
        )

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, _objection, self.skip)
        require_ranks([path for path, _ in self.ranks], seen, left)
        return seen, left

    def choice_for(self, one: Seen) -> Choice:
        """The colours by the setting; the layer is left if they would not save anything."""
        own = dict(self.ranks).get(one.path)
        if own is None and not one.first:
            return Choice(one.path, reason="it is not the first convolution; name it in ranks to do it too")
        if own is None and not self.colours:
            return Choice(one.path, reason="colours is 0")
        filters, channels = one.layer.weight.shape[:2]
        colours = min(own or self.colours, filters)
        if self.even and filters % colours:
            return Choice(one.path, reason=f"its {filters} filters do not part into {colours} even colours")
        dense, bias = one.layer.weight.numel(), filters if one.layer.bias is not None else 0
        mix, spatial = channels * colours, filters * math.prod(one.layer.kernel_size)
        return unless_larger(
            Choice(
                one.path,
                ranks=(colours,),
                full=(filters,),
                parameters=(dense + bias, mix + spatial + bias),
                macs=(dense * one.outputs, mix * one.inputs + spatial * one.outputs),
                form=f"{colours} colours",
            )
        )

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[Monochromatic, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        filters, channels = one.layer.weight.shape[:2]
        spatial = filters * math.prod(one.layer.kernel_size) * one.outputs
        room = int((one.layer.weight.numel() * one.outputs / speedup - spatial) / (channels * one.inputs))
        bare = replace(self, ranks=(), metric="l2", restarts=_QUICK, epochs=0, even=False)
        if room < 1:
            return bare, Choice(one.path, reason=f"no number of colours is {speedup} times faster")
        choice = replace(bare, colours=room).choice_for(one)
        return replace(bare, colours=min(room, filters)), choice

    def evidence(self, model: Model, one: Seen, bench: Bench) -> Model:
        """For a budget: the network that the layer is part of."""
        del one, bench
        return model

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: its filters, clustered by colour."""
        return self._build(evidence, one, choice, bench)[0]

    def _build(self, model: Model, one: Seen, choice: Choice, bench: Bench) -> tuple[nn.Module, float, str]:
        """The layer, the relative error of its kernel, and what to tell of it."""
        kernel = one.layer.weight.detach().double().flatten(2)
        colours, filters, labels = monochrome(
            kernel, choice.ranks[0], even=self.even, refit=self.refit, restarts=self.restarts, seed=bench.seed
        )
        remark, metric = "", metric_of(self.metric, model, one, bench, images=self.images, positions=self.positions)
        if metric is not None:
            shape = one.layer.weight.shape

            def made_of(parts: Any) -> Tensor:
                return mono_kernel(parts[0], parts[1], labels).reshape(shape)

            wanted, start = kernel.reshape(shape), [colours, filters]
            found = descend(start, made_of, wanted, metric, self.iterations)
            lost = [relative(metric, wanted, made_of(parts)) for parts in (start, found)]
            remark, (colours, filters) = f"error in the metric {lost[0]:.4f} -> {lost[1]:.4f}", found
        error = float((mono_kernel(colours, filters, labels) - kernel).norm() / kernel.norm().clamp(min=1e-300))
        spatial = filters.unflatten(1, one.layer.kernel_size)
        return monochromatic_conv(one.layer, colours, spatial, labels, even=self.even), error, remark


def _objection(layer: Any) -> str:
    if isinstance(layer, nn.Linear):
        return "a linear layer has no filters in space to be coloured"
    if layer.groups > 1:
        return f"it is grouped ({layer.groups} groups), so that its filters see different channels"
    if layer.in_channels == 1:
        return "its input has one channel, and so no colours"
    return ""
