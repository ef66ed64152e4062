"""Guides: a frozen teacher that shows its inner layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.model import Model
from karui.train.guide import Guide


def network() -> Model:
    """Batch normalisation and dropout, in training mode and wanting gradients, as a teacher may be given."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    return Model(net.train(), example=(torch.zeros(2, 5),))


@pytest.mark.parametrize("ask", [Guide.__call__, Guide.told])
def test_it_is_frozen_in_evaluation_mode_and_its_statistics_rest(ask: object) -> None:
    model, x = network(), torch.randn(8, 5) * 3 + 1
    given, guide = copy.deepcopy(model.module.state_dict()), Guide(model, ("1", "4"))
    before = copy.deepcopy(guide.module.state_dict())
    outputs, shown = ask(guide, (x,))  # pyright: ignore[reportCallIssue]
    again, _ = ask(guide, (x,))  # pyright: ignore[reportCallIssue]
    assert torch.equal(outputs, again), "no dropout"
    assert torch.equal(outputs, shown["4"])
    normal = guide.module[0](x) / (1 + 1e-5) ** 0.5  # the running statistics of an untrained layer
    torch.testing.assert_close(shown["1"], normal)
    assert not outputs.requires_grad
    assert not any(part.training for part in guide.module.modules())
    assert not any(p.requires_grad for p in guide.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in guide.module.state_dict().items())
    assert not any(part._forward_hooks for part in guide.module.modules()), "nothing listens between two batches"
    assert guide.module is not model.module
    assert all(part.training for part in model.module.modules()), "the given network is left as it was"
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    assert all(torch.equal(value, given[name]) for name, value in model.module.state_dict().items())


def test_a_layer_that_is_not_there_is_told_before_any_training() -> None:
    with pytest.raises(UsageError, match="no layer '9'"):
        Guide(network(), ("9",))
