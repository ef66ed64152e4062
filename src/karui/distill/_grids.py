"""Which layers compute with few bits, and the grids that fit what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from karui.distill._maps import last_of_each_size
from karui.errors import SettingError, require
from karui.layers.factored import CONVOLUTIONS
from karui.measuring.inference import inference
from karui.model import Model, layer_at, taps
from karui.numerics.straight_through import REAL, InputGrid, WeightGrid, fitted_reach, fitted_scale
from karui.train.latent import Grids, LatentWeights
from karui.train.masks import meant

KINDS = (nn.Linear, *CONVOLUTIONS.values())
SAMPLES = 256
"""Calibration samples that grids of inputs are fitted to."""
VALUES = 2**15
"""Values of a layer's inputs that are kept of each batch, evenly spread."""


def narrow_layers(model: Model, skip: tuple[str, ...]) -> tuple[str, ...]:
    """Linear layers and convolutions whose weight is theirs alone, in the order of their first call.

    Args:
        model: run once on its example.
        skip: paths or patterns of layers to leave out.
    """
    owners: dict[int, int] = {}
    for parameter in dict(model.module.named_parameters(remove_duplicate=False)).values():
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    fit: dict[str, Any] = {
        path: layer
        for path, layer in model.module.named_modules()
        if type(layer) in KINDS and not parametrize.is_parametrized(layer) and not meant(path, skip)
    }
    fit = {path: layer for path, layer in fit.items() if owners[id(layer.weight)] == 1}
    called: dict[str, None] = {}
    watch_inputs(model.module, {path: lambda _, path=path: called.setdefault(path) for path in fit}, [model.example])
    return tuple(called)


def watch_inputs(
    module: nn.Module, watchers: Mapping[str, Callable[[Tensor], Any]], batches: Iterable[tuple[Any, ...]]
) -> None:
    """Run a network on each batch and hand what layers are given to their watchers, before any quantiser."""

    def hook(watcher: Callable[[Tensor], Any]) -> Any:
        return lambda _layer, args, kwargs: watcher(args[0] if args else kwargs["input"])

    handles = [
        layer_at(module, path).register_forward_pre_hook(hook(watcher), prepend=True, with_kwargs=True)
        for path, watcher in watchers.items()
    ]
    try:
        with inference(module):
            for batch in batches:
                module(*batch)
    finally:
        for handle in handles:
            handle.remove()


def fitted_grids(
    model: Model,
    before: Mapping[str, Grids],
    bits: Mapping[str, tuple[int, int]],
    batches: Iterable[tuple[Any, ...]],
    *,
    unit: Iterable[str] = (),
) -> dict[str, Grids]:
    """Grids of so many bits, at which layers compute most nearly what they do now.

    Args:
        model: with latent weights.
        before: the grids that it computes with now; empty where it computes with its weights as they are.
        bits: by path, of the weight and of the inputs.
        batches: inputs of calls.
        unit: paths of layers whose grids end at 1, as in the paper.
    """
    seen = _inputs(model, before, [path for path, (_, inputs) in bits.items() if inputs < REAL], batches)
    unit, grids = set(unit), {}
    for path, (weight_bits, input_bits) in bits.items():
        layer: Any = layer_at(model.module, path)
        weight, inputs = WeightGrid(weight_bits), InputGrid(input_bits)
        if path not in unit:
            now = before[path].weight if path in before else None
            target = layer.weight if now is None else now(layer.weight)
            weight = WeightGrid(weight_bits, fitted_scale(weight, layer.weight, target))
            inputs = fitted_inputs(seen[path], input_bits) if path in seen else inputs
        grids[path] = Grids(weight, inputs)
    return grids


def fitted_inputs(values: Tensor, bits: int) -> InputGrid:
    """The grid that suits these values: signed where some are negative."""
    signed = bool((values < 0).any())
    return InputGrid(bits, fitted_reach(values, bits, signed=signed), signed)


def _inputs(
    model: Model, before: Mapping[str, Grids], paths: Iterable[str], batches: Iterable[tuple[Any, ...]]
) -> dict[str, Tensor]:
    """What layers are given as the network computes now."""
    parts: dict[str, list[Tensor]] = {path: [] for path in paths}
    if not parts:
        return {}
    latent, module = LatentWeights(before), model.copy().module
    latent.attach(module)
    watch_inputs(module, {path: lambda x, path=path: parts[path].append(spread(x)) for path in parts}, batches)
    return {path: torch.cat(part) for path, part in parts.items()}


def spread(x: Tensor) -> Tensor:
    """At most so many values of a tensor, evenly spread."""
    flat = x.detach().flatten()
    return flat[:: max(1, len(flat) // VALUES)].clone()


def hint_grids(
    model: Model, paths: Iterable[str], bits: int, batches: Iterable[tuple[Any, ...]], *, unit: bool
) -> dict[str, InputGrid]:
    """By path, the grid on which two networks' maps of a layer are compared.

    Raises:
        SettingError: there is no such layer, or it gives no tensor.
    """
    if unit:
        return {path: InputGrid(bits) for path in paths}
    parts: dict[str, list[Tensor]] = {path: [] for path in paths}
    for path in parts:
        layer_at(model.module, path, SettingError)
    with inference(model.module) as module, taps(module, parts) as seen:
        for batch in batches:
            module(*batch)
            for path, part in parts.items():
                value = seen.get(path)
                require(isinstance(value, Tensor), f"The layer '{path}' gives no tensor to compare; name another.")
                part.append(spread(value))  # pyright: ignore[reportArgumentType]
    return {path: fitted_inputs(torch.cat(part), bits) for path, part in parts.items()}


def deepest_maps(model: Model, quantised: tuple[str, ...]) -> tuple[str, ...]:
    """Where networks are compared if no layer is named: the ends of the two deepest stages.

    Where no layer gives maps over space: the outputs of the last two layers of few bits but the very last.
    """
    ends = last_of_each_size(model)[-2:]
    return ends or quantised[:-1][-2:] or quantised
