"""Running a model as it will be deployed: evaluation mode, no gradients, inputs of any batch size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from karui.model.reach import networks
from karui.model.taps import layer_at

if TYPE_CHECKING:
    from karui.model import Model


@contextlib.contextmanager
def inference(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode and without gradients; each part's own mode comes back afterwards.

    Parts that lie in a list or a function of it, of which torch knows not, are in evaluation mode too.
    """
    with evaluated(*networks(module)), torch.no_grad():
        yield module


@contextlib.contextmanager
def evaluated(*modules: nn.Module) -> Iterator[None]:
    """The modules in evaluation mode; each part's own mode comes back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        # A program captured by torch.export computes what it did when it was captured, and refuses to be asked.
        with contextlib.suppress(NotImplementedError):
            module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def watch_example(model: Model, hooks: Mapping[str, Callable[[nn.Module, Any, Any], Any]]) -> None:
    """Run a model once on its example, as it will be deployed, with a forward hook on each of the named layers.

    Args:
        model: left as it is.
        hooks: by path, what is called with the layer, its inputs and its output.

    Raises:
        UsageError: there is no such layer.

    Example:
        >>> from karui.model import Model
        >>> shapes = []
        >>> hook = lambda layer, inputs, output: shapes.append(tuple(output.shape))
        >>> watch_example(Model(nn.Sequential(nn.Linear(3, 2)), example=(torch.zeros(1, 3),)), {"0": hook})
        >>> shapes
        [(1, 2)]
    """
    handles = [layer_at(model.module, path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with inference(model.module) as module:
            module(*model.example)
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in (nested) inputs or outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _each(example: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.ndim else leaf, example)


def batch_of(example: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The example inputs cut or repeated to `size` samples along the first dimension of each tensor.

    Example:
        >>> batch_of((torch.zeros(2, 3),), 5)[0].shape
        torch.Size([5, 3])
    """
    return _each(example, lambda t: t.repeat(math.ceil(size / t.shape[0]), *[1] * (t.ndim - 1))[:size].contiguous())


def random_batch(example: tuple[Any, ...], size: int, seed: int = 0) -> tuple[Any, ...]:
    """Seeded random inputs of `size` samples that the model accepts as it accepts the example.

    Numbers get the example's mean and spread (a spread of 1 where the example is constant); class and token numbers are
    drawn from those of the example, since no other is known to be valid.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        shape = (size, *like.shape[1:])
        if not like.is_floating_point():
            picks = torch.randint(like.numel(), shape, generator=generator)
            return like.flatten()[picks.to(like.device)]
        spread = like.double().std(correction=0).item() or 1.0
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + like.double().mean().item()
        return noise.to(like)

    return _each(example, draw)


def largest_difference(ours: Any, theirs: Any) -> tuple[float, float]:
    """The largest absolute difference between two (nested) outputs, and the largest absolute value of `ours`.

    Infinite where the number of outputs, a shape, or the place of a nan or an infinity differs.
    """
    left, right = tensors_of(ours), tensors_of(theirs)
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return math.inf, 0.0
    difference = scale = 0.0
    for a, b in ((a.double(), b.double()) for a, b in zip(left, right, strict=True)):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return math.inf, scale
        if finite.any():
            difference = max(difference, (a - b)[finite].abs().max().item())
            scale = max(scale, a[finite].abs().max().item())
    return difference, scale
