"""Sparse storage: exact to the bit, as small as it says, and never wrong in silence."""

from __future__ import annotations

import dataclasses
import math
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from karui.errors import ArtifactError, SettingError, UsageError
from karui.numerics.packing import (
    MOST_INDEX_BITS,
    Packed,
    code_bytes,
    pack_bits,
    pack_sparse,
    unpack_bits,
    unpack_sparse,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8)


def thinned(*shape: int, keep: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    return tensor.masked_fill(torch.rand(shape, generator=generator) >= keep, 0.0)


def bits_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@st.composite
def sparse_tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)  # any bits at all: NaNs, infinities, denormals
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))
    return torch.where(keep, tensor, torch.zeros((), dtype=dtype))


@pytest.mark.paper(63)
@settings(max_examples=300, deadline=None)
@given(sparse_tensors(), st.none() | st.integers(1, MOST_INDEX_BITS))
def test_any_tensor_comes_back_to_the_bit(tensor: torch.Tensor, index_bits: int | None) -> None:
    packed = pack_sparse(tensor, index_bits)
    back = unpack_sparse(Packed.from_arrays(packed.to_arrays(), packed.header()))
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert bits_of(back) == bits_of(tensor)


@given(st.integers(1, MOST_INDEX_BITS), st.data())
@settings(max_examples=200, deadline=None)
def test_codes_come_back_and_take_no_more_than_their_bits(bits: int, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=np.int64)
    stream = pack_bits(codes, bits)
    assert len(stream) == code_bytes(len(codes), bits) <= math.ceil(len(codes) * bits / 8) + (bits > 8)
    assert (unpack_bits(stream, bits, len(codes)) == codes).all()


def test_negative_zero_and_nan_are_values() -> None:
    nan = torch.tensor([0x7FC00001, 0xFFC12345 - 2**32], dtype=torch.int32).view(torch.float32)  # two NaNs that differ
    tensor = torch.cat([torch.tensor([0.0, -0.0, 0.0, math.inf]), nan])
    packed = pack_sparse(tensor)
    assert packed.count == 4
    assert bits_of(unpack_sparse(packed)) == bits_of(tensor)


@pytest.mark.paper(54)
@pytest.mark.parametrize("bits", [1, 3, 5, 8])
@pytest.mark.parametrize("gap", [0, 1, 7, 8, 9, 31, 32, 255, 256, 1000])
def test_fillers_are_the_gap_over_two_to_the_bits(bits: int, gap: int) -> None:
    tensor = torch.zeros(gap + 1)
    tensor[gap] = 2.5
    packed = pack_sparse(tensor, bits)
    assert packed.count == 1 + gap // 2**bits
    assert torch.equal(unpack_sparse(packed), tensor)


@pytest.mark.paper(54)
def test_example_of_the_paper() -> None:
    """Figure 2 of Deep Compression: entries at 1, 4 and 15 with 3-bit indices need one filler."""
    tensor = torch.zeros(16)
    tensor[[1, 4, 15]] = torch.tensor([3.4, 0.9, 1.7])
    packed = pack_sparse(tensor, 3)
    assert unpack_bits(packed.codes, 3, packed.count).tolist() == [1, 2, 7, 2]
    assert packed.values.view(np.float32).tolist() == pytest.approx([3.4, 0.9, 0.0, 1.7])


def test_bytes_are_the_formula_and_the_best_width_is_best() -> None:
    for keep in (0.0, 0.001, 0.05, 0.3, 1.0):
        tensor = thinned(50_000, keep=keep)
        best = pack_sparse(tensor)
        for bits in range(1, MOST_INDEX_BITS + 1):
            packed = pack_sparse(tensor, bits)
            assert packed.bytes == code_bytes(packed.count, bits) + 4 * packed.count
            assert best.bytes <= packed.bytes


def test_a_tenth_kept_takes_little_more_than_a_tenth() -> None:
    tensor = thinned(300, 1000, keep=0.1)
    packed = pack_sparse(tensor, 5)
    assert packed.bytes < 0.125 * tensor.nbytes


