"""Walks over the layers and tensors of a module: what `named_modules` and its kin tell, several times faster.

Surgery asks for them a dozen times, and those of `torch.nn` are generators within generators, as deep as the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

Held = TypeVar("Held", bound=Tensor)


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer once, by its path, in the order of `named_modules`.

    Example:
        >>> list(layers(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh()))))
        ['', '0', '1', '1.0']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    left: list[tuple[str, nn.Module]] = [("", module)]
    while left:
        path, layer = left.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        found[path] = layer
        inner = layer._modules  # noqa: SLF001  (all public ways to it are generators)
        if inner:
            stem = f"{path}." if path else ""
            left += [(stem + name, child) for name, child in inner.items() if child is not None][::-1]
    return found


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by its name, in the order of `nn.Module.named_parameters`."""
    held = ((path, layer._parameters) for path, layer in layers(module).items())  # noqa: SLF001  (as above)
    return _once(held)


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Every buffer once, by its name, in the order of `nn.Module.named_buffers`."""
    held = ((path, layer._buffers) for path, layer in layers(module).items())  # noqa: SLF001  (as above)
    return _once(held)


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, as often as it is held: one walk tells them where names do not matter."""
    found = layers(module).values()
    return [
        tensor
        for layer in found
        for held in (layer._parameters, layer._buffers)  # noqa: SLF001  (as above)
        for tensor in held.values()
        if tensor is not None
    ]


def _once(held: Iterator[tuple[str, Mapping[str, Held | None]]]) -> dict[str, Held]:
    """Tensors by their names, each under the first."""
    found: dict[str, Held] = {}
    seen: set[int] = set()
    for path, tensors in held:
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}" if path else name] = tensor
    return found


@contextmanager
def lent(module: nn.Module, others: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in the places of a module's parameters and buffers for a while, whatever a run assigns there.

    Args:
        module: the network.
        others: what stands in for each of its tensors, by the `id` of that.
    """
    if not others:
        yield
        return
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, own)
        for layer in layers(module).values()
        for held in (layer._parameters, layer._buffers)  # noqa: SLF001  (as in `torch.func.functional_call`)
        for name, own in held.items()
        if own is not None and id(own) in others
    ]
    try:
        for held, name, own in places:
            held[name] = others[id(own)]
        yield
    finally:
        for held, name, own in places:
            held[name] = own
