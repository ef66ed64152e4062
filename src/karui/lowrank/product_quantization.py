"""Product quantisation: Wu, Leng, Wang, Hu, Cheng 2016, "Quantized Convolutional Neural Networks for Mobile Devices",
CVPR, arXiv 1512.06473 (survey 19). It is no low-rank method, but stands in that chapter of the survey.

The inputs of a layer are split into subspaces of a few channels. In each, the vectors of all filters, at all positions
of the kernel, are replaced by the nearest of few codewords, so that a vector is stored as a code of a few bits. Then
codewords and codes are corrected so that the layer's responses, not its weights, come out right, on what the layers
below, quantised already, deliver. No labels and no training.

It pays in bytes: 10 to 20 times, most for large linear layers. It pays in time for large linear layers of 16 codewords
by tables (`lookup`), with numba: twice as fast as the dense layer at 4096 inputs. It does not pay in time otherwise:
what is decoded takes longer than the dense layer, and so do tables of many codewords, and look-ups in plain torch and
in other engines. Nor does it pay for small layers, whose codebooks weigh as much as they do.

Paper -> here: `C_s`, `C_t` -> inputs, outputs, `C'_s` -> sub_dim, `K` -> codewords, `D` -> books, `B` -> codes, `S` ->
what the layer sees.

DEPARTURE: codewords of one subspace are solved for together, over all outputs and all positions of the kernel that they
meet at, and from the second moments of calibration inputs; the paper solves for one after the other, from the inputs.

DEPARTURE: a hundredth of isotropic inputs is added to those seen, so that codewords for inputs that calibration hardly
shows stay of the weights' size. On a perceptron of 784-768-768 for MNIST, 500 pictures, the error of the outputs on
others falls from 0.49 to 0.10 by it.

DEPARTURE: where subspaces do not part the channels evenly the next smaller size that does is taken, and said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.layers.product_quantized import MOST_CODEWORDS, quantized_layer
from karui.lowrank._calibrate import Calibration, regularised
from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out
from karui.lowrank._per_layer import Offering, PerLayer
from karui.lowrank._scan import Seen, groups_of, scan
from karui.lowrank._watching import Shelf, watched
from karui.model import replace_layers
from karui.numerics.product_codes import ProductCode, Quadratic, corrected, product_code, stored_bytes
from karui.numerics.unfold import split_groups
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need


@technique(
    Card(
        survey=19,
        slug="product_quantization",
        title="Quantized Convolutional Neural Networks for Mobile Devices",
        kind="replace",
        needs=("calibration",),
        reduces=("parameters", "bytes"),
        identity={"codewords": 0, "conv_codewords": 0},
        quick={"codewords": 16, "conv_codewords": 16, "images": 100, "sweeps": 1, "turns": 1},
        arxiv="1512.06473",
        pays="bytes of large linear layers and of convolutions with many channels, with inputs at hand and no labels",
        costs="small layers; time, but for large linear layers of 16 codewords by tables, with numba (karui[fast])",
    )
)
@dataclass(frozen=True, kw_only=True)
class ProductQuantization(PerLayer, Offering):
    """Store every linear layer and convolution as codebooks and codes, corrected for its responses.

    Settings:
        sub_dim: channels of a subspace of a linear layer.
        codewords: of each subspace of a linear layer, up to 256; 0 leaves linear layers.
        conv_sub_dim: channels of a subspace of a convolution.
        conv_codewords: of each subspace of a convolution, up to 256; 0 leaves convolutions.
        layers: single layers, as (path, sub_dim, codewords); they go before the other settings.
        correct: whether responses are corrected after k-means on the weights.
        chained: whether a layer is corrected on the inputs that the quantised layers below give.
        images: calibration inputs.
        positions: random positions of each layer's output that are looked at, for each input.
        sweeps: passes of the correction over all subspaces.
        turns: of codewords and codes in each subspace, in a pass.
        lookup: whether the layers' forward pass goes by tables of products, as in the paper, or by the decoded weight.
        skip: paths of layers to leave.

    Needs: calibration inputs, unless `correct` is off.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs.

    Relations: a dictionary of whole channel vectors, trained with sparse mixtures, is LCNN (29).

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Linear(256, 100), example=(torch.zeros(1, 256),))
        >>> light = ProductQuantization(sub_dim=8, codewords=16, correct=False).apply(model, karui.Bench())
        >>> light.module.bits()
        {'books': 131072, 'codes': 12800, 'bias': 3200}
    """

    kept: ClassVar[bool] = True  # k-means takes its time, and codebooks and codes weigh a fraction of the layer

    sub_dim: int = 4
    codewords: int = 32
    conv_sub_dim: int = 8
    conv_codewords: int = 128
    layers: tuple[tuple[str, int, int], ...] = ()
    correct: bool = True
    chained: bool = True
    images: int = 500
    positions: int = 20
    sweeps: int = 2
    turns: int = 2
    lookup: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple((path, size, words) for path, size, words in self.layers))
        object.__setattr__(self, "skip", tuple(self.skip))
        for path, size, words in self.layers:
            within = size >= 1 and 1 <= words <= MOST_CODEWORDS
            require(within, f"layers has {size}, {words} for '{path}'; give a size from 1, and 1 to 256 codewords")
        for name in ("codewords", "conv_codewords"):
            value = getattr(self, name)
            require(0 <= value <= MOST_CODEWORDS, f"{name} is {value}; give 0 to {MOST_CODEWORDS}, for example 32")
        for name in ("sub_dim", "conv_sub_dim", "images", "positions", "sweeps", "turns"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give a number from 1")

    def needs(self) -> tuple[Need, ...]:
        """What these settings need: k-means looks at weights alone."""
        return ("calibration",) if self.correct else ()

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The quantised model."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        seen, left = self._scan(model)
        calibration, shelf = Calibration(model, bench, self.images, self.positions), Shelf.of(self, model, bench)
        current, layers, told = model, {}, list(left)
        with watched("quantise", len(seen), shown=bench.progress) as report:
            for done, one in enumerate(sorted(seen, key=lambda one: one.order)):
                choice = self.choice_for(one)
                if choice.replaced:
                    source = current if self.chained else model
                    report(done, one.path)
                    make = partial(self._build, one, choice, source, calibration)
                    layers[one.path], choice = shelf.layer(one, make)
                    current = replace_layers(current, {one.path: layers[one.path]}, check=False)
                told.append(choice)
        wanted = {"correct": self.correct, "chained": self.chained}
        return carry_out(model, told, layers, "Product quantisation", wanted)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, lambda _: "", self.skip)
        known = {choice.path: choice.reason for choice in left}
        for path, *_ in self.layers:
            why = known.get(path, "there is no such layer with a weight")
            found = any(one.path == path for one in seen)
            require(found, f"layers names '{path}', which cannot be quantised: {why}")
        return seen, left

    def choice_for(self, one: Seen) -> Choice:
        """The settings for a layer; it is left where codebooks and codes would weigh as much as it does."""
        linear = isinstance(one.layer, nn.Linear)
        asked, words = (self.sub_dim, self.codewords) if linear else (self.conv_sub_dim, self.conv_codewords)
        own = next(((size, words) for path, size, words in self.layers if path == one.path), None)
        asked, words = own or (asked, words)
        if not words:
            return Choice(one.path, reason=f"{'' if linear else 'conv_'}codewords is 0")
        weight, groups = one.layer.weight, groups_of(one)
        filters, channels = weight.shape[0], weight.shape[1]
        size = max(part for part in range(1, min(asked, channels) + 1) if channels % part == 0)
        taps = weight[0, 0].numel()
        # Each group has codebooks of its own; its filters have codes for its channels alone.
        each = weight.element_size()
        held = stored_bytes(channels, size, words, filters, taps, each=each) + each * channels * (groups - 1) * words
        if held >= weight.nbytes:
            told = f"{words} codewords of {size} channels would not save bytes ({weight.nbytes:,} -> {held:,})"
            return Choice(one.path, reason=told)
        bias, books = filters if one.layer.bias is not None else 0, channels * groups * words
        dense = one.outputs * weight.numel()
        uneven = "" if size == min(asked, channels) else f"subspaces of {asked} do not part {channels} channels"
        sums = one.outputs * filters * taps * (channels // size)
        added = f"{sums:,} additions of what is looked up" if self.lookup else ""
        return Choice(
            one.path,
            ranks=(size, words),
            full=(channels, filters * taps),
            parameters=(weight.numel() + bias, books + bias),
            macs=(dense, one.inputs * books if self.lookup else dense),
            remark="; ".join(filter(None, (uneven, added))),
            form=f"{channels // size} subspaces, {words} codewords, {weight.nbytes:,} -> {held:,} bytes",
        )

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[ProductQuantization, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        linear = isinstance(one.layer, nn.Linear)
        size, most = (self.sub_dim, 2 * self.codewords) if linear else (self.conv_sub_dim, 2 * self.conv_codewords)
        words = min(MOST_CODEWORDS, max(1, int(most / speedup)))
        alone = replace(
            self, codewords=0, conv_codewords=0, layers=((one.path, size, words),), correct=False, lookup=False
        )
        return alone, alone.choice_for(one)

    def pays(self, choice: Choice) -> bool:
        """For a budget: codebooks save bytes, and no multiply-adds."""
        return choice.parameters[1] < choice.parameters[0]

    def evidence(self, model: Model, one: Seen, bench: Bench) -> tuple[Model, Calibration]:
        """For a budget: what it would be corrected on."""
        del one
        return model, Calibration(model, bench, self.images, self.positions)

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the layer of codebooks by k-means, uncorrected."""
        del bench
        return self._build(one, choice, *evidence)[0]

    def _build(self, one: Seen, choice: Choice, source: Model, calibration: Calibration) -> tuple[nn.Module, Choice]:
        """The layer, and what was chosen with its error: of responses if they were corrected, else of the weight."""
        kernels = split_groups(one.layer.weight.detach().double(), groups_of(one))
        kernels = kernels.reshape(*kernels.shape[:3], -1)
        size, words = choice.ranks
        codes = [product_code(kernel, size, words, calibration.bench.seed) for kernel in kernels]
        made = torch.stack([code.kernel() for code in codes])
        error, remark = float((made - kernels).norm() / kernels.norm().clamp(min=1e-300)), choice.remark
        if self.correct:
            codes, before, error = self._corrected(one, kernels, codes, source, calibration)
            told = f"error of responses {before:.4f} -> {error:.4f}"
            remark = f"{remark}; {told}" if remark else told
        return quantized_layer(one.layer, codes, lookup=self.lookup), replace(choice, error=error, remark=remark)

    def _corrected(
        self, one: Seen, kernels: Tensor, codes: list[ProductCode], source: Model, calibration: Calibration
    ) -> tuple[list[ProductCode], float, float]:
        """The corrected codes, and the relative error of responses before and after."""
        moments = calibration.moments(source, one)
        bias = one.layer.bias
        biases: Any = [None] * len(codes) if bias is None else bias.detach().chunk(len(codes))
        wanted = [Quadratic.of(each, own) for each, own in zip(moments, biases, strict=True)]
        total = max(sum(each.yy for each in wanted), 1e-300)

        held = [regularised(each, kernel, centred=False) for each, kernel in zip(moments, kernels, strict=True)]
        fixed = [
            corrected(code, Quadratic.of(each, own), sweeps=self.sweeps, turns=self.turns)
            for code, each, own in zip(codes, held, biases, strict=True)
        ]
        lost = [
            sum(each.error(code.kernel()) for code, each in zip(side, wanted, strict=True)) for side in (codes, fixed)
        ]
        return fixed, (lost[0] / total) ** 0.5, (lost[1] / total) ** 0.5
