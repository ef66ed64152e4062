"""Making activation records: one pass of the teacher over labelled data (survey 41)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from karui.data import Batches
from karui.distill._heads import head_of
from karui.distill._records import KINDS, Block, Kind, Record, joined
from karui.errors import SettingError, UsageError, require
from karui.layers.factored import CONVOLUTIONS
from karui.measuring.inference import inference
from karui.model import Model
from karui.model.taps import taps
from karui.numerics.running import Running
from karui.numerics.spectral import distances, laplacian, similarities, sketch, smoothest
from karui.train.statistics import class_moments, flattened

MOST = 4096
"""Units of one block at most: a covariance of this side takes 64 MiB for each class."""


def record(
    model: Model,
    dataset: Any,
    kind: Kind = "all",
    *,
    layers: Sequence[str] = (),
    temperature: float = 8.0,
    share: float = 0.1,
    heat: float = 0.0,
    diagonal: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Record:
    """Activation records of a teacher on labelled data.

    Args:
        model: the teacher, a classifier; left as it is.
        dataset: its training data, (input, class number) pairs.
        kind: "top" records the last layer, "all" and "all_dropout" every layer; "spectral_all" and "spectral_pairs"
            their graph Fourier coefficients, "jl" a random projection.
        layers: paths, in order, the last one that of the logits; none takes all linear layers and convolutions, each
            with the batch normalisation that takes its output, as the ReLU comes behind that.
        temperature: the last layer's outputs are divided by it.
        share: share of the eigenvectors, or of the units as random directions, that are kept.
        heat: s of the heat kernel exp(-s L) in place of plain eigenvectors; 0 for these.
        diagonal: record variances in place of covariances.
        seed: of the random projection.
        progress: whether a bar is shown.

    Raises:
        UsageError: a layer is not there, or no layer gives the logits as they are.
        SettingError: the kind is not known, or a covariance would be too large.
        DataError: targets are not class numbers.
    """
    require(kind in KINDS, f"kind is {kind!r}; choose from {', '.join(KINDS)}")
    sizes = _sizes(model, _layers(model, layers, kind))
    groups = _groups(kind, tuple(sizes))
    last = list(sizes)[-1]
    projected = kind in ("spectral_all", "spectral_pairs", "jl")
    units = [sum(sizes[path] for path in group) for group in groups]
    whole = not diagonal or kind.startswith("spectral")  # eigenvectors are of whole second moments
    _check(units, whole and kind != "jl", kind)
    maps = [sketch(number, _kept(number, share), seed) if kind == "jl" else None for number in units]
    plain = [
        Block(g, tuple(sizes[p] for p in g), torch.empty(0), torch.empty(0), m)
        for g, m in zip(groups, maps, strict=True)
    ]

    def features(outputs: dict[str, Tensor]) -> list[Tensor]:
        outputs = {**outputs, last: outputs[last] / temperature}
        rows = [joined(outputs, group).double() for group in groups]
        rows = [part.relu() for part in rows] if projected else rows
        return rows if kind != "jl" else [r @ b.projection() for r, b in zip(rows, plain, strict=True)]  # pyright: ignore[reportOperatorIssue]

    moments = class_moments(model.module, tuple(sizes), dataset, features, full=whole, progress=progress)
    spectral = kind.startswith("spectral")
    bases = [_smoothest(b, m, kind, share, heat) if spectral else b.basis for b, m in zip(plain, moments, strict=True)]
    blocks = [
        _filled(block, of_classes, basis, project=spectral, diagonal=diagonal)
        for block, of_classes, basis in zip(plain, moments, bases, strict=True)
    ]
    shape, pixels = _pixels(dataset)
    counts = tuple(one.count for one in moments[0])
    return Record(kind, temperature, tuple(blocks), counts, shape, pixels, seed)


def _layers(model: Model, layers: Sequence[str], kind: Kind) -> tuple[str, ...]:
    if not layers:
        known = (nn.Linear, *CONVOLUTIONS.values())
        layers = [path for path, layer in model.module.named_modules() if isinstance(layer, known)]
        head = head_of(model)
        require(
            head is not None and head in layers,
            "No linear layer or convolution gives the teacher's logits as they are.",
            "Name the layers to record, the one of the logits last.",
            UsageError,
        )
        layers = [*_normalised(model, [path for path in layers if path != head]), head]  # pyright: ignore[reportAssignmentType]
    return tuple(layers[-1:]) if kind == "top" else tuple(layers)


def _normalised(model: Model, paths: Sequence[str]) -> list[str]:
    """The paths of layers, and where a batch normalisation takes a layer's output that of the normalisation."""
    places, norms = dict.fromkeys(paths, ""), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    made: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            del layer, inputs
            made[path] = output

        return hook

    def match(norm: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            del layer
            places.update((path, norm) for path, output in made.items() if inputs and inputs[0] is output)

        return hook

    with inference(model.module) as module:
        inner = dict(module.named_modules())
        handles = [inner[path].register_forward_hook(keep(path)) for path in paths]
        handles += [m.register_forward_pre_hook(match(path)) for path, m in inner.items() if isinstance(m, norms)]
        try:
            module(*model.example)
        finally:
            for handle in handles:
                handle.remove()
    return [norm or path for path, norm in places.items()]


def _groups(kind: Kind, layers: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The layers of each block."""
    if kind in ("spectral_all", "jl"):
        return [layers]
    if kind == "spectral_pairs":
        require(len(layers) > 1, "'spectral_pairs' needs two layers or more.", "Use 'spectral_all'.", SettingError)
        return list(pairwise(layers))
    return [(path,) for path in layers]


def _sizes(model: Model, layers: tuple[str, ...]) -> dict[str, int]:
    with inference(model.module) as module, taps(module, layers) as seen:
        module(*model.example)
    return {path: value.shape[1] for path, value in flattened(dict(seen), layers).items()}


def _check(units: list[int], whole: bool, kind: Kind) -> None:
    largest = max(units)
    remedy = "Name smaller layers, set diagonal=True, or use kind 'jl'."
    require(
        not whole or largest <= MOST, f"'{kind}' would record covariances of {largest:,} units.", remedy, SettingError
    )


def _kept(units: int, share: float) -> int:
    return max(1, round(share * units))


def _smoothest(block: Block, of_classes: list[Running], kind: Kind, share: float, heat: float) -> Tensor:
    """The smoothest eigenvectors of the graph of all units of a block."""
    total = sum(one.count for one in of_classes)
    moment = torch.stack([one.scatter + one.count * one.mean.outer(one.mean) for one in of_classes]).sum(0) / total
    edges = None
    if kind == "spectral_pairs":
        first = torch.arange(len(moment)) < block.sizes[0]
        edges = (first[:, None] != first[None, :]).double()
    graph = laplacian(similarities(distances(moment), edges))
    return smoothest(graph, _kept(len(graph), share), heat)


def _filled(block: Block, of_classes: list[Running], basis: Tensor | None, *, project: bool, diagonal: bool) -> Block:
    """The block with its statistics; those of single units are projected now, which is linear, where asked for."""
    means = torch.stack([one.mean for one in of_classes])
    whole = of_classes[0].scatter.ndim == 2
    spreads = torch.stack([one.covariance() if whole else one.variance() for one in of_classes])
    made = replace(block, means=means, spreads=spreads, basis=None if basis is None else basis.double())
    projection = made.projection()
    if project and projection is not None:
        means, spreads = means @ projection, projection.T @ spreads @ projection
    if diagonal and spreads.ndim == 3:
        spreads = spreads.diagonal(dim1=1, dim2=2)
    return replace(block, means=means.float(), spreads=spreads.float(), basis=None if basis is None else basis.float())


def _pixels(dataset: Any) -> tuple[tuple[int, ...], tuple[float, float, float, float]]:
    """Shape of an input; mean, deviation and range of all numbers of all inputs."""
    batches, running = Batches(dataset), Running.zeros(1)
    low, high, shape = float("inf"), float("-inf"), ()
    for index in torch.arange(len(batches)).split(256):
        x = batches.fetch(index)[0][0]
        running.add(x.reshape(-1, 1))
        low, high, shape = min(low, float(x.min())), max(high, float(x.max())), tuple(x.shape[1:])
    return shape, (float(running.mean), float(running.variance().sqrt()), low, high)
