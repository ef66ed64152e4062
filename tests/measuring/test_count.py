import pytest
import torch
from torch import nn
from torch.nn import functional

from karui.measuring import count
from karui.model import Model


def counted(net, *inputs):
    return count(Model(net, example=inputs))


@pytest.mark.parametrize(
    ("net", "shape", "macs"),
    [
        (nn.Linear(6, 5), (3, 6), 30),
        (nn.Linear(6, 5), (3, 7, 6), 7 * 30),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 5 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 7), 5 * 7 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), (2, 4, 7, 7), 3 * 3 * 4 * 9),
        (nn.Conv1d(3, 5, 4), (2, 3, 10), 7 * 5 * 3 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.LSTM(4, 6, 2, batch_first=True), (3, 5, 4), 5 * 24 * (4 + 6) + 5 * 24 * (6 + 6)),
        (nn.LSTM(4, 6, bidirectional=True, batch_first=True), (3, 5, 4), 2 * 5 * 24 * (4 + 6)),
        (nn.GRU(4, 6, batch_first=True), (3, 5, 4), 5 * 18 * (4 + 6)),
        (nn.RNN(4, 6, batch_first=True), (3, 5, 4), 5 * 6 * (4 + 6)),
        (nn.BatchNorm2d(3), (2, 3, 4, 4), 0),
        (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Identity()), (2, 3, 4, 4), 0),
    ],
)
def test_macs_of_one_sample_by_hand(net, shape, macs):
    assert counted(net, torch.randn(shape)).macs == macs


def test_attention_counts_its_products_and_every_projection():
    counts = counted(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8))
    by_path = {layer.path: layer.macs for layer in counts.layers}
    assert by_path["self_attn"] == 5 * 8 * 24 + 2 * 5 * 5 * 8
    assert by_path["self_attn.out_proj"] == 5 * 8 * 8
    assert by_path["linear1"] == by_path["linear2"] == 5 * 8 * 16
    assert by_path["norm1"] == 0


def test_bilinear_and_vector_products():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 5)
            self.direction = nn.Parameter(torch.randn(7))

        def forward(self, a, b, c):
            return self.bilinear(a, b), c.squeeze(0) @ self.direction

    counts = counted(Net(), torch.randn(1, 3), torch.randn(1, 4), torch.randn(1, 6, 7))
    assert {layer.path: layer.macs for layer in counts.layers} == {"bilinear": 60, "": 42}


class Functional(nn.Module):
    """Calls its layer's weight by a function, and a tied layer as a module."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "tied": nn.Linear(4, 4, bias=False)})
        self.body["tied"].weight = self.body["first"].weight

    def forward(self, x):
        return self.body["tied"](functional.linear(x, self.body["first"].weight))


def test_a_function_call_is_booked_to_the_owner_of_its_weight():
    counts = counted(Functional(), torch.randn(2, 4))
    assert {layer.path: layer.macs for layer in counts.layers} == {"body.first": 16, "body.tied": 16}


def test_a_shared_parameter_counts_once():
    counts = counted(Functional(), torch.randn(2, 4))
    assert counts.parameters == 16
    assert [layer.parameters for layer in counts.layers] == [16, 0]


def test_a_captured_graph_is_booked_to_its_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    example = torch.randn(2, 3, 8, 8)
    free = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    want = {layer.path: layer.macs for layer in counted(net, example).layers}
    assert {layer.path: layer.macs for layer in counted(free, example).layers} == want


def test_layers_add_up_and_know_their_output_and_zeros():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[0] = 0
    counts = counted(net, torch.randn(5, 1, 4, 4))
    assert counts.parameters == sum(layer.parameters for layer in counts.layers) == 20 + 27
    assert counts.macs == sum(layer.macs for layer in counts.layers)
    assert counts.nonzero == counts.parameters - 8
    assert [layer.output_shape for layer in counts.layers] == [(1, 2, 2, 2), (1, 3)]
    assert [layer.kind for layer in counts.layers] == ["Conv2d", "Linear"]


def test_counting_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    net[2].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    counted(net, torch.randn(5, 1, 4, 4))
    assert [part.training for part in net.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())


def test_json_holds_the_layers():
    saved = counted(nn.Linear(2, 3), torch.randn(1, 2)).to_json()
    assert saved["layers"][0] == {
        "path": "", "kind": "Linear", "parameters": 9, "nonzero": saved["nonzero"], "macs": 6, "output_shape": [1, 3],
    }  # fmt: skip
