"""Several models trained together on a bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from karui.model import Model
from karui.train import Influence, Together
from karui.train.joint import Joint, Member, Pull, joined, member_turns

if TYPE_CHECKING:
    from karui.technique.bench import Bench


def fit_together(
    models: Sequence[Model],
    bench: Bench,
    *,
    pull: Pull,
    layers: Sequence[str] = (),
    alternating: bool = True,
    influences: Mapping[int, Influence] | None = None,
    epochs: int | None = None,
    label: str = "joint",
) -> tuple[Model, ...]:
    """Trained copies of several models, each pulled towards what the others say.

    The bench's own influence acts on the first model and on those of its structure, which it was made for.

    Args:
        models: at least one; the first one's task gives the hard loss of all.
        bench: with training data.
        pull: makes a member's loss, see `karui.train.joint.Pull`.
        layers: paths, in each model, of the layers whose outputs `pull` is shown.
        alternating: whether each member sees the others' updates of the same step that came before its own.
        influences: what acts on single members, by number.
        epochs: passes over the training data; None takes the number of the bench's training.
        label: what the progress bar and the checkpoint are called.

    Raises:
        NeedError: there is no task or no training data.
        TrainingError: the loss stopped being finite.
    """
    whole = joined(models)
    assert whole.task is not None  # noqa: S101  (joined refuses it)
    parts = [Member(number, part) for number, part in sorted((influences or {}).items())]
    if bench.influence is not None:
        alike = [number for number, model in enumerate(models) if _shapes(model) == _shapes(models[0])]
        parts = [*(Member(number, bench.influence) for number in alike), *parts]
    turns = member_turns(whole.task, len(models), pull, layers=layers, alternating=alternating)
    trained = replace(bench, influence=None).fit(
        whole, epochs=epochs, influence=Together(*parts) if parts else None, turns=turns, label=label
    )
    assert isinstance(trained.module, Joint)  # noqa: S101  (influences act on members)
    note = trained.lineage[-1]
    return tuple(model.evolve(member, note) for model, member in zip(models, trained.module.members, strict=True))


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.module.state_dict().items()}
