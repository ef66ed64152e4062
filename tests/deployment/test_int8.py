"""Quantisation of every kind of network: close, small, really in integers, and kind about bad input."""

import gc
import tempfile
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from karui.data import calibration_batches
from karui.deployment import Int8, calibrate, quantise, to_int8
from karui.deployment.layers import STORED, WEIGHTED
from karui.errors import DataError, SettingError, UsageError
from karui.measuring import OnnxForm, evaluate, onnx_form
from karui.model import Model
from karui.train import Training, fit


def run(data, inputs):
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    return session.run(None, dict(zip(names, [t.numpy() for t in inputs], strict=True)))


def relative_error(want, got):
    return float(np.sqrt(((want - got) ** 2).mean() / (want**2).mean()))


def weight_of(proto, node):
    """The constant that an operator multiplies by, through the operator that widens it; and its type."""
    made = {output: other for other in proto.graph.node for output in other.output}
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = []
    inputs = node.input if node.op_type not in STORED else [node.input[place] for place in STORED[node.op_type]]
    for name in inputs:
        source = made[name].input[0] if name in made and made[name].op_type == "DequantizeLinear" else name
        if source in held and len(held[source].dims) > 1:
            found.append(held[source])
    return found


@pytest.fixture(scope="module", params=["plain", "resnet", "mobilenet", "mlp", "lstm", "transformer", "two ways"])
def case(request, network):
    net, draw = network(request.param)
    form = onnx_form(Model(net, example=draw(1)))
    return form, to_int8(form, (draw(32, seed) for seed in range(4))), draw


@pytest.mark.parametrize("size", [1, 3, 32])
def test_outputs_are_close_at_any_batch(case, size):
    form, light, draw = case
    for want, got in zip(run(form.data, draw(size, 7)), run(light.data, draw(size, 7)), strict=True):
        assert want.shape == got.shape
        assert relative_error(want, got) < 0.06


def test_weights_are_integers_in_the_file_and_its_bytes_fall_accordingly(case):
    form, light, _ = case
    proto, before = onnx.load_model_from_string(light.data), onnx.load_model_from_string(form.data)
    checked = []
    for node in proto.graph.node:
        if node.op_type in WEIGHTED or node.op_type in STORED:
            weights = weight_of(proto, node)
            assert all(w.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) for w in weights), node.name
            checked += weights
    # Shortcuts that became convolutions have weights that the form in 32 bits had not.
    saved = sum(3 * int(np.prod(size)) for size in {w.name: w.dims for w in checked if "pad" not in w.name}.values())
    assert saved > 2 * sum(len(t.raw_data) for t in before.graph.initializer) / 3
    held, holds = (sum(len(t.raw_data) for t in p.graph.initializer) for p in (before, proto))
    scales = sum(4 * int(np.prod(t.dims)) for t in proto.graph.initializer if "scale" in t.name)
    assert held - holds > saved - 3 * scales - 200


def test_every_layer_is_named_once(case):
    form, light, _ = case
    named = [*light.quantised, *light.stored, *light.fp32]
    assert len(named) == len(set(named))
    assert {path for path in form.layers.values() if path in named} == set(named)
    assert not any(why.startswith(("it was", "ONNX Runtime could")) for why in light.fp32.values())


def test_added_operators_know_their_layers(case):
    _, light, _ = case
    proto = onnx.load_model_from_string(light.data)
    assert set(light.form.layers) == {node.name for node in proto.graph.node}
    assert {light.form.layers[n.name] for n in proto.graph.node if n.op_type == "DequantizeLinear"} >= {
        *light.quantised[1:],
        *light.stored,
    }


def test_what_cannot_be_quantised_is_named(network):
    net, draw = network("transformer")
    light = to_int8(onnx_form(Model(net, example=draw(1))), [draw(8)])
    assert "ONNX Runtime has no LayerNormalization in 8 bits" in light.fp32.values()
    net, draw = network("lstm")
    light = to_int8(onnx_form(Model(net, example=draw(1))), [draw(8)])
    assert light.stored == ("lstm",)
    assert light.quantised == ("embed", "head")


def pictures(count, seed=0):
    return (torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),)


@pytest.fixture(scope="module")
def plain(network):
    net, draw = network("plain")
    return calibrate(onnx_form(Model(net, example=draw(1))), [draw(32)])


def types(light):
    proto = onnx.load_model_from_string(light.data)
    return {node.name: [w.data_type for w in weight_of(proto, node)][:1] for node in proto.graph.node if node.op_type
            in WEIGHTED}  # fmt: skip


def test_layers_that_are_left_stay_in_32_bits(plain):
    light = quantise(plain, Int8(leave=("conv1",)))
    kinds = {plain.form.layers[name]: kind for name, (kind,) in types(light).items()}
    assert kinds == {"conv1": onnx.TensorProto.FLOAT, "conv2": onnx.TensorProto.INT8, "head": onnx.TensorProto.INT8}
    assert light.fp32 == {"conv1": "it was left out"}
    assert light.quantised == ("conv2", "head")


def test_one_layer_alone(plain):
    light = quantise(plain, only=("conv2",))
    kinds = {plain.form.layers[name]: kind for name, (kind,) in types(light).items()}
    assert kinds == {"conv1": onnx.TensorProto.FLOAT, "conv2": onnx.TensorProto.INT8, "head": onnx.TensorProto.FLOAT}
    assert light.quantised == ("conv2",)


