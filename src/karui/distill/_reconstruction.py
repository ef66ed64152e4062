"""Inputs rebuilt from activation records: gradient descent on the inputs alone (survey 41, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from karui.distill._records import Block, Record, joined
from karui.errors import SettingError, require
from karui.measuring.bar import bar
from karui.model import Model, layer_at
from karui.train.guide import Guide
from karui.train.statistics import flattened


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """Inputs made from a record.

    Settings:
        inputs: the samples.
        classes: the class that each was made for.
        losses: mean distance from the targets at each step, averaged over the batches.
    """

    inputs: Float[Tensor, "samples *shape"]
    classes: Int[Tensor, "samples"]
    losses: tuple[float, ...]


def block_loss(
    block: Block, targets: Float[Tensor, "batch features"], outputs: dict[str, Tensor], *, sized: bool = True
) -> Float[Tensor, "batch"]:
    """The distance of each sample's activations from its targets.

    Args:
        block: what was recorded.
        targets: drawn from it.
        outputs: by layer, flattened, the last one's over the temperature.
        sized: whether the mean over units is divided by their number once more, as for all layers but not for the top.
    """
    h, projection = joined(outputs, block.layers), block.projection()
    if projection is not None:
        return (targets - h.relu() @ projection.to(h)).square().sum(1)
    return (targets.relu() - h.relu()).square().mean(1) / (h.shape[1] if sized else 1)


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How inputs are rebuilt.

    Settings:
        steps: of Adam on the inputs.
        lr: its rate.
        batch: inputs rebuilt at a time.
        keep: shares of the inputs and of the hidden units that a mask of "all_dropout" keeps.
        tidy: after every so many steps, clip to the data's range and blur lightly; 0 never.
    """

    steps: int = 300
    lr: float = 0.05
    batch: int = 500
    keep: tuple[float, float] = (0.8, 0.5)
    tidy: int = 0


def reconstruct(
    model: Model,
    record: Record,
    descent: Descent | None = None,
    *,
    samples: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Rebuilt:
    """Inputs at which a teacher responds as its record says, from noise. Nothing but the inputs moves.

    Args:
        model: the teacher; left as it is.
        record: its activation record.
        descent: how; by default `Descent()`.
        samples: how many of each class.
        seed: draws classes' targets, noise and masks.
        progress: whether a bar is shown.

    Raises:
        SettingError: the record is of another teacher.
    """
    descent, guide = descent or Descent(), Guide(model, record.layers)
    _check_fits(guide, record)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(len(record.counts)).repeat_interleave(samples)
    classes = classes[torch.randperm(len(classes), generator=generator)]
    parts, made, curves = classes.split(descent.batch), [], []
    with bar("reconstruct", len(parts) * descent.steps, progress) as advance:
        for part in parts:
            mean, deviation, _, _ = record.pixels
            x = torch.randn(len(part), *record.shape, generator=generator) * deviation + mean
            targets = [block.sample(part, generator) for block in record.blocks]
            dropped = record.kind == "all_dropout"
            masks = _masks(guide, record, descent.keep, generator) if dropped else _Masks((), None)
            curves.append([])
            for loss in _descend(x, lambda x, t=targets, m=masks: _loss(guide, record, t, x, m), record, descent):
                curves[-1].append(loss)
                advance()
            made.append(x.detach())
    mean = tuple(sum(at) / len(curves) for at in zip(*curves, strict=True))
    return Rebuilt(torch.cat(made), classes, mean)


def _descend(x: Tensor, loss_of: Callable[[Tensor], Tensor], record: Record, descent: Descent) -> Iterator[float]:
    """Move the inputs, in place; the mean loss before each step."""
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=descent.lr, eps=1e-12)  # gradients may be far below the usual eps
    for step in range(descent.steps):
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.sum().backward()
        optimizer.step()
        if descent.tidy and (step + 1) % descent.tidy == 0:
            with torch.no_grad():
                x.copy_(_blurred(x.clamp(*record.pixels[2:])))
        yield float(loss.detach().mean())


@dataclass(frozen=True, eq=False)
class _Masks:
    """Masks of hidden layers by path, and of the input; each divided by the share that it keeps."""

    hidden: tuple[tuple[str, Tensor], ...]
    input: Tensor | None


def _masks(guide: Guide, record: Record, keep: tuple[float, float], generator: torch.Generator) -> _Masks:
    def draw(shape: Sequence[int], share: float) -> Tensor:
        return (torch.rand(tuple(shape), generator=generator) < share).float() / share

    with torch.no_grad():
        _, seen = guide((torch.zeros(1, *record.shape),))
    hidden = tuple((path, draw(seen[path].shape[1:], keep[1])) for path in record.layers[:-1])
    return _Masks(hidden, draw(record.shape, keep[0]))


def _loss(guide: Guide, record: Record, targets: list[Tensor], x: Tensor, masks: _Masks) -> Float[Tensor, "batch"]:
    """Of each sample. A hidden layer is matched as it is, and masked for the layers behind it."""
    seen: dict[str, Tensor] = {}

    def hook(path: str, mask: Tensor) -> Any:
        def masked(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            del layer, inputs
            seen[path] = output
            return output * mask

        return masked

    handles = [layer_at(guide.module, path).register_forward_hook(hook(path, mask)) for path, mask in masks.hidden]
    try:
        _, shown = guide((x if masks.input is None else x * masks.input,))
    finally:
        for handle in handles:
            handle.remove()
    outputs = flattened({**shown, **seen}, record.layers)
    last = record.layers[-1]
    outputs[last] = outputs[last] / record.temperature
    terms = [
        block_loss(block, wanted, outputs, sized=record.kind != "top")
        for block, wanted in zip(record.blocks, targets, strict=True)
    ]
    return torch.stack(terms).sum(0)


def _blurred(x: Tensor) -> Tensor:
    """Pictures averaged a little with their neighbours; other inputs as they are."""
    if x.ndim != 4:
        return x
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 20.0, 2.0], [1.0, 2.0, 1.0]]).to(x) / 32
    padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


def _check_fits(guide: Guide, record: Record) -> None:
    with torch.no_grad():
        _, seen = guide((torch.zeros(1, *record.shape),))
    sizes = {path: value.shape[1] for path, value in flattened(seen, record.layers).items()}
    told = {path: size for block in record.blocks for path, size in zip(block.layers, block.sizes, strict=True)}
    require(
        sizes == told,
        f"The record is of layers with {told} units; the teacher's have {sizes}.",
        "Give the record of this very teacher.",
        SettingError,
    )
