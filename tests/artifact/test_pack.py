import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.artifact.pack import FORMS, Stored, pack, unpack
from karui.errors import ArtifactError

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
]


def same_bits(a, b):
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@given(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 9), min_size=0, max_size=3), st.floats(0, 1), st.integers(0, 10**6)
)
@settings(max_examples=150, deadline=None)
def test_every_form_gives_the_tensor_back_exact_to_the_bit(dtype, shape, zeros, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=generator) * 50).to(dtype)
    tensor = tensor.masked_fill(torch.rand(shape, generator=generator) < zeros, 0)
    assert same_bits(unpack(pack(tensor)), tensor)
    for form in FORMS:
        stored = form.pack(tensor) if tensor.numel() else None
        if stored is not None:
            assert same_bits(form.unpack(stored.arrays, stored.header), tensor)


def test_signs_of_zero_infinities_and_nans_survive():
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45] + [0.0] * 500)
    odd[5:7] = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    for form in FORMS:
        stored = form.pack(odd)
        assert same_bits(form.unpack(stored.arrays, stored.header), odd)


def test_the_smallest_form_is_taken():
    torch.manual_seed(0)
    dense = torch.randn(5000)
    pruned = dense.masked_fill(torch.rand(5000) < 0.9, 0)
    signs = torch.where(dense > 0, 0.3, -0.3)
    assert (pack(dense).form, pack(dense).bytes) == ("dense", 20000)
    assert (pack(pruned).form, pack(signs).form) == ("sparse", "codebook")
    assert pack(pruned).bytes < 20000 * 0.14
    assert pack(signs).bytes == 5000 // 8 + 8
    assert pack(torch.zeros(5000)).bytes < 700


def test_a_small_tensor_stays_dense():
    assert pack(torch.zeros(8)).form == "dense"


def test_a_pruned_tensor_of_few_values_takes_the_codebook():
    torch.manual_seed(0)
    ternary = torch.randint(-1, 2, (4000,)).float()
    assert pack(ternary).bytes == 1000 + 12


def test_views_are_stored_as_what_they_show():
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base.t(), base[:, ::2], base[1]):
        assert same_bits(unpack(pack(view)), view.contiguous())


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_what_has_no_plain_bytes_is_refused(tensor):
    with pytest.raises(ArtifactError, match="cannot be stored"):
        pack(tensor)


def test_damaged_parts_are_told():
    stored = pack(torch.where(torch.randn(5000) > 0, 0.3, -0.3))
    short = {**stored.arrays, "codes": stored.arrays["codes"][:-1]}
    wild = {"values": np.zeros(4, np.uint8), "codes": np.full_like(stored.arrays["codes"], 255)}
    for arrays in (short, wild, {}):
        with pytest.raises(ArtifactError):
            unpack(Stored(form=stored.form, arrays=arrays, header=stored.header))
    with pytest.raises(ArtifactError, match="'newer'.*Update karui"):
        unpack(Stored(form="newer", arrays=stored.arrays))