def test_the_original_is_not_shared() -> None:
    tensor = torch.tensor([1.0, 0.0, 2.0])
    packed = pack_sparse(tensor)
    tensor.fill_(9.0)
    unpack_sparse(packed).fill_(7.0)
    assert unpack_sparse(packed).tolist() == [1.0, 0.0, 2.0]


def test_views_and_transposes() -> None:
    tensor = torch.arange(24.0).reshape(4, 6).t()[1:, ::2]
    assert torch.equal(unpack_sparse(pack_sparse(tensor)), tensor)
    parameter = torch.nn.Parameter(torch.eye(3))
    assert torch.equal(unpack_sparse(pack_sparse(parameter)), parameter.detach())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_changed_byte_is_noticed(data: st.DataObject) -> None:
    tensor = torch.zeros(200)
    tensor[::7] = torch.arange(29.0)
    packed = pack_sparse(tensor, 4)
    name = data.draw(st.sampled_from(["codes", "values"]))
    array = packed.to_arrays()[name].copy()
    array[data.draw(st.integers(0, len(array) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactError):
        unpack_sparse(dataclasses.replace(packed, **{name: array}))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (10**15,)},
        {"shape": (2**40, 2**40)},
        {"shape": (199,)},
        {"shape": (201,)},
        {"shape": (-200,)},
        {"shape": (200.0,)},
        {"shape": (True,)},
        {"dtype": "float64"},
        {"dtype": "int32"},
        {"dtype": "pickle"},
        {"dtype": ["float32"]},
        {"count": 10**12},
        {"count": -1},
        {"count": "30"},
        {"index_bits": 0},
        {"index_bits": 5},
        {"index_bits": 10**9},
        {"check": 0},
        {"check": None},
        {"codes": np.zeros(0, dtype=np.uint8)},
        {"codes": None},
        {"values": np.zeros(29, dtype=np.float32)},
        {"values": "abc"},
    ],
)
def test_a_changed_field_is_an_error(change: dict) -> None:
    tensor = torch.zeros(200)
    tensor[::7] = torch.arange(1.0, 30.0)
    packed = dataclasses.replace(pack_sparse(tensor, 4), **change)
    with pytest.raises(ArtifactError):
        unpack_sparse(packed)
    with pytest.raises(ArtifactError):
        Packed.from_arrays(packed.to_arrays(), packed.header() | {"shape": change.get("shape", (200,))})


def test_a_shape_that_its_checksum_supports_is_still_bound_to_the_entries() -> None:
    """Even a forged checksum cannot claim a tensor that the entries do not reach to the end of."""
    from karui.numerics.packing import _checksum

    packed = pack_sparse(torch.ones(8), 4)
    for shape in ((10**15,), (4,)):
        claimed = dataclasses.replace(packed, shape=shape)
        with pytest.raises(ArtifactError, match="before the end"):
            unpack_sparse(dataclasses.replace(claimed, check=_checksum(claimed)))


def test_missing_and_unknown_fields_are_errors() -> None:
    packed = pack_sparse(torch.ones(8), 4)
    header = packed.header()
    with pytest.raises(ArtifactError, match="lacks values"):
        Packed.from_arrays({"codes": packed.codes}, header)
    with pytest.raises(ArtifactError, match="unknown fields: colour"):
        Packed.from_arrays(packed.to_arrays(), {**header, "colour": 1})
    with pytest.raises(ArtifactError, match="shape"):
        Packed.from_arrays(packed.to_arrays(), {**header, "shape": 8})


def test_wrong_requests_are_told() -> None:
    with pytest.raises(SettingError, match="index_bits is 17"):
        pack_sparse(torch.ones(2), 17)
    with pytest.raises(UsageError, match="complex64"):
        pack_sparse(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(UsageError, match="sparse"):
        pack_sparse(torch.ones(2).to_sparse())


def test_ten_million_elements_take_less_than_a_second_of_processor_time() -> None:
    tensor = thinned(10_000_000, keep=0.1)
    start = time.process_time()
    packed = pack_sparse(tensor)
    packing = time.process_time() - start
    start = time.process_time()
    back = unpack_sparse(packed)
    unpacking = time.process_time() - start
    assert torch.equal(back, tensor)
    assert packing < 1, f"packing took {packing:.2f} s"
    assert unpacking < 1, f"unpacking took {unpacking:.2f} s"
