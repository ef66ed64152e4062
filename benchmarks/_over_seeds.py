"""What benchmarks of several ways over a few seeds share: networks on the digits, runs, their tables and claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from _common import CACHE, Ledger, interval, shown, table
from karui.data import Splits, load_data
from karui.layers.factored import FactoredConv
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

SEEDS = 3
Run = dict[str, dict[str, float]]
"""What one seed gave: by way, quantities by name."""


class Convolutions(nn.Module):
    """Convolutions on the 8x8 digits, averaged, and a linear layer.

    Args:
        widths: filters of each.
        kernel: its size.
        pooled: numbers of the convolutions after which the map is halved.
        norm: whether batch normalisation follows each.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 48, 48),
        *,
        kernel: int = 3,
        pooled: tuple[int, ...] = (1,),
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.convs = nn.ModuleList(nn.Conv2d(a, b, kernel, padding=kernel // 2) for a, b in pairwise((1, *widths)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for width in widths)
        self.head = nn.Linear(widths[-1], 10)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map."""
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            x = nn.functional.max_pool2d(x, 2) if depth in self.pooled else x
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.head(self.features(x).mean((2, 3)))


def convolutions(seed: int, *shape: tuple[int, ...], **settings: Any) -> Model:
    """That network, untrained."""
    torch.manual_seed(seed)
    return Model(Convolutions(*shape, **settings).eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def bench_of(data: Splits, seed: int, epochs: int, *, lr: float, batch: int = 32) -> Bench:
    """Adam, whose rate falls as a cosine; a training that was killed goes on."""
    return Bench(
        train=data.train,
        validation=data.validation,
        test=data.test,
        training=Training(epochs=epochs, batch_size=batch, optimizer=Adam(lr=lr), schedule=Cosine()),
        seed=seed,
        checkpoints=CACHE / "over_seeds",
    )


def digits_bench(seed: int, epochs: int, *, lr: float, batch: int = 32) -> Bench:
    """The same on the built-in digits."""
    return bench_of(load_data("digits"), seed, epochs, lr=lr, batch=batch)


def with_random_factors(model: Model) -> Model:
    """The same shapes, factored convolutions with weights as a fresh network draws them."""
    drawn = model.copy()
    for layer in drawn.module.modules():
        if isinstance(layer, FactoredConv):
            layer.reset_parameters()
    return drawn


def right(bench: Bench, model: Model) -> float:
    """Percent of the test samples."""
    return 100 * bench.evaluate(model, "test").value


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - wanted).norm() / wanted.norm())


@dataclass(frozen=True)
class Runs:
    """What all seeds gave, and claims about it."""

    seeds: Sequence[Run]

    def told(self) -> dict[str, dict[str, Any]]:
        """By way and quantity, the interval over the seeds."""
        first = self.seeds[0]
        return {
            way: {
                key: interval([run[way][key] for run in self.seeds]) for key in first[way] if self._always_has(way, key)
            }
            for way in first
        }

    def _always_has(self, way: str, key: str) -> bool:
        return all(key in run[way] for run in self.seeds)

    def mean(self, way: str, key: str = "accuracy") -> float:
        """Over the seeds."""
        return mean(run[way][key] for run in self.seeds)

    def always(self, less: str, more: str, key: str, share: float = 1.0) -> bool:
        """Whether in every seed one way's quantity is below that share of another's."""
        return all(run[less][key] < share * run[more][key] for run in self.seeds)

    def table(self, columns: Mapping[str, tuple[str, Callable[[dict[str, Any]], str]]]) -> str:
        """A row for each way: by quantity its heading, and how its interval is written."""
        rows = [
            [way, *(write(one[key]) if key in one else "" for key, (_, write) in columns.items())]
            for way, one in self.told().items()
        ]
        return table(["", *(head for head, _ in columns.values())], rows)


def over_seeds(name: str, one_seed: Callable[[int], Run], seeds: int = SEEDS, *, part: str = "seed") -> Runs:
    """The runs of a benchmark; finished ones are kept."""
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / f"{name}.json")
    return Runs([ledger.once(f"{part} {seed}", partial(one_seed, seed)) for seed in range(seeds)])


def percent(one: dict[str, Any]) -> str:
    """Two digits, with the interval."""
    return shown(one)


def small(one: dict[str, Any]) -> str:
    """Three digits, with the interval."""
    return f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def whole(one: dict[str, Any]) -> str:
    """The mean as a whole number."""
    return f"{one['mean']:,.0f}"


def sentence(
    told: dict[str, dict[str, Any]], key: str, write: Callable[[dict[str, Any]], str], ways: Sequence[str]
) -> str:
    """One quantity of several ways, for `karui show`."""
    return "; ".join(f"{way} {write(told[way][key])}" for way in ways)
