"""Low-bitwidth networks: Zhuang, Shen, Tan, Liu and Reid 2018 (survey 38).

A network whose weights and activations have few bits is trained by three schemes that may be combined. Two steps:
first the weights alone are quantised, then the activations too. Progressive: bit widths fall step by step, each network
starting from the latent weights of the one before. Guided: a full-precision network of the same architecture trains
along on the same batches, and both are drawn to agree on feature maps, quantised alike.

Pays in bytes: k bits a weight, on disk and in the ONNX file. Does not pay in time: no engine here computes with 2 to 4
bits; codes are widened to 32 bits when the file is loaded, and rounding the activations comes on top, so that such a
network is slower than the dense one in ONNX Runtime, and far slower in plain torch, which widens them at every call.
For time take 8 bits (`karui.deployment`). Zero is no level, so it does not go with pruned weights; and a weight of few
bits is no parameter any more: counts of parameters tell of what is left beside the codes.

Measured on the digits at 2 bits, five seeds, all arms with the same epochs, dense 98.3 %. With 40 epochs: trained
directly 97.8, in two steps 97.6, progressively 97.3, guided 97.6, by all three 97.2. With 10: 96.9, 96.6, 95.9, 97.2
and 96.1: each stage of a short training is cut short. No scheme gains beyond chance on a network this small, in an
earlier run two steps by 0.4 points. At 4 bits nothing is lost either way. At what a guide costs, direct training for
three times the epochs reaches 97.7 and 98.0, and under soft targets [30] 97.5 and 98.2: not told apart from guided
training, and no worse (`results/guided_low_bit_training.md`).
`GuidedLowBit(two_step=False, through=(), guide=0)` trains directly.

Paper -> here: Q_k -> `quantise_unit`, k -> weight_bits and activation_bits, TS -> two_step, PQ -> through, lambda ->
guide, mu and nu -> the outputs of `layers` in either network.

DEPARTURE: levels end at a scale of each layer's own, fitted to what the full-precision network has there, rather than
at 1 (`fitted=False`). Networks without batch normalisation behind each layer would not survive the latter.

DEPARTURE: layers whose inputs are also negative have a grid symmetric about zero; clipped at 0, half would be lost.

DEPARTURE: R is a mean over elements and in units of its grid, so that `guide` means the same in every layer.

DEPARTURE: optimizer and schedule are those of the bench, anew in each stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from karui.distill._grids import SAMPLES, deepest_maps, fitted_grids, hint_grids, narrow_layers
from karui.errors import NeedError, SettingError, require, told
from karui.layers.low_bit import low_bit_layer
from karui.model import Model, layer_at, replace_layers
from karui.numerics.straight_through import MOST_BITS, REAL, InputGrid, WeightGrid, require_bits
from karui.technique import Card, require_passes, technique
from karui.technique.joint import fit_together
from karui.train.joint import Answer
from karui.train.latent import Grids, LatentWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from karui.technique import Bench


def map_difference(
    grid: InputGrid, full: Float[Tensor, "batch *shape"], low: Float[Tensor, "batch *shape"]
) -> Float[Tensor, ""]:
    """R: half the mean square difference of two networks' maps on one grid, in units of its reach (section 3.4).

    Example:
        >>> import torch
        >>> map_difference(InputGrid(1), torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.8]])).item()
        0.25
    """
    return ((grid(full) - grid(low)) / grid.reach).square().mean() / 2


@dataclass(frozen=True)
class Guided:
    """The loss of each of the two networks: its own hard loss, and the difference of the maps.

    Settings:
        grids: by path, the grid on which the maps of a layer are compared.
        weight: of the differences.
    """

    grids: Mapping[str, InputGrid]
    weight: float

    def __call__(
        self, number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]
    ) -> Float[Tensor, ""]:
        """Of either network, the other one's maps taken as they are: both gradients of R, each for its own network."""
        del number, targets
        if self.weight == 0:
            return hard
        for path, grid in self.grids.items():
            mine, theirs = own.layers.get(path), others[0].layers.get(path)
            require(
                isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape,
                f"'guided_low_bit_training': layer '{path}' gives {told(mine)} and {told(theirs)}.",
                "Name layers that give one tensor.",
                NeedError,
            )
            hard = hard + self.weight * map_difference(grid, mine, theirs)  # pyright: ignore[reportArgumentType]
        return hard


