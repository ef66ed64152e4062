"""Values that leave the sight of a capture: what Python reads out of a tensor may decide which way a model takes.

A capture sees one run. A model that reads numbers out of what depends on its input, or makes tensors whose size does,
may run other operators for another input, with other weights; a cut that fits the run seen would be wrong there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from karui.errors import CaptureError

# Reads that pass no operator, so that only their names are seen.
READS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__})


class DataDependentError(CaptureError):
    """The model decides by the values of its input."""


def refuse() -> None:
    """Say that a number was taken out of a tensor that depends on the input.

    Raises:
        DataDependentError: always.
    """
    raise DataDependentError(
        "The model takes a number out of a tensor that depends on its input, so its path may vary with it.",
        "Its channels cannot be cut; techniques that work layer by layer still can.",
    )


class Reads(TorchFunctionMode):
    """Refuses to let Python read a tensor that depends on the input.

    Args:
        depends: whether a tensor does.
    """

    def __init__(self, depends: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.depends = depends

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.depends(args[0]):
            refuse()
        return func(*args, **(kwargs or {}))


def reads_number(func: Any) -> bool:
    """Whether an operator gives a number or a truth to Python, not a tensor."""
    return torch.Tag.data_dependent_output in func.tags


def sized_by(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors whose values decide how large the output of an operator is."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return []
    name = func.overloadpacket.__name__
    if name == "index":
        return [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    return [t for t in (args[1:2] if name == "masked_select" else args[:1]) if isinstance(t, Tensor)]
