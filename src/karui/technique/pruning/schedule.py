"""Prune and retrain: all layers at once, or layer by layer with training in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from karui.errors import SurgeryError
from karui.model import Note, coupled_groups, remove_provable
from karui.technique.pruning.masking import silence
from karui.technique.pruning.plan import named
from karui.technique.pruning.selection import weakest

if TYPE_CHECKING:
    from karui.model import Group, Model
    from karui.technique.bench import Bench
    from karui.technique.pruning.criteria import Criterion

WHOLE = "left_whole"
"""In the settings of a note: the groups that stay whole because no cut of them can be proved, with the reason."""


def select(
    model: Model,
    bench: Bench,
    criterion: Criterion,
    groups: Sequence[Group],
    counts: Mapping[str, int],
    *,
    greedy: bool = False,
) -> tuple[dict[str, Int[Tensor, "removed"]], dict[str, Any]]:
    """The units to remove of each group, and what is told of the choice.

    Args:
        model: what is scored; left as it is.
        bench: data and seed for criteria that read them.
        criterion: scores; the smallest go.
        groups: what is cut, from the input on.
        counts: units to remove, by group.
        greedy: whether a layer is scored without what it reads from units that earlier layers lose (Li et al. 2017,
            section 3.2); otherwise every layer is scored as it stands.
    """
    chosen: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    scores = {} if greedy else criterion(model, groups, bench)
    working = model.copy() if greedy else model
    for group in groups:
        mine = criterion(working, [group], bench)[group.name] if greedy else scores[group.name]
        units = weakest(mine, counts[group.name])
        if greedy:
            silence(working.module, group, units)
        chosen[group.name], told[group.name] = units, _told(mine, units)
    return chosen, told


def _told(scores: Float[Tensor, "units"], units: Int[Tensor, "removed"]) -> dict[str, Any]:
    """What the lineage keeps of a choice: how many went, the strongest that went and the weakest that stayed."""
    gone = scores[units]
    kept = scores[[unit for unit in range(len(scores)) if unit not in set(units.tolist())]]
    return {
        "units": len(scores),
        "removed": len(units),
        "ratio": len(units) / len(scores),
        "strongest_removed": float(gone.max()),
        "weakest_kept": float(kept.min()),
    }


def cut_once(
    model: Model,
    bench: Bench,
    criterion: Criterion,
    counts: Mapping[str, int],
    *,
    label: str,
    greedy: bool = False,
    allow_normalisation: bool = False,
) -> Model:
    """The model with `counts` units fewer in each group, cut at once and not retrained.

    A group whose cut cannot be proved stays whole; the lineage tells why.

    Raises:
        SurgeryError: no group can be cut.
    """
    analysis, groups = named(model, counts)
    units, told = select(model, bench, criterion, groups, counts, greedy=greedy)
    light, whole = remove_provable(model, units, allow_normalisation=allow_normalisation, analysis=analysis)
    cut = {name: count for name, count in counts.items() if name not in whole}
    note = Note(
        f"{label}: {sum(cut.values())} units of {len(cut)} groups chosen "
        f"{'greedily' if greedy else 'independently'}{_told_whole(whole)}",
        {
            "criterion": label,
            "greedy": greedy,
            "groups": {name: told[name] for name in cut},
            **({WHOLE: whole} if whole else {}),
        },
    )
    return light.evolve(light.module, note)


def cut_layer_by_layer(
    model: Model,
    bench: Bench,
    criterion: Criterion,
    counts: Mapping[str, int],
    *,
    label: str,
    epochs: int,
    allow_normalisation: bool = False,
    after: Callable[[str, Model], None] | None = None,
) -> Model:
    """Cut one group, train, cut the next, from the input on: each is scored on the network as it then is.

    A group whose cut cannot be proved stays whole; the lineage tells why.

    Args:
        model: what is cut; left as it is.
        bench: data and training; every layer trains with the same seed and data order, whatever the criterion.
        criterion: scores; the smallest go.
        counts: units to remove, by group.
        label: the criterion's name, for the lineage and the progress bar.
        epochs: passes over the training data after each layer; 0 trains nothing.
        allow_normalisation: whether groups that a normalisation mixes may be cut.
        after: told each group's name and the model after its training.

    Raises:
        SurgeryError: no group can be cut.
    """
    order = [group.name for group in coupled_groups(model).groups if group.name in counts]
    whole: dict[str, str] = {}
    for number, name in enumerate(order, start=1):
        step = {name: counts[name]}
        try:
            model = cut_once(model, bench, criterion, step, label=label, allow_normalisation=allow_normalisation)
        except SurgeryError as refused:
            whole[name] = refused.message
            if len(whole) == len(order):
                raise
            continue
        if epochs:
            model = bench.fit(model, epochs=epochs, label=f"{label}: {name} ({number} of {len(order)})")
        if after is not None:
            after(name, model)
    cut = [name for name in order if name not in whole]
    note = Note(
        f"{label}: layer by layer, {epochs} epochs after each of {len(cut)} groups{_told_whole(whole)}",
        {"criterion": label, "order": cut, "epochs_each": epochs, **({WHOLE: whole} if whole else {})},
    )
    return model.evolve(model.module, note)


def _told_whole(whole: Mapping[str, str]) -> str:
    return f"; left whole, as no cut of them can be proved: {', '.join(whole)}" if whole else ""
