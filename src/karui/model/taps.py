"""Taps: the outputs of layers inside a network, by path, without touching the network's class."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from karui.errors import KaruiError, UsageError


def layer_at(module: nn.Module, path: str, error: type[KaruiError] = UsageError) -> nn.Module:
    """The layer at `path` ("" is the module itself).

    Raises:
        UsageError: there is none; the closest paths are named. Another class of error may be asked for.

    Example:
        >>> layer_at(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    known = dict(module.named_modules(remove_duplicate=False))
    if path in known:
        return known[path]
    close = difflib.get_close_matches(path, [name for name in known if name], n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(repr(name) for name in close)}?" if close else _first_paths(list(known))
    raise error(f"The model has no layer '{path}'.", hint)


def _first_paths(names: list[str]) -> str:
    shown = [name for name in names if name][:8]
    if not shown:
        return "It has no layers inside; '' is the model itself."
    return f"Its layers are {', '.join(shown)}{' and more' if len(names) > len(shown) + 1 else ''}."


@contextmanager
def taps(module: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Within the block, each call of `module` leaves the outputs of the layers at `paths` in the dict that is given.

    A layer that is called several times in one forward pass leaves its last output; one that was not called leaves
    none. Outputs keep their gradient graph, and their values: what follows a layer is given a copy, as it may write
    over it in place (a ReLU, the sum of a residual block). The hooks are gone after the block, also after an error.

    Args:
        module: the network; its class is not touched.
        paths: names as in `module.named_modules()`; "" is the network itself.

    Raises:
        UsageError: there is no layer at a path.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with taps(net, ["0"]) as seen:
        ...     _ = net(torch.zeros(2, 4))
        >>> seen["0"].shape
        torch.Size([2, 3])
    """
    layers = {path: layer_at(module, path) for path in paths}
    seen: dict[str, Any] = {}

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
            del inputs
            seen[path] = output
            return None if layer is module else _copied(output)  # nothing of the network follows the whole of it

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _copied(output: Any) -> Any:
    """A tensor, or a tuple or list of them, to go on with; other outputs as they are."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output
