"""Transfer sets that are made: pseudo data grown from the inputs of a data set (survey 36)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from karui.data import Batches
from karui.errors import DataError, require
from karui.measuring.bar import bar
from karui.numerics.munge import Neighbours, independent, munge
from karui.numerics.naive_bayes import naive_bayes

Generator = Literal["munge", "random", "nbe"]
GENERATORS = ("munge", "random", "nbe")


@dataclass(frozen=True, kw_only=True)
class Pseudo:
    """How pseudo data are made. What comes out has no labels: a teacher gives them.

    Settings:
        generator: "munge"; or one of the paper's controls: "random", attributes drawn independently of one another,
            "nbe", a mixture of naive-Bayes clusters.
        copies: how many times as many samples as there are.
        swap: probability that an attribute is exchanged between neighbours (munge).
        tightness: the larger, the closer an exchanged attribute is to the neighbour's (munge).
        nominal: attributes whose numbers are names, counted along the flattened input; whole-number inputs all are.
        neighbours: whether neighbours are found among the rows as they have become, "current", or "original" (munge).
        clusters: of the mixture; None finds a number (nbe).

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> made = Pseudo(copies=3).grow(TensorDataset(torch.rand(5, 1, 2, 2), torch.zeros(5)), seed=0)
        >>> made.tensors[0].shape
        torch.Size([15, 1, 2, 2])
    """

    generator: Generator = "munge"
    copies: int = 10
    swap: float = 0.2
    tightness: float = 5.0
    nominal: tuple[int, ...] = ()
    neighbours: Neighbours = "current"
    clusters: int | None = None

    def __post_init__(self) -> None:
        require(self.generator in GENERATORS, f"generator is {self.generator!r}; choose from {', '.join(GENERATORS)}")
        require(self.copies >= 0, f"copies is {self.copies}; give a number from 0")
        require(0 <= self.swap <= 1, f"swap is {self.swap}; give a probability in [0, 1], for example 0.2")
        require(self.tightness > 0, f"tightness is {self.tightness}; give a positive number, for example 5")
        require(all(c >= 0 for c in self.nominal), f"nominal is {self.nominal}; give attributes counted from 0")
        require(
            self.neighbours in ("current", "original"),
            f"neighbours is {self.neighbours!r}; choose from current, original",
        )
        require(self.clusters is None or self.clusters >= 1, f"clusters is {self.clusters}; give a number from 1")

    def grow(self, dataset: Any, seed: int, *, progress: bool = False) -> TensorDataset:
        """Inputs alone, of the shape and type of the data set's.

        Args:
            dataset: samples of one input tensor each; targets are not looked at.
            seed: of all draws.
            progress: whether a bar is shown.

        Raises:
            DataError: samples are not of one input tensor.
        """
        inputs = inputs_of(dataset)
        columns = inputs[0].numel()
        nominal = self.nominal if inputs.is_floating_point() else range(columns)
        made = self._made(inputs.flatten(1).double().numpy(), nominal, seed, progress)
        return TensorDataset(torch.from_numpy(made).to(inputs.dtype).reshape(-1, *inputs.shape[1:]))

    def _made(self, table: np.ndarray, nominal: Sequence[int], seed: int, progress: bool) -> np.ndarray:
        rows = self.copies * len(table)
        if self.generator == "random":
            return independent(table, rows=rows, seed=seed)
        if self.generator == "nbe":
            return naive_bayes(table, nominal=nominal, clusters=self.clusters, seed=seed).draw(rows, seed)
        with bar("munge", rows, progress) as advance:
            return munge(
                table, copies=self.copies, swap=self.swap, tightness=self.tightness, nominal=nominal, seed=seed,
                neighbours=self.neighbours, wait=lambda numbers: _told(numbers, advance),
            )  # fmt: skip


def _told(numbers: Any, advance: Callable[..., None]) -> Any:
    """The numbers, each hundredth of which moves the bar."""
    for number in numbers:
        yield number
        if number % 100 == 99:
            advance(100)


def inputs_of(dataset: Any) -> Tensor:
    """All inputs of a data set, one below the other.

    Raises:
        DataError: samples are not of one input tensor each.

    Example:
        >>> inputs_of(TensorDataset(torch.zeros(3, 2), torch.zeros(3))).shape
        torch.Size([3, 2])
    """
    batches = Batches(dataset)
    parts = [batches.fetch(index)[0] for index in torch.arange(len(batches)).split(256)]
    require(
        bool(parts) and all(len(part) == 1 and isinstance(part[0], Tensor) for part in parts),
        "Pseudo data are made of samples of one input tensor each.",
        "Put the columns of a table into one tensor.",
        DataError,
    )
    return torch.cat([part[0] for part in parts])