@dataclass(frozen=True)
class Stage:
    """One training on the way: bits of weights and of activations, and passes over the data."""

    weight_bits: int
    activation_bits: int
    epochs: int = 0


@technique(
    Card(
        survey=38,
        slug="guided_low_bit_training",
        title="Towards Effective Low-bitwidth Convolutional Neural Networks",
        kind="influence",
        needs=("labels", "training"),
        reduces=("bytes",),
        identity={"weight_bits": 32, "activation_bits": 32},
        quick={"weight_bits": 4, "activation_bits": 4, "epochs": 2},
        arxiv="1711.00205",
        pays="Bytes: a weight takes 2 to 4 bits on disk and in the ONNX file, at nearly the accuracy of 32.",
        costs="No time is saved, rather lost: engines have no kernels for so few bits. The guide costs a second "
        "training and gains nothing beyond chance over training directly or under soft targets [30]; in few passes the "
        "steps on the way lose about a point.",
    )
)
@dataclass(frozen=True, kw_only=True)
class GuidedLowBit:
    """Train a network to k bits, step by step and beside its full-precision self, and store it so.

    Settings:
        weight_bits: of the layers between the first and the last one, 1 to 16; 32 leaves the network as it is.
        activation_bits: of these layers' inputs, 1 to 16; 32 leaves activations as they are.
        end_bits: of weights and inputs of the first and the last layer, 1 to 16; 32 leaves these two as they are.
        two_step: whether weights reach their bits before activations are quantised.
        through: falling bit widths on the way to each of the two; those not above it are passed over.
        guide: weight of the difference of maps in both networks' losses; 0 trains without a guide.
        layers: paths of the layers whose outputs are compared; empty takes the ends of the two deepest stages.
        fitted: whether levels end at scales fitted to each layer, rather than at 1 as in the paper.
        skip: paths or patterns of layers that stay as they are.
        epochs: passes over the data of all stages together, shared out evenly; None takes the training's.

    Needs:
        Labels and training data. Start from a trained network to fine-tune, or from an untrained one.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: the layers compared give no tensors.
        SurgeryError: the network has no layer to quantise, or uses a layer's weights without calling it.

    Relations: `karui.deployment` quantises to 8 bits without training, which engines make faster. Zero is no level:
        weights that were pruned come back.

    Example:
        >>> [(s.weight_bits, s.activation_bits, s.epochs) for s in GuidedLowBit(weight_bits=2, epochs=9).stages(9)]
        [(8, 32, 2), (2, 32, 2), (2, 8, 2), (2, 4, 3)]
    """

    weight_bits: int = 4
    activation_bits: int = 4
    end_bits: int = 8
    two_step: bool = True
    through: tuple[int, ...] = (8,)
    guide: float = 0.1
    layers: tuple[str, ...] = ()
    fitted: bool = True
    skip: tuple[str, ...] = ()
    epochs: int | None = None

    def __post_init__(self) -> None:
        require_bits(weight_bits=self.weight_bits, activation_bits=self.activation_bits, end_bits=self.end_bits)
        require(
            self.weight_bits <= MOST_BITS or self.activation_bits == REAL,
            f"weight_bits is 32 and activation_bits {self.activation_bits}; give weights up to {MOST_BITS} bits, too",
        )
        falling = all(a > b for a, b in zip((REAL + 1, *self.through), (*self.through, 0), strict=True))
        require(falling, f"through is {self.through}; give falling numbers of bits, for example (8, 4)")
        for bits in self.through:
            require_bits(through=bits)
        require(0 <= self.guide < float("inf"), f"guide is {self.guide}; give a weight from 0, for example 0.1")
        if self.epochs is not None:
            require_passes(epochs=self.epochs)

    def stages(self, epochs: int) -> tuple[Stage, ...]:
        """The trainings on the way, in order; what does not share out evenly goes to the last ones."""
        steps = [bits for bits in self.through if bits < REAL]
        if self.two_step:
            widths = [(bits, REAL) for bits in (*steps, self.weight_bits) if bits >= self.weight_bits]
            widths += [
                (self.weight_bits, bits) for bits in (*steps, self.activation_bits) if bits >= self.activation_bits
            ]
        else:
            final = (self.weight_bits, self.activation_bits)
            widths = [(max(bits, final[0]), max(bits, final[1])) for bits in steps] + [final]
        widths = list(dict.fromkeys(widths))
        each, rest = divmod(epochs, len(widths))
        shares = [each + (number >= len(widths) - rest) for number in range(len(widths))]
        return tuple(Stage(w, a, share) for (w, a), share in zip(widths, shares, strict=True))

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        paths = narrow_layers(model, self.skip)
        way = " -> ".join(f"{s.weight_bits}/{s.activation_bits}" for s in self.stages(0))
        return (
            f"{len(paths)} layers, the first and the last one at {self.end_bits} bits",
            f"bits of weights/activations on the way: {way}",
            "bytes shrink, time does not: engines widen the codes to 32 bits",
        )

    def apply(self, model: Model, bench: Bench) -> Model:
        """The network of few bits, its weights stored as such."""
        if self.weight_bits == REAL:
            return model
        low, _, grids = self.study(model, bench)
        return stored(low, grids)

    def study(self, model: Model, bench: Bench) -> tuple[Model, Model, dict[str, Grids]]:
        """The network with its latent weights, the full-precision one that guided it, and the grids of its layers.

        Args:
            model: where both start.
            bench: with training data.
        """
        paths = narrow_layers(model, self.skip)
        bits = self._bits(paths, Stage(self.weight_bits, REAL))
        stored(model, {path: Grids(WeightGrid(one), InputGrid(REAL)) for path, (one, _) in bits.items()})  # or refused
        full, low, grids = model, model, {}
        epochs = bench.training.epochs if self.epochs is None else self.epochs
        for stage in self.stages(epochs):
            bits = self._bits(paths, stage)
            unit = () if self.fitted else paths[1:-1]
            grids = fitted_grids(low, grids, bits, bench.calibration(samples=SAMPLES), unit=unit)
            if stage.epochs:
                full, low = self._trained((full, low), grids, stage, bench)
        return low, full, grids

    def _bits(self, paths: tuple[str, ...], stage: Stage) -> dict[str, tuple[int, int]]:
        """By path, the bits of weight and inputs in a stage."""
        ends = {paths[0], paths[-1]} if paths else set()
        # The ends' inputs wait for the second step like all others.
        inputs = self.end_bits if stage.activation_bits < REAL else REAL
        bits = {
            path: (self.end_bits, inputs) if path in ends else (stage.weight_bits, stage.activation_bits)
            for path in paths
        }
        return {path: one for path, one in bits.items() if one[0] < REAL}

    def _trained(
        self, models: tuple[Model, Model], grids: dict[str, Grids], stage: Stage, bench: Bench
    ) -> tuple[Model, Model]:
        """Both networks after a stage; without a guide the full-precision one stays as it was."""
        full, low = models
        latent, label = LatentWeights(grids), f"{stage.weight_bits}/{stage.activation_bits} bits"
        if self.guide == 0:
            return full, bench.fit(low, epochs=stage.epochs, influence=latent, label=label)
        layers = self.layers or deepest_maps(full, tuple(grids))
        width = stage.activation_bits if stage.activation_bits < REAL else self.activation_bits
        batches = bench.calibration(samples=SAMPLES)
        pull = Guided(hint_grids(full, layers, width, batches, unit=not self.fitted), self.guide)
        full, low = fit_together(
            models, bench, pull=pull, layers=layers, alternating=False,
            influences={1: latent}, epochs=stage.epochs, label=label,
        )  # fmt: skip
        return full, low


def stored(model: Model, grids: Mapping[str, Grids]) -> Model:
    """The model whose layers hold what these grids make of their latent weights.

    Raises:
        SettingError: there is none.
    """
    require(
        len(grids) > 0,
        "The network has no linear layer or convolution to quantise.",
        "Give end_bits below 32 where there are only a first and a last one, and skip fewer.",
        SettingError,
    )
    new = {path: low_bit_layer(layer_at(model.module, path), one.weight, one.inputs) for path, one in grids.items()}  # pyright: ignore[reportArgumentType]
    return replace_layers(model, new)
