"""What a proof measured, and when that shows that two models are equal."""

from __future__ import annotations

from dataclasses import dataclass

# How far above the measured floor two equal computations may lie: the order of their sums differs.
SLACK = 256.0
# How far above the tolerance the units' effect must lie, for equality to mean anything.
CLEAR = 1e3
# An effect below this share of the output may be the rounding of single precision, and is measured in double.
FAINT = 1e-3


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
