"""Flattened convolutions (survey 15): one and two sets beside the dense network of 5x5 convolutions."""

from __future__ import annotations

from typing import Any

from _from_scratch import compare, lines, mean_of, vgg
from karui.lowrank import Flattened
from karui.model import Model
from karui.technique import Bench


def dense(seed: int) -> Model:
    return vgg(seed, (16, 64, 64), kernel=5, pools=(0, 1), norm=False)


def converted(seed: int, stages: int) -> Model:
    return Flattened(stages=stages, epochs=0).apply(dense(seed), Bench(seed=seed))


def claims(rows: dict[str, Any]) -> dict[str, bool]:
    two, one, whole = (mean_of(rows, name) for name in ("two sets", "one set", "dense"))
    return {
        "two sets within 1 point of dense": two > whole - 1,
        "at a fifth of the parameters or fewer": rows["two sets"]["parameters"] <= rows["dense"]["parameters"] / 5,
        "one set clearly worse on colour pictures (1 point)": one < two - 1,
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    return {"flattened_conv": lines(told, ["two sets", "one set"])}


def main() -> None:
    nets = {"dense": dense, "two sets": lambda seed: converted(seed, 2), "one set": lambda seed: converted(seed, 1)}
    compare("flattened_conv", "Flattened convolutions (15)", nets, claims, measured=measured, epochs=5)


if __name__ == "__main__":
    main()
