"""Responses: what one layer is given and gives in two networks on the same inputs, position by position.

A network that is compressed layer by layer gives its later layers other inputs than they were trained on. To fit a
layer to that, run the original and the compressed network side by side: the inputs of the one, the responses of the
other. Positions of space are drawn at random, the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError, require
from karui.model.taps import layer_at
from karui.model.trace import mode_of


class _Enough(BaseException):
    """Unwinds a forward pass whose rest is not wanted; no `except Exception` of the network's may stop it."""


@dataclass(frozen=True)
class Response:
    """One call of a layer in both networks, on one batch.

    Settings:
        given: input of the layer in the compressed network.
        made: its output there.
        wanted: its output in the original network.
    """

    given: Tensor
    made: Tensor
    wanted: Tensor


def responses(
    original: nn.Module, compressed: nn.Module, path: str, batches: Iterable[tuple[Any, ...]], *, calls: int = 1
) -> Iterator[Response]:
    """Run both networks on each batch as far as the layer at `path`, and give what it met there.

    Both run in evaluation mode and without gradients, and are left as they were. Where the compressed network is the
    original one itself, it runs once.

    Args:
        original: the network that is to be imitated.
        compressed: the network that does, in which the layer at `path` is still the original one or a replacement.
        path: the layer.
        batches: inputs of a call, as tuples.
        calls: how often the layer is called in one forward pass.

    Raises:
        SurgeryError: the layer is called less often than that, or gives other shapes in the two networks.
    """
    for batch in batches:
        made = _calls(compressed, path, batch, calls)
        wanted = made if original is compressed else _calls(original, path, batch, calls)
        for (given, here), (_, there) in zip(made, wanted, strict=True):
            message = f"'{path}' gives {tuple(here.shape)} in the compressed network, {tuple(there.shape)} in the other"
            require(here.shape == there.shape, message, error=SurgeryError)
            yield Response(given, here, there)


def watch_outputs(
    module: nn.Module, watchers: Mapping[str, Callable[[Tensor], None]], batches: Iterable[tuple[Any, ...]]
) -> None:
    """Run a network on each batch and hand the outputs of several layers to their watchers, at every call.

    It runs in evaluation mode and without gradients, and is left as it was. A watcher sees an output before a layer
    that works in place can write over it.

    Args:
        module: the network.
        watchers: for the path of each layer, what is called with its output.
        batches: inputs of a call, as tuples.

    Example:
        >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True)), []
        >>> watch_outputs(net, {"0": lambda output: seen.append(output.shape)}, [(torch.zeros(5, 2),)])
        >>> seen
        [torch.Size([5, 3])]
    """

    def hook(watcher: Callable[[Tensor], None]) -> Any:
        return lambda _layer, _inputs, output: watcher(output)

    handles = [layer_at(module, path).register_forward_hook(hook(watcher)) for path, watcher in watchers.items()]
    try:
        with torch.no_grad(), mode_of(module, training=False):
            for batch in batches:
                module(*batch)
    finally:
        for handle in handles:
            handle.remove()


def _calls(module: nn.Module, path: str, batch: tuple[Any, ...], calls: int) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        del layer
        # A layer that works in place may write over either once it has returned, unless the run ends here.
        last = len(seen) + 1 == calls
        seen.append((inputs[0], output) if last else (inputs[0].clone(), output.clone()))
        if last:
            raise _Enough

    handle = layer_at(module, path).register_forward_hook(keep)
    try:
        with torch.no_grad(), mode_of(module, training=False):
            module(*batch)
    except _Enough:
        return seen
    finally:
        handle.remove()
    raise SurgeryError(f"The network calls its layer '{path}' {len(seen)} times on this input, not {calls} times.")


def draw_positions(
    output: Float[Tensor, "batch *rest"], layer: nn.Module, number: int, generator: torch.Generator
) -> Int[Tensor, "batch positions"]:
    """For each sample, `number` of the flat positions at which the layer was applied, or all if there are fewer."""
    places = _flat(output, layer).shape[2]
    if places <= number:
        return torch.arange(places).expand(len(output), places)
    scores = torch.rand(len(output), places, generator=generator)
    return scores.topk(number, 1).indices.sort(1).values


def rows_at(
    output: Float[Tensor, "batch *rest"], layer: nn.Module, index: Int[Tensor, "batch positions"]
) -> Float[Tensor, "rows filters"]:
    """The responses at these positions, one a row, sample by sample."""
    flat = _flat(output, layer)
    picked = flat.gather(2, index.to(flat.device).unsqueeze(1).expand(-1, flat.shape[1], -1))
    return picked.transpose(1, 2).flatten(0, 1)


def patches_at(
    given: Float[Tensor, "batch channels *space"], layer: Any, index: Int[Tensor, "batch positions"]
) -> Float[Tensor, "rows channels *kernel"]:
    """What a convolution sees of its input at these positions of its output: each row a window, padding included.

    For a linear layer the inputs themselves. So a response is `(weight * window).sum()` over channels and kernel.
    """
    if isinstance(layer, nn.Linear):
        return rows_at(given, layer, index)
    padded = _padded(given, layer)
    dims = len(layer.kernel_size)
    spans = [step * (taps - 1) + 1 for taps, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    windows = padded
    for dim in range(dims):
        windows = windows.unfold(2 + dim, spans[dim], layer.stride[dim])
    windows = windows[(..., *(slice(None, None, step) for step in layer.dilation))]
    places = windows.shape[2 : 2 + dims]
    at = torch.unravel_index(index.to(given.device), places)
    batch = torch.arange(len(given), device=given.device).unsqueeze(1)
    return windows[(batch, slice(None), *at)].flatten(0, 1)


def _flat(output: Tensor, layer: nn.Module) -> Float[Tensor, "batch filters positions"]:
    """Filters on the second dimension, positions on the last."""
    if isinstance(layer, nn.Linear):
        return output.reshape(len(output), -1, output.shape[-1]).transpose(1, 2)
    return output.flatten(2)


def _padded(given: Tensor, layer: Any) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # Both sides of each dimension, last dimension first, as `pad` takes them; torch keeps them so for every mode.
    return functional.pad(given, layer._reversed_padding_repeated_twice, mode=mode)  # noqa: SLF001
