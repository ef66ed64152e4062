"""Low-rank filters from scratch (survey 21): its variants beside the dense network, and its initialisation."""

from __future__ import annotations

from typing import Any

from _from_scratch import compare, lines, mean_of, vgg
from karui.lowrank import LowRankFilters
from karui.model import Model
from karui.technique import Bench

VARIANTS: dict[str, dict[str, Any]] = {
    "lr": {"join": False},
    "lr-2x (joined)": {"filters": 2.0},
    "lr-join": {},
    "lr-join-wfull": {"full": 0.25},
}


def dense(seed: int) -> Model:
    return vgg(seed, (24, 24, 48, 48, 64, 64), pools=(1, 3))


def converted(seed: int, settings: dict[str, Any]) -> Model:
    return LowRankFilters(epochs=0, **settings).apply(dense(seed), Bench(seed=seed))


def claims(rows: dict[str, Any]) -> dict[str, bool]:
    return {
        "lr-join within 0.7 points of dense": mean_of(rows, "lr-join") > mean_of(rows, "dense") - 0.7,
        "at 60 % of its multiply-adds or less": rows["lr-join"]["macs"] <= 0.6 * rows["dense"]["macs"],
        "a quarter of full filters is no worse than none": mean_of(rows, "lr-join-wfull") >= mean_of(rows, "lr-join"),
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    return {"low_rank_filters": lines(told, list(VARIANTS))}


def main() -> None:
    nets = {"dense": dense}
    for name, settings in VARIANTS.items():
        nets[name] = lambda seed, settings=settings: converted(seed, settings)
    compare("low_rank_filters", "Low-rank filters trained from scratch (21)", nets, claims, measured=measured)


if __name__ == "__main__":
    main()
