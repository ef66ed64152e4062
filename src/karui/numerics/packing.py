"""Sparse tensors as bytes: the stored entries, and how far each lies from the one before.

Positions are relative (Han et al. 2015 and 2016, survey 63 and 54): the tensor is flattened row by row, and each stored
entry carries the number of zeros since the last one in `index_bits` bits. A gap that does not fit is bridged by filler
entries of value zero, each of which stands for `2**index_bits` positions.

Zero is the bit pattern of +0.0 and nothing else, so -0.0 and NaN are entries and every round trip is exact to the bit.
(Beware: `weight * mask` leaves -0.0 where a weight was negative; `weight.masked_fill(~mask, 0.0)` does not.)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, Shaped, UInt8
from torch import Tensor

from karui.errors import ArtifactError, UsageError, require

MOST_INDEX_BITS = 16

# Values travel as integers of the same width: what a NaN holds, and the sign of a zero, must survive.
_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_RAW_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed:
    """A tensor in sparse storage.

    Settings:
        codes: zeros before each entry, `index_bits` bits each, as bytes (`pack_bits`).
        values: the entries' bytes, little end first, in the tensor's dtype.
        shape: the tensor's.
        dtype: the tensor's, as torch names it ("float32").
        count: number of entries, fillers included.
        index_bits: bits of one code, 1 to 16.
        check: CRC-32 over all the rest.
    """

    codes: UInt8[np.ndarray, "code_bytes"]
    values: UInt8[np.ndarray, "value_bytes"]
    shape: tuple[int, ...]
    dtype: str
    count: int
    index_bits: int
    check: int

    @property
    def bytes(self) -> int:
        """Bytes of the two arrays."""
        return self.codes.nbytes + self.values.nbytes

    def header(self) -> dict[str, Any]:
        """What is not an array, as JSON values."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "count": self.count,
            "index_bits": self.index_bits,
            "check": self.check,
        }

    def to_arrays(self) -> dict[str, UInt8[np.ndarray, "bytes"]]:
        """The two arrays by name; with `header`, all that `from_arrays` asks for."""
        return {"codes": self.codes, "values": self.values}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> Packed:
        """The value that `to_arrays` and `header` told.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        told: dict[str, Any] = {**arrays, **header}
        missing = [name for name in cls.__dataclass_fields__ if name not in told]
        require(not missing, f"A sparse tensor lacks {', '.join(missing)}.", _DAMAGED, ArtifactError)
        extra = [name for name in told if name not in cls.__dataclass_fields__]
        require(not extra, f"A sparse tensor has unknown fields: {', '.join(extra)}.", _DAMAGED, ArtifactError)
        require(
            isinstance(told["shape"], list | tuple), f"A sparse tensor's shape is {told['shape']!r}.", "", ArtifactError
        )
        packed = cls(**{**told, "shape": tuple(told["shape"])})
        _validate(packed)
        return packed


_DAMAGED = "The file is damaged; save the model again."


def pack_bits(codes: Integer[np.ndarray, "count"], bits: int) -> UInt8[np.ndarray, "bytes"]:
    """Unsigned codes of `bits` bits each (1 to 16) as a stream of bytes, low bits first.

    Codes wider than a byte are laid out as the plane of their low bytes and then the rest, packed in the same way.

    Example:
        >>> pack_bits(np.array([1, 0, 2]), bits=2).tolist()
        [33]
    """
    require(1 <= bits <= MOST_INDEX_BITS, f"bits is {bits}; give 1 to {MOST_INDEX_BITS}")
    if bits > 8:
        return np.concatenate([(codes & 0xFF).astype(np.uint8), pack_bits(codes >> 8, bits - 8)])
    if bits == 8:
        return codes.astype(np.uint8)
    groups = np.zeros((math.ceil(len(codes) / 8), 8), dtype=np.uint8)  # eight codes fill `bits` bytes exactly
    groups.reshape(-1)[: len(codes)] = codes
    words = np.zeros(len(groups), dtype="<u8")
    for place in range(8):
        words |= groups[:, place].astype(np.uint64) << np.uint64(bits * place)
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return stream[: code_bytes(len(codes), bits)].copy()


def unpack_bits(stream: UInt8[np.ndarray, "bytes"], bits: int, count: int) -> Integer[np.ndarray, "count"]:
    """The `count` codes that `pack_bits` wrote.

    Raises:
        ArtifactError: the stream has another length than so many codes take.

    Example:
        >>> unpack_bits(np.array([33], dtype=np.uint8), bits=2, count=3).tolist()
        [1, 0, 2]
    """
    require(1 <= bits <= MOST_INDEX_BITS, f"bits is {bits}; give 1 to {MOST_INDEX_BITS}")
    need = code_bytes(count, bits)
    require(
        len(stream) == need,
        f"{count} codes of {bits} bits take {need} bytes, and there are {len(stream)}.",
        _DAMAGED,
        ArtifactError,
    )
    if bits > 8:
        return stream[:count].astype(np.int32) | unpack_bits(stream[count:], bits - 8, count) << 8
    if bits == 8:
        return stream.astype(np.int32)
    padded = np.zeros((math.ceil(count / 8), bits), dtype=np.uint8)
    padded.reshape(-1)[:need] = stream
    wide = np.zeros((len(padded), 8), dtype=np.uint8)
    wide[:, :bits] = padded
    words, mask = wide.view("<u8").reshape(-1), np.uint64(2**bits - 1)
    codes = np.empty((len(words), 8), dtype=np.int32)
    for place in range(8):
        codes[:, place] = words >> np.uint64(bits * place) & mask
    return codes.reshape(-1)[:count]


def code_bytes(count: int, bits: int) -> int:
    """Length of `pack_bits` of `count` codes."""
    return count + math.ceil(count * (bits - 8) / 8) if bits > 8 else math.ceil(count * bits / 8)


def pack_sparse(tensor: Shaped[Tensor, "..."], index_bits: int | None = None) -> Packed:
    """The tensor in sparse storage, exact to the bit.

    Args:
        tensor: any strided tensor of up to eight bytes an element.
        index_bits: bits of one relative index, 1 to 16; None takes what gives the fewest bytes.

    Raises:
        SettingError: `index_bits` is out of range.
        UsageError: the tensor's dtype or layout cannot be stored this way.

    Example:
        >>> weight = torch.tensor([0.0, 3.5, 0.0, 0.0, -1.0])
        >>> packed = pack_sparse(weight, index_bits=2)
        >>> packed.count, packed.bytes, bool((unpack_sparse(packed) == weight).all())
        (2, 9, True)
    """
    require(
        index_bits is None or 1 <= index_bits <= MOST_INDEX_BITS,
        f"index_bits is {index_bits}; give 1 to {MOST_INDEX_BITS}, or None for the best",
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    require(
        dtype in _DTYPES and tensor.layout == torch.strided and not tensor.is_meta,
        f"A tensor of dtype {dtype} and layout {tensor.layout} on {tensor.device} has no sparse storage here.",
        f"Convert it to a strided one of {', '.join(_DTYPES)}.",
        UsageError,
    )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(_RAW[tensor.element_size()]).numpy()
    places = np.flatnonzero(raw)
    gaps = np.diff(places, prepend=-1) - 1
    tail = len(raw) - 1 - (int(places[-1]) if len(places) else -1)
    bits = index_bits or _best_index_bits(gaps, tail, tensor.element_size())
    codes, values = _bridge(gaps, raw[places], tail, bits)
    packed = Packed(
        codes=pack_bits(codes, bits),
        values=values.view(np.uint8),
        shape=tuple(tensor.shape),
        dtype=dtype,
        count=len(values),
        index_bits=bits,
        check=0,
    )
    return replace(packed, check=_checksum(packed))


def unpack_sparse(packed: Packed) -> Tensor:
    """The tensor that `pack_sparse` was given.

    Raises:
        ArtifactError: a field does not fit the others, or the checksum does not fit the content. Nothing of the
            tensor's size is allocated before all of this is known to be right.
    """
    _validate(packed)
    gaps = unpack_bits(packed.codes, packed.index_bits, packed.count)
    places = np.cumsum(gaps + 1, dtype=np.int64) - 1
    size = math.prod(packed.shape)
    tail = size - 1 - (int(places[-1]) if len(places) else -1)
    require(
        0 <= tail < 2**packed.index_bits,
        f"A sparse tensor's entries end {tail} positions before the end of its shape {packed.shape}.",
        _DAMAGED,
        ArtifactError,
    )
    dtype = _DTYPES[packed.dtype]
    raw = np.zeros(size, dtype=_RAW_NUMPY[dtype.itemsize])
    raw[places] = np.frombuffer(packed.values.tobytes(), dtype=raw.dtype)
    return torch.from_numpy(raw).view(dtype).reshape(packed.shape)


def _bridge(
    gaps: Integer[np.ndarray, "entries"], kept: Integer[np.ndarray, "entries"], tail: int, bits: int
) -> tuple[Integer[np.ndarray, "count"], Integer[np.ndarray, "count"]]:
    """Codes and values with fillers: floor(gap / 2**bits) of them before an entry, and also behind the last one.

    Without those behind, any number of zeros could be claimed at no cost: a damaged shape would go unnoticed.
    """
    fillers = gaps >> bits
    ends = np.cumsum(fillers + 1)
    count = (int(ends[-1]) if len(ends) else 0) + (tail >> bits)
    codes = np.full(count, 2**bits - 1, dtype=np.int32)
    values = np.zeros(count, dtype=kept.dtype)
    codes[ends - 1] = gaps & (2**bits - 1)
    values[ends - 1] = kept
    return codes, values


def _best_index_bits(gaps: Integer[np.ndarray, "entries"], tail: int, itemsize: int) -> int:
    """The code width of the fewest bytes; the narrowest of equals."""
    # Gaps repeat: counting each length once makes sixteen trials cost no more than one.
    often = np.bincount(gaps)
    lengths = np.flatnonzero(often)
    often = often[lengths]

    def total(bits: int) -> int:
        count = len(gaps) + int((often * (lengths >> bits)).sum()) + (tail >> bits)
        return code_bytes(count, bits) + count * itemsize

    return min(range(1, MOST_INDEX_BITS + 1), key=total)


def _validate(packed: Packed) -> None:
    """Every field by itself, then the lengths, then the checksum."""

    def check(condition: bool, message: str) -> None:
        require(condition, message, _DAMAGED, ArtifactError)

    arrays = (packed.codes, packed.values)
    check(
        all(isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 1 for array in arrays),
        "A sparse tensor's codes and values are not two rows of bytes.",
    )
    numbers = (packed.count, packed.index_bits, packed.check, *packed.shape)
    check(
        all(type(number) is int and number >= 0 for number in numbers),
        f"A sparse tensor's sizes are {numbers}, not whole numbers from 0.",
    )
    check(packed.dtype in tuple(_DTYPES), f"A sparse tensor's dtype is {packed.dtype!r}.")
    check(1 <= packed.index_bits <= MOST_INDEX_BITS, f"A sparse tensor has indices of {packed.index_bits} bits.")
    lengths = (code_bytes(packed.count, packed.index_bits), packed.count * _DTYPES[packed.dtype].itemsize)
    check(
        (len(packed.codes), len(packed.values)) == lengths,
        f"A sparse tensor of {packed.count} entries has {len(packed.codes)} and {len(packed.values)} bytes, "
        f"and needs {lengths[0]} and {lengths[1]}.",
    )
    check(_checksum(packed) == packed.check, "A sparse tensor's checksum does not fit its content.")


def _checksum(packed: Packed) -> int:
    head = repr((packed.shape, packed.dtype, packed.count, packed.index_bits)).encode()
    return zlib.crc32(packed.values.tobytes(), zlib.crc32(packed.codes.tobytes(), zlib.crc32(head)))
