import json
import time

import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.measuring import LayerTimes, OnnxRuntime, OpenVino, Torch, layer_times
from karui.model import Model


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


@pytest.fixture(scope="module")
def model():
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(16), nn.Flatten(), nn.Linear(16 * 256, 10))
    return Model(net, example=(torch.randn(1, 3, 16, 16),))


@pytest.mark.parametrize("engine", [Torch(), OnnxRuntime()])
def test_every_layer_with_weights_has_its_time_and_cost(engine, model):
    times = layer_times(model, engine=engine, batch=2, rounds=7)
    rows = {layer.path: layer for layer in times.layers}
    assert (times.engine, times.batch, times.threads) == (engine.name, 2, 1)
    for path in ("0", "2.conv", "4"):
        assert rows[path].seconds > 0
    assert rows["2.conv"].macs == 256 * 16 * 16 * 9
    assert rows["2.conv"].bytes == 4 * 16 * 16 * 9
    assert sum(layer.parameters for layer in times.layers) == model.parameters
    order = [path for path, _ in model.module.named_modules()]
    assert [order.index(layer.path) for layer in times.layers] == sorted(order.index(p) for p in rows)


def test_the_heavy_convolution_stands_out_in_the_engine():
    light, heavy = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    net = nn.Sequential(light, nn.ReLU(), heavy, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 256, 2))
    times = layer_times(Model(net, example=(torch.randn(1, 1, 16, 16),)), engine=OnnxRuntime(), rounds=7)
    rows = {layer.path: layer.seconds for layer in times.layers}
    assert max(rows, key=rows.get) == "2"


class Melted(nn.Module):
    """What the engine renames: a linear layer with its ReLU, a scaled product of matrices, and an activation."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.act = nn.Linear(256, 2048), nn.Linear(2048, 64), nn.SiLU()
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        x = torch.softmax(x @ x.mT / 8.0, -1) @ x
        return self.out(self.act(x))


def test_a_linear_layer_that_the_engine_melts_its_activation_into_has_its_time():
    times = layer_times(Model(Melted(), example=(torch.randn(2, 256),)), engine=OnnxRuntime(), batch=2, rounds=7)
    rows = {layer.path: layer.seconds for layer in times.layers}
    assert max(rows, key=rows.get) == "wide"
    assert min(rows[path] for path in ("narrow", "act", "out")) > 0
    assert times.rest == 0, "all that is run here belongs to somebody"


def test_a_container_does_not_count_the_time_of_its_parts():
    class Sleep(nn.Module):
        def forward(self, x):
            time.sleep(0.003)
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Sleep()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.inner(x) + self.weight

    rows = {
        layer.path: layer.seconds for layer in layer_times(Model(Outer(), example=(torch.zeros(1),)), rounds=5).layers
    }
    assert rows["inner"] >= 0.003
    assert rows[""] < 0.003


def test_the_model_is_left_as_it_was(model):
    model.module.train()
    before = torch.get_num_threads()
    layer_times(model, threads=2, rounds=3)
    assert torch.get_num_threads() == before
    assert model.module.training
    assert all(not part._forward_hooks for part in model.module.modules())


def test_json_round_trip(model):
    times = layer_times(model, rounds=3)
    assert LayerTimes.from_json(json.loads(json.dumps(times.to_json()))) == times


def test_an_engine_that_does_not_tell(model):
    with pytest.raises(UsageError, match="openvino does not tell"):
        layer_times(model, engine=OpenVino())
