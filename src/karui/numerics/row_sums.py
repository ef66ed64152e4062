"""Sums of looked-up rows, the inner loop of layers that go by tables (survey 19).

The plain form is torch's, and serves everywhere: gradients, any device, export. With numba installed (`karui[fast]`)
inference on the CPU takes a kernel, the operator `karui::row_sums`: rows of a table are contiguous, so that eight of
them are added at a time, as wide as the processor's registers are. On x86 torch has a kernel for the same sums, that of
embedding bags, which keeps them in registers: it is taken where the tables stay in the second cache, up to 2.5 times
faster at eight columns and 1.5 times at 64. It wants whole places for codes, which are kept, four bytes for each code.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from karui.numerics.kernels import serves

_BAGS = platform.machine() in ("x86_64", "AMD64")
_FEWEST, _LARGEST = 8, 2**19  # columns from which bags are faster, and numbers in tables up to which
_KEPT: Any = WeakTensorKeyDictionary()

_LIBRARY = torch.library.Library("karui", "FRAGMENT")
_LIBRARY.define("row_sums(Tensor tables, Tensor codes) -> Tensor")


def row_sums(
    tables: Float[Tensor, "parts words columns"], codes: Integer[Tensor, "rows parts"]
) -> Float[Tensor, "rows columns"]:
    """`sum_m tables[m, codes[n, m]]` for each row `n`: by the kernel where it serves, else in plain torch.

    Codes may be changed in place, but not through `codes.data`: torch does not count that, and the kernel keeps places
    that it found once.

    Example:
        >>> tables = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])
        >>> row_sums(tables, torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)).tolist()
        [[21.0], [12.0]]
    """
    if codes.dtype != torch.uint8 or not serves(tables):
        return plain_row_sums(tables, codes)
    return torch.ops.karui.row_sums(tables, codes)


def plain_row_sums(
    tables: Float[Tensor, "parts words columns"], codes: Integer[Tensor, "rows parts"]
) -> Float[Tensor, "rows columns"]:
    """The same in operators of torch: one gather, one sum."""
    parts, words = tables.shape[:2]
    places = codes.long() + words * torch.arange(parts, device=codes.device)
    return tables.flatten(0, 1)[places.flatten()].unflatten(0, places.shape).sum(1)


def _on_the_cpu(tables: Tensor, codes: Tensor) -> Tensor:
    if _BAGS and tables.shape[2] >= _FEWEST and tables.numel() <= _LARGEST:
        return functional.embedding_bag(_places(codes, tables.shape[1]), tables.flatten(0, 1), mode="sum")
    out = torch.empty(codes.shape[0], tables.shape[2])
    several, single = kernels()
    arrays = [one.detach().contiguous().numpy() for one in (tables, codes)]
    (single if tables.shape[2] == 1 else several)(*arrays, out.numpy())
    return out


def _places(codes: Integer[Tensor, "rows parts"], words: int) -> Int[Tensor, "rows parts"]:
    """Where in the flat tables each code points to; found once for codes that do not change."""
    if codes.is_inference():  # nobody counts its changes
        return _found(codes, words)
    state = codes._version, codes.data_ptr(), words  # noqa: SLF001  (torch's count of changes in place)
    if codes not in _KEPT or _KEPT[codes][0] != state:
        _KEPT[codes] = state, _found(codes, words)
    return _KEPT[codes][1]


def _found(codes: Integer[Tensor, "rows parts"], words: int) -> Int[Tensor, "rows parts"]:
    return codes.int() + words * torch.arange(codes.shape[1], dtype=torch.int32)


def _shape(tables: Tensor, codes: Tensor) -> Tensor:
    return tables.new_empty(codes.shape[0], tables.shape[2])


_LIBRARY.impl("row_sums", _on_the_cpu, "CPU")
_LIBRARY.impl("row_sums", _shape, "Meta")


@cache
def kernels() -> tuple[Any, Any]:
    """The compiled loops: for tables of several columns, and for those of one."""
    import numba

    compiled = numba.njit(nogil=True, fastmath=True, error_model="numpy")
    return compiled(_several), compiled(_single)


def _several(tables: Any, codes: Any, out: Any) -> None:
    rows, parts = codes.shape
    whole = parts - parts % 8
    out[:] = 0
    for part in range(0, whole, 8):
        # Eight tables stay in the nearest cache while all rows take from them.
        ta, tb, tc, td = tables[part], tables[part + 1], tables[part + 2], tables[part + 3]
        te, tf, tg, th = tables[part + 4], tables[part + 5], tables[part + 6], tables[part + 7]
        for row in range(rows):
            into, k = out[row], codes[row]
            # Slices of rows: an index that is computed in the loop could be negative, and would not be vectorised.
            a, b, c, d = ta[k[part]], tb[k[part + 1]], tc[k[part + 2]], td[k[part + 3]]
            e, f, g, h = te[k[part + 4]], tf[k[part + 5]], tg[k[part + 6]], th[k[part + 7]]
            for column in range(into.shape[0]):
                left = (a[column] + b[column]) + (c[column] + d[column])
                right = (e[column] + f[column]) + (g[column] + h[column])
                into[column] += left + right
    for part in range(whole, parts):
        for row in range(rows):
            into, a = out[row], tables[part, codes[row, part]]
            for column in range(into.shape[0]):
                into[column] += a[column]


def _single(tables: Any, codes: Any, out: Any) -> None:
    rows, parts = codes.shape
    for row in range(rows):
        one = two = three = four = tables[0, 0, 0] - tables[0, 0, 0]
        whole = parts - parts % 4
        for part in range(0, whole, 4):
            one += tables[part, codes[row, part], 0]
            two += tables[part + 1, codes[row, part + 1], 0]
            three += tables[part + 2, codes[row, part + 2], 0]
            four += tables[part + 3, codes[row, part + 3], 0]
        for part in range(whole, parts):
            one += tables[part, codes[row, part], 0]
        out[row, 0] = (one + two) + (three + four)
