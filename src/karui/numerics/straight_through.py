"""Quantisers to k bits whose gradient goes straight through the rounding.

Zhou, Wu, Ni, Zhou, Wen and Zou 2016, "DoReFa-Net" (arXiv 1606.06160), as Zhuang, Shen, Tan, Liu and Reid 2018, "Towards
Effective Low-bitwidth Convolutional Neural Networks" (survey 38), take it: equations 5 to 9 there.

A grid is a value, called with a tensor of real numbers (a latent weight, an activation), which gives the quantised
tensor with a gradient; its `codes` are the same as whole numbers. What trains keeps the real numbers and sees the
quantised ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require

REAL = 32
"""Bits of a number that is not quantised."""
MOST_BITS = 16
"""The widest code: beyond, a 32-bit number cannot tell neighbouring levels of a sum apart."""


class _Round(torch.autograd.Function):
    """Rounding, half to even, whose derivative is taken as 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradient


def levels(bits: int) -> int:
    """Steps between the lowest and the highest of 2^k levels.

    Example:
        >>> levels(2)
        3
    """
    return 2**bits - 1


def quantise_unit(z: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Q_k of numbers in [0, 1]: the nearest of 2^k even levels, with a straight-through gradient (equation 5).

    Example:
        >>> quantise_unit(torch.tensor([0.1, 0.2, 0.9]), 2)
        tensor([0.0000, 0.3333, 1.0000])
    """
    if bits >= REAL:
        return z
    return _Round.apply(z * levels(bits)) / levels(bits)  # pyright: ignore[reportOperatorIssue]


def squashed(latent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A tensor of weights brought into [0, 1] by tanh, its largest magnitude to an end (inside of equation 6).

    The largest magnitude is taken as a constant: it has no gradient of its own.
    """
    bent = latent.tanh()
    return bent / (2 * bent.detach().abs().max().clamp(min=torch.finfo(latent.dtype).tiny)) + 0.5


@dataclass(frozen=True)
class WeightGrid:
    """The quantiser of a layer's weight: w_q = scale (2 Q_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1), equation 6.

    There are 2^k levels, symmetric about zero, which is none of them. One bit gives the two signs.

    Settings:
        bits: 1 to 16; 32 leaves the weight as it is.
        scale: of the outermost level.

    Example:
        >>> WeightGrid(2)(torch.tensor([-2.0, 0.1, 0.5]))
        tensor([-1.0000,  0.3333,  0.3333])
    """

    bits: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_bits(bits=self.bits)

    def __call__(self, latent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The quantised weight, with a gradient towards the latent one."""
        if self.bits >= REAL:
            return latent
        return self.scale * (2 * quantise_unit(squashed(latent), self.bits) - 1)

    def codes(self, latent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Numbers of the levels, 0 to 2^k - 1: the weight is scale (2 code / (2^k - 1) - 1)."""
        return (squashed(latent.detach()) * levels(self.bits)).round()


@dataclass(frozen=True)
class InputGrid:
    """The quantiser of a layer's inputs: x_q = reach Q_k(clip(x / reach, 0, 1)), equations 8 and 9.

    The gradient is 1 where nothing was clipped, its ends included, and 0 elsewhere.

    Settings:
        bits: 1 to 16; 32 leaves the inputs as they are.
        reach: the largest magnitude; 1 in the paper.
        signed: whether levels lie in [-reach, reach], symmetric about zero as those of weights are.

    Example:
        >>> InputGrid(2)(torch.tensor([-1.0, 0.3, 7.0]))
        tensor([0.0000, 0.3333, 1.0000])
    """

    bits: int
    reach: float = 1.0
    signed: bool = False

    def __post_init__(self) -> None:
        require_bits(bits=self.bits)
        require(self.reach > 0, f"reach is {self.reach}; give a positive number, for example 1")

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The quantised inputs, with a gradient."""
        if self.bits >= REAL:
            return x
        code: Any = _Round.apply(_within(x, self.bits, self.reach, self.signed))
        return (2 * code - levels(self.bits) if self.signed else code) * (self.reach / levels(self.bits))

    def codes(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Whole numbers of which the quantised inputs are multiples, by reach / (2^k - 1)."""
        return input_codes(x, self.bits, self.reach, self.signed)


def input_codes(x: Float[Tensor, "*shape"], bits: int, reach: Any, signed: bool) -> Float[Tensor, "*shape"]:
    """The codes of an `InputGrid`: 0 to 2^k - 1, or every second number from -(2^k - 1) to 2^k - 1.

    Example:
        >>> input_codes(torch.tensor([-0.9, 0.4]), 2, 1.0, True)
        tensor([-3.,  1.])
    """
    code = _within(x, bits, reach, signed).round()
    return 2 * code - levels(bits) if signed else code


def _within(x: Tensor, bits: int, reach: Any, signed: bool) -> Tensor:
    """Inputs in steps from the lowest level, clipped to lie between the lowest and the highest."""
    steps = x * (levels(bits) / (2 * reach)) + levels(bits) / 2 if signed else x * (levels(bits) / reach)
    return steps.clamp(0, levels(bits))


def require_bits(**bits: int) -> None:
    """Refuse a width that is neither 1 to 16 nor 32, by the name of its setting."""
    for name, value in bits.items():
        fits = 1 <= value <= MOST_BITS or value == REAL
        require(fits, f"{name} is {value}; give 1 to {MOST_BITS}, or {REAL} for numbers that are not quantised")


def fitted_scale(grid: WeightGrid, latent: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]) -> float:
    """The scale at which the quantised latent weight is nearest to `target`, in least squares.

    Example:
        >>> w = torch.tensor([-0.4, 0.4])
        >>> round(fitted_scale(WeightGrid(1), w, w), 4)
        0.4
    """
    made, wanted = WeightGrid(grid.bits)(latent.detach()).double(), target.detach().double()
    scale = float((made * wanted).sum() / made.square().sum().clamp(min=1e-300))
    return _single(scale) if scale > 0 else 1.0


def fitted_reach(values: Float[Tensor, "values"], bits: int, *, signed: bool, tries: int = 64) -> float:
    """The reach at which inputs are quantised with the smallest mean square error, of so many shares of the largest.

    Few bits prefer to clip what is rare to spreading their levels over it.

    Example:
        >>> fitted_reach(torch.tensor([0.0, 0.0, 1.0, 3.0]), 8, signed=False)
        3.0
    """
    largest = float((values.abs() if signed else values).max()) if len(values) else 0.0
    if largest <= 0 or bits >= REAL:
        return 1.0
    shares = [_single(largest * (number + 1) / tries) for number in range(tries)]
    return min(shares, key=lambda reach: float((InputGrid(bits, reach, signed)(values) - values).square().mean()))


def _single(value: float) -> float:
    """The nearest number of 32 bits, so that a stored layer computes with the same one."""
    return float(torch.tensor(value, dtype=torch.float32))
