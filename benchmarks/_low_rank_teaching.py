"""New layers in a trained network, each taught what the layer gave whose place it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from karui.data import Batches
from karui.model import Model, Note, layer_at
from karui.model.trace import mode_of
from karui.technique import Bench
from karui.train.randomness import generator

PICTURES, BATCH, RATE = 640, 8, 0.003


def taught(light: Model, dense: Model, paths: Sequence[str], bench: Bench) -> Model:
    """The light network with the layers at these paths fitted to the dense network's responses, all at once.

    Each sees what the dense network gives the layer that it replaces, and comes near to what that layer makes of it
    (squared error, relative to the response). No label is looked at, and errors do not run from layer to layer. The
    papers do not do this: they train whole networks from scratch, for much longer than there is time for here.
    """
    made, source = light.copy(), dense.copy()
    layers = {path: layer_at(made.module, path).train() for path in paths}
    for module in (source.module, *layers.values()):
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam([p for layer in layers.values() for p in layer.parameters()], lr=RATE)
    batches = Batches(bench.train)
    order = torch.randperm(min(PICTURES, len(batches)), generator=generator(bench.seed, "taught"))
    steps = order.split(BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    lost = torch.zeros(len(layers))
    for index in steps:
        seen = _calls(source.module, paths, batches.fetch(index)[0])
        errors = [_error(layers[path](given), wanted) for path, (given, wanted) in seen.items()]
        sum(errors).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        lost = torch.stack(errors).detach()
    made.module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    note = Note(
        "layers taught the responses of those they replace", {"errors": dict(zip(paths, lost.tolist(), strict=True))}
    )
    return light.evolve(made.module.eval(), note)


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().mean() / wanted.square().mean()


def _calls(module: nn.Module, paths: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each of these layers is given and gives, in evaluation mode and without gradients."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> nn.Module:
        return layer_at(module, path).register_forward_hook(
            lambda _layer, given, output: seen.__setitem__(path, (given[0], output))
        )

    handles = [keep(path) for path in paths]
    try:
        with torch.no_grad(), mode_of(module, training=False):
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: seen[path] for path in paths}
