"""Tensors as bytes: each in the smallest form that gives it back exact to the bit.

The forms are dense, sparse with relative indices (Han et al., surveys 63 and 54), and a codebook of few values with
narrow indices (one bit each for a binary layer). What comes back is always the plain tensor, so nobody who loads a
model need know how it was stored. A new form is one more `Form` in `FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from karui.errors import ArtifactError, require
from karui.numerics.packing import Packed, pack_bits, pack_sparse, unpack_bits, unpack_sparse

ENTRY = 100
"""Bytes that one more array costs in the file's tables, roughly: small tensors stay dense."""
MOST_VALUES = 256
"""Largest codebook."""

Arrays = Mapping[str, UInt8[np.ndarray, "bytes"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """A tensor in one of the forms.

    Settings:
        form: which.
        arrays: its arrays of bytes, by name.
        header: what else `unpack` needs, as JSON values.
        dense: for a dense tensor, the tensor itself.
    """

    form: str
    arrays: Arrays = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    dense: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        if self.dense is not None:
            return self.dense.numel() * self.dense.element_size()
        return sum(array.nbytes for array in self.arrays.values())


class Form(Protocol):
    """A way to store a tensor."""

    @property
    def name(self) -> str:
        """What the file calls it."""
        ...

    def pack(self, tensor: Tensor) -> Stored | None:
        """The tensor in this form; None where the form has nothing to offer it."""
        ...

    def unpack(self, arrays: Arrays, header: Mapping[str, Any]) -> Tensor:
        """The tensor that `pack` was given."""
        ...


@dataclass(frozen=True)
class Sparse:
    """The entries that are not zero, and the gaps between them."""

    name: str = field(default="sparse", init=False)

    def pack(self, tensor: Shaped[Tensor, "..."]) -> Stored | None:
        """Nothing for a tensor of which less than a tenth is zero: indices would cost more than they save."""
        if torch.count_nonzero(tensor) > 0.9 * tensor.numel():
            return None
        packed = pack_sparse(tensor)
        return Stored(form=self.name, arrays=packed.to_arrays(), header=packed.header())

    def unpack(self, arrays: Arrays, header: Mapping[str, Any]) -> Shaped[Tensor, "..."]:
        """The dense tensor."""
        return unpack_sparse(Packed.from_arrays(arrays, header))


@dataclass(frozen=True)
class Codebook:
    """The few different values, and for each entry the number of its value."""

    name: str = field(default="codebook", init=False)

    def pack(self, tensor: Shaped[Tensor, "..."]) -> Stored | None:
        """Nothing for a tensor of more than 256 values."""
        raw = _raw(tensor)
        if len(np.unique(raw[: 16 * MOST_VALUES])) > MOST_VALUES:
            return None
        values, codes = np.unique(raw, return_inverse=True)
        if len(values) > MOST_VALUES:
            return None
        bits = max(1, math.ceil(math.log2(len(values))))
        return Stored(
            form=self.name,
            arrays={"codes": pack_bits(codes.reshape(-1), bits), "values": values.view(np.uint8)},
            header={"shape": list(tensor.shape), "dtype": _dtype_name(tensor), "index_bits": bits},
        )

    def unpack(self, arrays: Arrays, header: Mapping[str, Any]) -> Shaped[Tensor, "..."]:
        """The dense tensor.

        Raises:
            ArtifactError: an index points outside the codebook, or a length does not fit.
        """
        dtype, shape = dtype_of(header["dtype"]), tuple(header["shape"])
        values = np.frombuffer(arrays["values"].tobytes(), dtype=f"u{dtype.itemsize}")
        codes = unpack_bits(np.asarray(arrays["codes"]), header["index_bits"], math.prod(shape))
        require(
            len(codes) == 0 or int(codes.max()) < len(values),
            f"A codebook has {len(values)} values, and an index {int(codes.max(initial=0))}.",
            "The file is damaged; save the model again.",
            ArtifactError,
        )
        return torch.from_numpy(values[codes].view(f"i{dtype.itemsize}")).view(dtype).reshape(shape)


FORMS: tuple[Form, ...] = (Sparse(), Codebook())


def pack(tensor: Shaped[Tensor, "..."]) -> Stored:
    """The tensor in its smallest form.

    Raises:
        ArtifactError: the tensor is of a kind that has no plain bytes (quantised, sparse layout, without data).

    Example:
        >>> weight = torch.zeros(1000)
        >>> weight[::50] = torch.linspace(1, 2, 20)
        >>> pack(weight).form, pack(weight).bytes < 200, pack(torch.linspace(0, 1, 1000)).form
        ('sparse', True, 'dense')
    """
    require(
        tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta,
        f"A tensor of layout {tensor.layout} and dtype {tensor.dtype} on {tensor.device} cannot be stored.",
        "Dequantise it, or make it dense, first.",
        ArtifactError,
    )
    tensor = tensor.detach().cpu().contiguous()
    best = Stored(form="dense", dense=tensor)
    if tensor.is_complex() or tensor.numel() == 0:
        return best
    for form in FORMS:
        stored = form.pack(tensor)
        if stored is not None and stored.bytes + ENTRY * len(stored.arrays) < best.bytes + ENTRY * _entries(best):
            best = stored
    return best


def unpack(stored: Stored) -> Tensor:
    """The tensor that `pack` was given.

    Raises:
        ArtifactError: the form is not known, or its parts do not fit together.
    """
    if stored.dense is not None:
        return stored.dense
    form = next((form for form in FORMS if form.name == stored.form), None)
    require(
        form is not None,
        f"A tensor is stored as '{stored.form}', which this version of karui does not know.",
        "Update karui: pip install -U karui",
        ArtifactError,
    )
    assert form is not None  # noqa: S101  (refused above)
    try:
        return form.unpack(stored.arrays, stored.header)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ArtifactError(
            f"A tensor stored as '{stored.form}' is damaged: {error}.", "Save the model again."
        ) from error


def _entries(stored: Stored) -> int:
    return 1 if stored.dense is not None else len(stored.arrays)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ArtifactError: there is none.
    """
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"'{name}' is no dtype of torch.", "The file is damaged; save the model again.")
    return dtype


def _raw(tensor: Tensor) -> np.ndarray:
    """The entries as unsigned integers of the same width, in row order."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(whole).numpy().view(f"u{tensor.element_size()}")
