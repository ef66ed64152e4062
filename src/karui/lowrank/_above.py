"""Layer after layer, and between them a training of the layers above alone (Denton et al. 2014, survey 18)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out, fine_tune, tracked
from karui.lowrank._scan import Seen
from karui.lowrank._watching import Shelf
from karui.model.taps import layer_at
from karui.model.trace import mode_of
from karui.train import Paced

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

Build = Callable[["Model", Seen, Choice], tuple[nn.Module, float, str]]
"""From the model so far, a layer of it and what was chosen: the new layer, its relative error, a remark."""


def layer_by_layer(
    model: Model,
    bench: Bench,
    seen: Sequence[Seen],
    choices: Sequence[Choice],
    build: Build,
    *,
    shelf: Shelf,
    name: str,
    extra: Mapping[str, Any],
    epochs: int,
    learning_rate: float | None,
) -> Model:
    """The model with its layers replaced, from the input on, and the layers above each trained before the next.

    Without epochs all are replaced at once, which is the same.

    Args:
        model: the model.
        bench: where it is trained.
        seen: the layers, in the order of their calls.
        choices: what is done with each layer of the network, those that are left included.
        build: makes a layer from its weight as it then is.
        shelf: where finished layers outlive a killed run.
        name: of the technique, for the note.
        extra: what else the note tells.
        epochs: passes over the data after each layer.
        learning_rate: of these; None takes the bench's.
    """
    chosen = {choice.path: choice for choice in choices if choice.replaced}
    left = [choice for choice in choices if not choice.replaced]
    layers: dict[str, nn.Module] = {}
    told: list[Choice] = []
    order = sorted((one for one in seen if one.path in chosen), key=lambda one: one.order)
    for one in tracked(order, name, shown=bench.progress):
        now = replace(one, layer=layer_at(model.module, one.path))
        layer, choice = shelf.layer(now, partial(_built, build, model, now, chosen[one.path]), model)
        layers[one.path] = layer
        told.append(choice)
        if epochs:
            rest = left if one is order[-1] else ()
            model = carry_out(model, (told[-1], *rest), {one.path: layer}, name, extra)
            held = Paced(up_to(model, one.path), 0.0)
            model = fine_tune(model, bench, epochs, learning_rate, f"train above {one.path}", influence=held)
    return model if epochs and told else carry_out(model, (*told, *left), layers, name, extra)


def _built(build: Build, model: Model, one: Seen, choice: Choice) -> tuple[nn.Module, Choice]:
    """The new layer, and the choice with what is known now."""
    layer, error, remark = build(model, one, choice)
    return layer, replace(choice, error=error, remark="; ".join(filter(None, (choice.remark, remark))))


def up_to(model: Model, path: str) -> tuple[str, ...]:
    """Paths of the innermost layers that learn and have been called, on the example, when the one at `path` is done."""
    called: list[str] = []
    done: list[int] = []

    def note(name: str) -> Any:
        def hook(*_: Any) -> None:
            called.append(name)
            if name == path:
                done.append(len(called))

        return hook

    inner = [name for name, part in model.module.named_modules() if not list(part.children())]
    watched = {name: layer_at(model.module, name) for name in dict.fromkeys((*inner, path))}
    handles = [part.register_forward_hook(note(name)) for name, part in watched.items()]
    try:
        with torch.no_grad(), mode_of(model.module, training=False):
            model.module(*model.example)
    finally:
        for handle in handles:
            handle.remove()
    before = dict.fromkeys(called[: done[0]])
    learns = {
        name for name, part in watched.items() if isinstance(part, _BatchNorm) or list(part.parameters(recurse=False))
    }
    return tuple(name for name in before if name in learns or name == path)
