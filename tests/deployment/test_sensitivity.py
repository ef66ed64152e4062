"""Harm of each layer in 8 bits, and the smallest number of them that must stay in 32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karui.data import Calibration
from karui.deployment import Int8, calibrate, layer_harms, leave_worst, quantise
from karui.errors import DataError
from karui.measuring import OnnxRuntime, onnx_form
from karui.model import Model


class Fragile(nn.Module):
    """Four linear layers, of which `c` reads one input so large that all others fall on one of 256 levels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.uneven = torch.ones(16)
        self.uneven[0] = 1e5
        self.c.weight.data[:, 0] *= 1e-5

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = self.c(x * self.uneven)
        return self.d(torch.relu(x))


@pytest.fixture(scope="module")
def fragile():
    batches = [(torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)),) for seed in range(3)]
    form = onnx_form(Model(Fragile(), example=(torch.zeros(1, 16),)))
    return calibrate(form, batches), batches


def change(calibrated, form, batches):
    """The definition of harm, in one pass and in memory."""
    want, got = (
        torch.cat([torch.from_numpy(OnnxRuntime().prepare(data, 1)(batch)[0]) for batch in batches]).double()
        for data in (calibrated.form.data, form.data)
    )
    return float(((want - got) ** 2).mean() / want.var(correction=0))


@pytest.mark.parametrize("alone", [True, False])
def test_the_fragile_layer_is_found(fragile, alone):
    harms = layer_harms(*fragile, alone=alone)
    assert harms[0].path == "c"
    assert harms[0].change > 5 * abs(harms[1].change)
    assert {harm.path for harm in harms} == {"a", "b", "c", "d"}
    assert [harm.change for harm in harms] == sorted((harm.change for harm in harms), reverse=True)


def test_harm_is_the_relative_change_of_the_outputs(fragile):
    calibrated, batches = fragile
    found = {harm.path: harm.change for harm in layer_harms(calibrated, batches)}
    for path in "abcd":
        assert found[path] == pytest.approx(change(calibrated, quantise(calibrated, only=path), batches), rel=1e-4)
    whole = change(calibrated, quantise(calibrated), batches)
    for harm in layer_harms(calibrated, batches, alone=False):
        rest = change(calibrated, quantise(calibrated, Int8(leave=(harm.path,))), batches)
        assert harm.change == pytest.approx(whole - rest, rel=1e-3, abs=1e-7)


def test_layers_that_are_left_anyway_are_not_measured(fragile):
    assert {harm.path for harm in layer_harms(*fragile, Int8(leave=("a", "c")))} == {"b", "d"}


def test_every_output_counts_and_a_constant_one_is_no_matter():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 1000)

        def forward(self, x):
            return self.left(x) * 1e-3, self.right(x), x[:, :1] * 0, x.argmax(1)

    torch.manual_seed(0)
    batches = [(torch.randn(64, 8),)]
    calibrated = calibrate(onnx_form(Model(Two(), example=(torch.zeros(1, 8),))), batches)
    harms = {harm.path: harm.change for harm in layer_harms(calibrated, batches)}
    assert harms["left"] == pytest.approx(harms["right"], rel=1.0)  # though a thousandth, and of fewer values
    assert 0 < harms["left"] < 0.01


def test_batches_of_a_data_set_are_read_anew(fragile, digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batches = Calibration(digits.train, samples=32, batch=16)
    calibrated = calibrate(onnx_form(Model(net, example=(torch.zeros(1, 1, 8, 8),))), batches)
    assert len(layer_harms(calibrated, batches)) == 1
    with pytest.raises(DataError, match="only once"):
        layer_harms(calibrated, iter(batches))
    with pytest.raises(DataError, match="no calibration batches"):
        layer_harms(calibrated, [])


@settings(max_examples=30, deadline=None)
@given(needed=st.integers(0, 4))
def test_the_smallest_number_of_layers_is_left(fragile, needed):
    calibrated, _ = fragile
    order = ["c", "a", "d", "b"]
    seen = []

    def acceptable(form):
        seen.append(set(form.fp32))
        return set(order[:needed]) <= set(form.fp32)

    spared = leave_worst(calibrated, order, acceptable)
    assert spared.tried[0] == (0, needed == 0)
    assert len(spared.tried) == len(set(spared.tried)) <= 4
    if needed == 4:  # that would be the model in 32 bits
        assert spared.form is None
        assert spared.left == ()
    else:
        assert spared.left == tuple(order[:needed])
        assert spared.form is not None
        assert set(spared.form.fp32) == set(order[:needed])
        assert spared.form.data == quantise(calibrated, Int8(leave=spared.left)).data


def test_few_trials_in_a_long_order():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)])
    calibrated = calibrate(onnx_form(Model(net, example=(torch.zeros(1, 4),))), [(torch.randn(8, 4),)])
    order = [str(number) for number in range(40)]
    spared = leave_worst(calibrated, order, lambda form: set(order[:11]) <= set(form.fp32))
    assert spared.left == tuple(order[:11])
    assert [count for count, _ in spared.tried] == [0, 1, 2, 4, 8, 16, 12, 10, 11]
