"""The precision that a network computes in, as engines see it."""

from __future__ import annotations

import torch

from karui.model import Model


def other_than_float32(model: Model) -> str:
    """The precision of the first floating-point parameters that are not in 32 bits, such as "float64"; else "".

    ONNX Runtime has kernels of all layers in 32 bits only. In float64 it lacks those of convolutions, in bfloat16
    nearly all; in float16 it computes in 32 bits, and parts of such a file cannot be timed by themselves.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> other_than_float32(Model(net.double(), example=(torch.zeros(1, 2).double(),)))
        'float64'
    """
    kinds = (p.dtype for p in model.module.parameters() if p.is_floating_point())
    return next((str(kind).removeprefix("torch.") for kind in kinds if kind != torch.float32), "")
