"""Whether a compiled loop can take a call.

numba is an extra (`karui[fast]`), and every kernel has a plain form in torch that computes the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_PLAIN = ContextVar("plain", default=False)
_THERE = importlib.util.find_spec("numba") is not None  # looked for once: torch.compile cannot trace the search


def has_numba() -> bool:
    """Whether numba is installed."""
    return _THERE


@contextmanager
def plain() -> Iterator[None]:
    """Everything in its plain form meanwhile, so that what is counted does not hang on whether numba is installed.

    Example:
        >>> with plain():
        ...     serves(torch.zeros(2))
        False
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel can take these: numba is there, single precision on the CPU, no gradients, no export.

    Example:
        >>> serves(torch.zeros(2)) == has_numba(), serves(torch.zeros(2, dtype=torch.float64))
        (True, False)
        >>> serves(torch.zeros(2, requires_grad=True))
        False
    """
    if not torch.compiler.is_compiling() and _PLAIN.get():  # torch.compile cannot trace a ContextVar
        return False
    able = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    return able and not learns and not torch.compiler.is_exporting() and has_numba()
