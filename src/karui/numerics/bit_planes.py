"""Codes of k bits as k planes of single bits, eight to a byte: any width takes just its bits.

Unpacked by plain tensor operators, so that a network which holds its weights like this can be exported.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor


def plane_bytes(count: int) -> int:
    """Bytes of one plane of so many codes."""
    return math.ceil(count / 8)


def pack_planes(codes: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "bits bytes"]:
    """Whole numbers from 0 to 2^bits - 1, in row order, as planes; the lowest bit's first, within a byte too.

    Example:
        >>> pack_planes(torch.tensor([1, 0, 2]), 2).tolist()
        [[1], [4]]
    """
    flat: Integer[Tensor, "count"] = codes.detach().flatten().long()
    padded = torch.nn.functional.pad(flat, (0, 8 * plane_bytes(len(flat)) - len(flat))).reshape(-1, 8)
    places = torch.arange(8, device=flat.device)
    planes = [((padded >> bit & 1) << places).sum(1) for bit in range(bits)]
    return torch.stack(planes).to(torch.uint8)


def unpack_planes(
    planes: UInt8[Tensor, "bits bytes"], count: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "count"]:
    """The codes that `pack_planes` was given, as floating point numbers.

    Example:
        >>> unpack_planes(torch.tensor([[1], [4]], dtype=torch.uint8), 3).tolist()
        [1.0, 0.0, 2.0]
    """
    masks = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=planes.device)
    weights = torch.tensor([2.0**bit for bit in range(len(planes))], dtype=dtype, device=planes.device)
    ones = ((planes.unsqueeze(2) & masks) != 0).to(dtype)
    return (ones * weights.reshape(-1, 1, 1)).sum(0).flatten()[:count]