def test_with_all_layers_left_the_form_is_what_it_was(plain):
    light = quantise(plain, Int8(leave=("conv1", "conv2", "head")))
    x = pictures(5, 3)
    assert np.array_equal(run(light.data, x)[0], run(plain.form.data, x)[0])
    assert light.quantised == ()


def test_a_path_stands_for_what_lies_below_it(network):
    net, draw = network("resnet")
    light = to_int8(onnx_form(Model(net, example=draw(1))), [draw(8)], Int8(leave=("layer1", "linear")))
    assert set(light.fp32) == {"layer1.0.conv1", "layer1.0.conv2", "linear"}


def test_settings_reach_the_file(plain):
    def seen(settings):
        proto = onnx.load_model_from_string(quantise(plain, settings).data)
        weights = [w for n in proto.graph.node if n.op_type in WEIGHTED for w in weight_of(proto, n)]
        narrow = {t.name: t for t in proto.graph.initializer}
        zeros = {narrow[n.input[2]].data_type for n in proto.graph.node if n.op_type == "QuantizeLinear"}
        scales = [narrow[n.input[1]].dims for n in proto.graph.node if n.op_type == "DequantizeLinear"]
        return max(np.abs(numpy_helper.to_array(w)).max() for w in weights), zeros, [16] in scales

    assert seen(Int8()) == (64, {onnx.TensorProto.UINT8}, True)
    assert seen(Int8(weight_bits=8, unsigned=False, per_channel=False)) == (127, {onnx.TensorProto.INT8}, False)


def test_the_error_of_a_linear_layer_is_that_of_rounding():
    torch.manual_seed(1)
    net = nn.Linear(20, 8)
    x = (torch.randn(64, 20),)
    light = to_int8(onnx_form(Model(net, example=(torch.zeros(1, 20),))), [x])
    span = max(x[0].max().item(), 0) - min(x[0].min().item(), 0)
    with torch.no_grad():
        y = net(*x)
        span_y = max(y.max().item(), 0) - min(y.min().item(), 0)
        weight_step = net.weight.abs().amax(1) / 63
        allowed = span / 510 * net.weight.abs().sum(1) + weight_step * x[0].abs().sum(1, keepdim=True) / 2
        allowed = allowed + 20 * span / 510 * weight_step / 2 + span_y / 510 + span / 255 * weight_step
    error = (torch.from_numpy(run(light.data, x)[0]) - y).abs()
    assert bool((error <= allowed).all())
    assert error.max() > span_y / 2000  # it is quantised at all


def test_the_order_of_calibration_batches_does_not_matter(plain):
    batches = [pictures(16, seed) for seed in range(3)]
    first, second = (calibrate(plain.form, part) for part in (batches, batches[::-1]))
    assert first.samples == second.samples == 48
    assert quantise(first).data == quantise(second).data == quantise(first).data
    assert quantise(first).data != quantise(calibrate(plain.form, batches[:1])).data


def test_calibration_is_streamed(plain):
    alive, most = weakref.WeakSet(), 0

    def batches():
        nonlocal most
        for seed in range(6):
            batch = pictures(4, seed)
            alive.add(batch[0])
            gc.collect()
            most = max(most, len(alive))
            yield batch
            del batch

    calibrate(plain.form, batches())
    assert most <= 2


def test_nothing_is_left_on_disk(plain, tmp_path, monkeypatch):
    scratch, here = tmp_path / "scratch", tmp_path / "here"
    scratch.mkdir()
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(here)
    to_int8(plain.form, [pictures(4)])
    assert list(Path(tmp_path).rglob("*")) == [scratch, here] or not [*scratch.iterdir(), *here.iterdir()]


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no calibration batches"),
        ([(torch.zeros(2, 5, 16, 16),)], r"does not run on calibration inputs \[2, 5, 16, 16\]"),
        ([(torch.full((2, 3, 16, 16), torch.nan),)], "not finite"),
        ([(torch.zeros(2, 3, 16, 16), torch.zeros(2))], "has 2 inputs, and the model 1"),
    ],
)
def test_calibration_data_that_do_not_fit(plain, batches, words):
    with pytest.raises(DataError, match=words) as told:
        calibrate(plain.form, batches)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_a_damaged_form_is_told(plain, length):
    with pytest.raises(UsageError, match="no whole ONNX file"):
        to_int8(OnnxForm(data=plain.form.data[:length], layers={}), [pictures(2)])


def test_wrong_settings_are_told(plain):
    with pytest.raises(SettingError, match="weight_bits is 4; give 7, or 8"):
        Int8(weight_bits=4)
    with pytest.raises(SettingError, match="Layer 'conv3' is not known.*conv1"):
        quantise(plain, Int8(leave=("conv3",)))


def test_accuracy_on_digits_stays_within_a_point(small_cnn, digits):
    dense = fit(small_cnn(), digits.train, training=Training(epochs=6))
    form = onnx_form(dense)
    light = to_int8(form, calibration_batches(digits.train))
    assert light.quantised == ("conv1", "conv2", "conv3", "linear")
    x, y = (torch.stack([torch.as_tensor(pair[part]) for pair in digits.test]) for part in (0, 1))
    right = {name: int((run(data, (x,))[0].argmax(1) == y.numpy()).sum()) for name, data in
             (("fp32", form.data), ("int8", light.data))}  # fmt: skip
    assert right["fp32"] / len(y) == pytest.approx(evaluate(dense, digits.test).value, abs=0.002)
    assert right["fp32"] > 0.9 * len(y)
    assert right["int8"] >= right["fp32"] - 0.01 * len(y)
    assert len(light.data) < 0.45 * len(form.data)
