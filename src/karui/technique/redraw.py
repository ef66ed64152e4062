"""Initial values drawn anew: the network as it might have been before its training."""

from __future__ import annotations

import torch
from torch import nn

from karui.errors import UsageError, require
from karui.model import Model, Note, Origin, copied
from karui.train.randomness import seed_of, undisturbed


def redrawn(model: Model, seed: int) -> Model:
    """The model with initial values drawn under a seed.

    They are drawn by the factory that the model's origin names, its lineage replayed; where there is no origin, or its
    factory gives the same values whatever the seed (it loads weights, or sets a seed of its own), by the
    `reset_parameters` of each layer.

    Raises:
        UsageError: a layer's parameters cannot be drawn anew.

    Example:
        >>> model = Model(nn.Linear(3, 2), example=(torch.zeros(1, 3),))
        >>> bool((redrawn(model, 1).module.weight == redrawn(model, 1).module.weight).all())
        True
        >>> bool((redrawn(model, 1).module.weight == redrawn(model, 2).module.weight).all())
        False
    """
    if model.lineage and isinstance(model.lineage[0], Origin):
        built, other = (_rebuilt(model, seed_of(seed, draw)) for draw in ("own", "other"))
        if any(not torch.equal(a, b) for a, b in zip(built.parameters(), other.parameters(), strict=True)):
            return model.evolve(built, Note(f"initial values drawn anew, seed {seed}"))
    module = copied(model.module)
    with undisturbed():
        torch.manual_seed(seed_of(seed, "own"))
        _reset(module)
    return model.evolve(module, Note(f"initial values drawn anew, seed {seed}"))


def _rebuilt(model: Model, seed: int) -> nn.Module:
    with undisturbed():
        torch.manual_seed(seed)
        module = None
        for step in model.lineage:
            module = step.replay(module, model.example)
    assert module is not None  # noqa: S101  (an origin builds a module)
    return module.to(next((p.device for p in model.module.parameters()), torch.device("cpu")))


def _reset(module: nn.Module) -> None:
    for path, layer in sorted(module.named_modules(), key=_turn):
        own = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(own):
            own()
            continue
        require(
            not list(layer.parameters(recurse=False)),
            f"The layer '{path or 'itself'}' ({type(layer).__name__}) has parameters that cannot be drawn anew.",
            "Give it reset_parameters(), build the model by a named factory, or set draw=False on an untrained one.",
            UsageError,
        )


def _turn(item: tuple[str, nn.Module]) -> tuple[bool, int]:
    """Layers that hold others come last, the inner ones first: they may have a rule of their own for what they hold."""
    path, layer = item
    holds = next(layer.children(), None) is not None
    return holds, -len(path) if holds else 0
