"""What follows a layer is told only where nothing else uses its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.model import Model
from karui.model.following import followings


class Ways(nn.Module):
    """A layer for each way in which a network may go on."""

    def __init__(self) -> None:
        super().__init__()
        names = (
            "plain", "normed", "pooled", "average", "residual", "before", "inplace", "shared", "leaky", "twice",
            "other", "grouped", "given",
        )  # fmt: skip
        for name in names:
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4)
        self.groups = nn.GroupNorm(2, 4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            for layer in (self.norm, self.second):
                for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    assert value is not None
                    value.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.plain(x))
        x = self.act(self.norm(self.normed(x)))
        x = torch.relu(functional.max_pool2d(self.drop(self.pooled(x)), 3, 1, 1))
        x = functional.relu(functional.avg_pool2d(self.average(x), 3, 1, 1))
        x = functional.relu(x + self.second(self.residual(x)))
        y = self.before(x)
        x = y + functional.relu(y)
        x = self.inplace(x).relu_()
        z = self.shared(x)
        x = z.relu() + z.sigmoid()
        x = functional.leaky_relu(self.leaky(x))
        x = functional.relu(self.twice(functional.elu(self.twice(x))))
        x = self.act(self.other(x))
        x = functional.relu(self.groups(self.grouped(x)))
        last = self.given(x)
        return functional.relu(last), last


def test_each_way_is_told_for_what_it_is() -> None:
    torch.manual_seed(0)
    net = Ways()
    paths = [name for name, layer in net.named_children() if isinstance(layer, nn.Conv2d)]
    model = Model(net, example=(torch.randn(2, 4, 6, 6),))
    told = followings(model, paths)
    relu = {path for path, one in told.items() if one.relu}
    assert relu == {"plain", "normed", "pooled", "inplace", "other"}
    assert {path for path, one in told.items() if one.scale is not None} == {"normed", "residual"}
    assert told["residual"].describe() == "batch normalisation"
    assert told["shared"].describe() == "no ReLU of its own"
    rows = torch.randn(9, 4)
    with torch.no_grad():
        net.eval()
        torch.testing.assert_close(told["normed"].normalised(rows), net.norm(rows[..., None, None])[..., 0, 0])
    assert told["plain"].normalised(rows) is rows


def test_looking_leaves_no_trace_and_training_mode_stays() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (told,) = followings(Model(net, example=(torch.randn(2, 2, 8),)), ["0"]).values()
    assert told.describe() == "batch normalisation and ReLU"
    assert net.training
    assert not net[0]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_linear_layers_are_followed_behind_the_batch_only() -> None:
    flat = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    (told,) = followings(Model(flat, example=(torch.randn(3, 4),)), ["0"]).values()
    assert told.describe() == "batch normalisation and ReLU"
    # Batch normalisation of a sequence normalises its steps, not the layer's outputs.
    steps = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    (told,) = followings(Model(steps, example=(torch.randn(3, 5, 4),)), ["0"]).values()
    assert told.describe() == "no ReLU of its own"
