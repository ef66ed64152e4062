"""Quantisers with a straight-through gradient, and codes as planes of bits."""

from __future__ import annotations

import pytest
import torch

from karui.errors import SettingError
from karui.numerics.bit_planes import pack_planes, unpack_planes
from karui.numerics.straight_through import (
    InputGrid,
    WeightGrid,
    fitted_reach,
    fitted_scale,
    levels,
    quantise_unit,
)

pytestmark = pytest.mark.paper(38)
BITS = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("bits", BITS)
def test_a_unit_has_so_many_levels_none_far_away_and_is_quantised_once(bits: int) -> None:
    z = torch.linspace(0, 1, 20001)
    made = quantise_unit(z, bits)
    assert len(made.unique()) == 2**bits
    assert torch.equal(quantise_unit(made, bits), made)
    assert (made - z).abs().max() <= 1 / (2 * levels(bits)) + 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_levels_of_weights_are_symmetric_reach_an_end_and_leave_out_zero(bits: int) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    made = WeightGrid(bits)(weight)
    found = made.unique()
    assert made.abs().max() == 1
    assert len(found) == 2**bits
    torch.testing.assert_close(found, -found.flip(0))
    assert found.abs().min() == pytest.approx(1 / levels(bits), abs=1e-6)
    whole = 2 * WeightGrid(bits).codes(weight) - levels(bits)
    torch.testing.assert_close(whole / levels(bits), made)


def test_the_gradient_of_a_weight_takes_the_largest_one_as_a_constant() -> None:
    weight = torch.tensor([0.5, -2.0, 1.0], requires_grad=True)
    WeightGrid(2, scale=3.0)(weight).sum().backward()
    bent = weight.detach().tanh()
    torch.testing.assert_close(weight.grad, 3 * (1 - bent**2) / bent.abs().max())


def test_inputs_have_a_gradient_within_the_clip_only() -> None:
    x = torch.tensor([-0.1, 0.0, 0.4, 1.0, 1.1], requires_grad=True)
    InputGrid(2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    wide = torch.tensor([-2.1, -2.0, 0.3, 2.0, 2.1], requires_grad=True)
    InputGrid(3, reach=2.0, signed=True)(wide).sum().backward()
    assert wide.grad is not None
    assert wide.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_are_their_codes_times_a_step(signed: bool) -> None:
    x = torch.linspace(-2, 2, 4001)
    for bits in BITS:
        grid = InputGrid(bits, reach=1.5, signed=signed)
        codes = grid.codes(x)
        assert torch.equal(codes, codes.round())
        assert len(codes.unique()) == 2**bits
        torch.testing.assert_close(codes * (1.5 / levels(bits)), grid(x))


def test_32_bits_are_the_identity() -> None:
    x = torch.randn(50)
    assert torch.equal(WeightGrid(32)(x), x)
    assert torch.equal(InputGrid(32)(x), x)
    assert torch.equal(quantise_unit(x, 32), x)


def test_widths_that_do_not_exist_are_refused() -> None:
    for bits in (0, 17, 31, 33):
        with pytest.raises(SettingError, match="bits is"):
            WeightGrid(bits)
        with pytest.raises(SettingError, match="bits is"):
            InputGrid(bits)


def test_fitted_ends_are_the_best_of_their_neighbours() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, values = torch.randn(400, generator=draw), torch.randn(4000, generator=draw).relu()
    scale = fitted_scale(WeightGrid(2), weight, weight)
    reach = fitted_reach(values, 2, signed=False)
    assert reach < values.max()

    def lost(scale: float) -> float:
        return float((WeightGrid(2, scale)(weight) - weight).square().sum())

    def clipped(reach: float) -> float:
        return float((InputGrid(2, reach)(values) - values).square().sum())

    assert lost(scale) < min(lost(0.9 * scale), lost(1.1 * scale))
    assert clipped(reach) < min(clipped(0.8 * reach), clipped(1.2 * reach))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 16])
def test_planes_give_every_code_back_from_its_bits_alone(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 11), generator=torch.Generator().manual_seed(bits))
    planes = pack_planes(codes, bits)
    assert planes.numel() == bits * 10  # 77 codes: ten bytes a plane
    assert torch.equal(unpack_planes(planes, 77).reshape(7, 11).long(), codes)
