"""What the techniques of this room share: factors of a matrix, what is refused, and how a plan is carried out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import NeedError, require
from karui.layers.factored import factor_conv, factor_linear
from karui.lowrank._choice import Choice
from karui.lowrank._scan import Seen
from karui.model import Model, Note, replace_layers
from karui.numerics.svd import truncated_svd
from karui.numerics.unfold import split_groups
from karui.technique import require_passes

if TYPE_CHECKING:
    from karui.technique import Bench
    from karui.train import Influence


def blocks(layer: Any) -> Float[Tensor, "groups rows columns"]:
    """The weight of a linear layer or convolution as one matrix (filters x all else) for each group, in float64."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return split_groups(layer.weight.detach().double(), groups).flatten(2)


def factor_matrix(layer: Any, rank: int, *, balanced: bool = False) -> tuple[nn.Module, float]:
    """A linear layer or convolution as two, by SVD of filters x all else, group by group, and its relative error.

    The first factor sees what the layer saw, the second one is pointwise.
    """
    parts = [truncated_svd(block, rank) for block in blocks(layer)]
    pairs = [part.factors(balanced=balanced) for part in parts]
    left, right = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
    lost = sum(float(part.discarded.square().sum()) for part in parts)
    error = math.sqrt(lost / max(float(blocks(layer).square().sum()), 1e-300))
    if isinstance(layer, nn.Linear):
        return factor_linear(layer, left[0], right[0]), error
    return factor_conv(layer, right.reshape(*right.shape[:2], *layer.weight.shape[1:]), outer=left), error


def require_ranks(paths: Sequence[str], seen: Sequence[Seen], left: Sequence[Choice]) -> None:
    """Refuse ranks for layers that cannot be factored, with the reason."""
    known = {choice.path: choice.reason for choice in left}
    for path in paths:
        found = any(one.path == path for one in seen)
        why = known.get(path, "there is no such layer with a weight")
        require(found, f"ranks names '{path}', which cannot be factored: {why}")


def require_fine_tuning(epochs: int, learning_rate: float | None) -> None:
    """Refuse impossible settings of the fine-tuning."""
    require_passes(epochs=epochs)
    positive = learning_rate is None or 0 < learning_rate < math.inf
    require(positive, f"learning_rate is {learning_rate}; give a positive number, for example 0.001")


def carry_out(
    model: Model, choices: Sequence[Choice], layers: Mapping[str, nn.Module], name: str, extra: Mapping[str, Any]
) -> Model:
    """The model with its new layers, and a note of what was done with every layer."""
    text = f"{name}: {len(layers)} of {len(choices)} layers factored"
    new = replace_layers(model, layers, text) if layers else model
    told = {
        **extra,
        "factored": [choice.to_json() for choice in choices if choice.replaced],
        "left": [choice.to_json() for choice in choices if not choice.replaced],
        "parameters": [model.parameters, new.parameters],
    }
    return new.evolve(new.module, Note(f"{text}, {model.parameters:,} -> {new.parameters:,} parameters", told))


def fine_tune(
    model: Model,
    bench: Bench,
    epochs: int,
    learning_rate: float | None,
    label: str,
    *,
    influence: Influence | None = None,
) -> Model:
    """The model trained for `epochs`, at a learning rate of its own if one is given, under an influence if there is."""
    if not epochs:
        return model
    if learning_rate is not None:
        optimizer = replace(bench.training.optimizer, lr=learning_rate)  # pyright: ignore[reportArgumentType]
        bench = replace(bench, training=replace(bench.training, optimizer=optimizer))
    return bench.fit(model, epochs=epochs, influence=influence, label=label)


def require_data(slug: str, model: Model, bench: Bench, epochs: int) -> None:
    """Refuse fine-tuning without data or a task before any work."""
    if epochs:
        hint = "Give Bench(train=...), --data on the command line, or epochs=0."
        require(bench.train is not None, f"'{slug}' needs training data to fine-tune.", hint, NeedError)
        hint = "Give Model(..., task=karui.Classification()), another task, or epochs=0."
        require(model.task is not None, f"'{slug}' needs a task to fine-tune for.", hint, NeedError)


def tracked(items: Sequence[Any], text: str, *, shown: bool) -> Iterable[Any]:
    """The items, with a progress bar if it is to be shown."""
    from rich.progress import track

    return _plain(items) if not shown else track(items, description=text)


def _plain(items: Sequence[Any]) -> Iterator[Any]:
    yield from items
