import gc
import subprocess
import sys
import weakref

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from karui.errors import CaptureError, KaruiError
from karui.measuring import onnx_form
from karui.measuring.onnx import OnnxForm
from karui.model import Model


class Block(nn.Module):
    """A residual block, whose normalisation an exporter folds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def residual():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def run(form, *arrays):
    session = onnxruntime.InferenceSession(form.data, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]
    return session.run(None, dict(zip(names, [a.numpy() for a in arrays], strict=True)))


@pytest.fixture(scope="module")
def form() -> OnnxForm:
    return onnx_form(Model(residual(), example=(torch.zeros(1, 2, 6, 6),)))


def test_any_batch_runs_from_an_example_of_one(form):
    net = residual().eval()
    for size in (1, 2, 5, 64):
        x = torch.randn(size, 2, 6, 6)
        assert torch.allclose(torch.from_numpy(run(form, x)[0]), net(x).detach(), atol=1e-5)


def test_the_file_carries_its_weights_and_nothing_of_this_machine(form):
    proto = onnx.load_model_from_string(form.data)
    assert all(t.raw_data and t.data_location == onnx.TensorProto.DEFAULT for t in proto.graph.initializer)
    assert len(form.data) > 4 * sum(p.numel() for p in residual().parameters())
    assert b".py" not in form.data
    assert not any(node.metadata_props for node in proto.graph.node)


def test_every_operator_knows_its_layer(form):
    proto = onnx.load_model_from_string(form.data)
    found = {node.op_type: form.layers[node.name] for node in proto.graph.node}
    assert found["Conv"] == "0.conv"
    assert found["Gemm"] == "3"
    assert found["Add"] == "0"


def test_an_export_is_kept_until_a_weight_changes():
    model = Model(nn.Linear(3, 2), example=(torch.zeros(1, 3),))
    first = onnx_form(model)
    assert onnx_form(model) is first
    with torch.no_grad():
        model.module.weight.add_(1)
    second = onnx_form(model)
    assert second.data != first.data
    model.module.weight = nn.Parameter(torch.ones(2, 3))
    third = onnx_form(model)
    assert third.data != second.data
    model.module.weight.data.mul_(2)  # torch counts no such change
    assert onnx_form(model).data != third.data


def test_an_export_is_made_anew_when_a_layer_changes():
    model = Model(nn.Sequential(nn.Linear(3, 2), nn.LeakyReLU(0.1)), example=(torch.zeros(1, 3),))
    first = onnx_form(model)
    model.module[1].negative_slope = 0.5
    assert onnx_form(model).data != first.data


def test_several_nested_inputs_and_outputs():
    class Net(nn.Module):
        def forward(self, named, scale, flag):
            a, b = named["a"], named["pair"][1]
            return {"sum": (a + b) * scale, "all": [a.mean(1), b if flag else a]}

    a, b = torch.randn(4, 3), torch.randn(4, 3)
    model = Model(Net(), example=({"a": torch.zeros(1, 3), "pair": (torch.zeros(1, 3), torch.zeros(1, 3))}, 2.0, True))
    got = run(onnx_form(model), a, b) if len(inputs_of(onnx_form(model))) == 2 else run(onnx_form(model), a, a, b)
    assert torch.allclose(torch.from_numpy(got[0]), (a + b) * 2)
    assert torch.equal(torch.from_numpy(got[2]), b)


class Star(nn.Module):
    """Takes any number of inputs, as the graph form of a cut model does."""

    def forward(self, *inputs):
        return inputs[0] * 2 + inputs[1]


def test_any_number_of_inputs():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    form = onnx_form(Model(Star(), example=(torch.zeros(1, 3), torch.zeros(1, 3))))
    assert torch.allclose(torch.from_numpy(run(form, a, b)[0]), a * 2 + b)


def inputs_of(form):
    return onnx.load_model_from_string(form.data).graph.input


@pytest.mark.parametrize(
    ("net", "example"),
    [
        (nn.LSTM(3, 4, batch_first=True), torch.randn(1, 5, 3)),
        (
            nn.Sequential(nn.Embedding(9, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
            torch.arange(6)[None],
        ),
    ],
)
def test_recurrent_and_attention_layers(net, example):
    form = onnx_form(Model(net, example=(example,)))
    x = torch.cat([example, example.flip(1), example])
    with torch.no_grad():
        want = net.eval()(x)
    want = want[0] if isinstance(want, tuple) else want
    assert torch.allclose(torch.from_numpy(run(form, x)[0]), want, atol=1e-5)


def test_a_captured_graph_can_be_exported():
    net = residual().eval()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(net, (torch.zeros(2, 2, 6, 6),), dynamic_shapes=batch).module()
    form = onnx_form(Model(graph, example=(torch.zeros(1, 2, 6, 6),)))
    x = torch.randn(3, 2, 6, 6)
    assert torch.allclose(torch.from_numpy(run(form, x)[0]), net(x).detach(), atol=1e-5)


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3) * 1


class ByValue(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("this network\nis broken")


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Bessel(), "operator 'prims.bessel_j0' has no ONNX form. Replace the layer"),
        (FixedBatch(), r"fixes the batch size.*Use x.shape\[0\]"),
        (ByValue(), "decides by the values of a tensor.*torch.where"),
        (Broken(), "ValueError: this network"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(net, words, capfd):
    with pytest.raises(CaptureError, match=words) as told:
        onnx_form(Model(net, example=(torch.randn(1, 3),)))
    assert "\n" not in str(told.value)
    assert capfd.readouterr() == ("", "")
    assert isinstance(told.value, KaruiError)


@pytest.mark.slow
def test_two_processes_write_the_same_bytes():
    script = """
import hashlib, torch
from torch import nn
from karui.measuring import onnx_form
from karui.model import Model
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
print(hashlib.sha256(onnx_form(Model(net, example=(torch.zeros(1, 1, 4, 4),))).data).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=None)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.split()) == 1
    assert runs[0].stderr == ""


def test_an_export_leaves_no_weights_behind():
    """The optimiser's rules live as long as the process; the last graph that they saw must not keep its weights."""
    net = residual()
    weights = [weakref.ref(parameter) for parameter in net.parameters()]
    onnx_form(Model(net, example=(torch.zeros(1, 2, 6, 6),)))
    del net
    gc.collect()
    assert [weight.shape for ref in weights if (weight := ref()) is not None] == []
