"""Which places exclude each other, among those whose costs are had only by carrying them out.

A layer that is timed at every width has a table that says what goes together. A cut that reaches a layer of another
kind (an embedding, a recurrent or grouped layer) has a table of its own, and so has a new layer that stands for no part
of the engine's graph. A new layer has the widths of the one it replaces: it does not go with a cut that shrinks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from karui.recipes.budget.choice import Table

if TYPE_CHECKING:
    from karui.model import Analysis
    from karui.technique import Candidate


def reached(candidates: Sequence[Candidate], replaced: Mapping[int, Set[str]], analysis: Analysis | None) -> set[str]:
    """Paths of the layers that any of a place's candidates changes.

    Args:
        candidates: of the place.
        replaced: the paths that those with new layers put them at, by the `id` of the candidate.
        analysis: the coupled groups that the others cut.
    """
    paths: set[str] = set()
    for candidate in candidates:
        paths |= replaced.get(id(candidate), set())
        if analysis is not None:
            paths |= {m.tensor.rpartition(".")[0] for name in candidate.cut for m in analysis[name].members}
    return paths


def exclusions(
    menu: Mapping[str, Sequence[Candidate]], whole: Set[str], reach: Mapping[str, Set[str]]
) -> Iterator[tuple[str, str]]:
    """Pairs of places of which one at most may change; cuts go together, as they are one surgery.

    Args:
        menu: the candidates of each place.
        whole: the places whose costs are had by carrying them out; of the others, tables say what goes together.
        reach: the paths of the layers that each place changes.
    """
    places = list(menu)
    for number, one in enumerate(places):
        for other in places[number + 1 :]:
            cuts = bool(menu[one][0].cut) and bool(menu[other][0].cut)
            if not cuts and whole & {one, other} and _meet(reach[one], reach[other]):
                yield one, other


def one_at_most(places: tuple[str, str], menu: Mapping[str, Sequence[Candidate]], quantities: Sequence[str]) -> Table:
    """A table that costs nothing, and lets one of two places change."""
    amount = np.zeros(tuple(len(menu[place]) + 1 for place in places))
    amount[1:, 1:] = np.inf
    return Table(places, dict.fromkeys(quantities, amount))


def _meet(some: Set[str], others: Set[str]) -> bool:
    """Whether a layer is among both, or lies within one of the others."""
    return any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a in some if a for b in others if b)
