"""Statistics of activations, class by class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import DataError, UsageError
from karui.model import Model
from karui.train.statistics import class_moments

pytestmark = pytest.mark.paper(41)


@pytest.mark.parametrize("batch", [7, 64, 1000])
def test_streamed_statistics_are_those_of_each_class_at_once(small_cnn: Callable[..., Model], batch: int) -> None:
    model = small_cnn()
    model.module.train()
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 1, 8, 8, generator=draw), torch.arange(60) % 3
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    layers = ("conv3", "linear")
    blocks = class_moments(
        model.module, layers, TensorDataset(x, y), lambda seen: [seen[path] for path in layers], batch=batch
    )
    assert model.module.training
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    model.module.eval()
    kept: dict[str, torch.Tensor] = {}
    for path in layers:
        layer = model.module.get_submodule(path)
        layer.register_forward_hook(lambda _l, _i, out, path=path: kept.update({path: out.detach().flatten(1)}))
    model.module(x)
    for path, block in zip(layers, blocks, strict=True):
        assert [one.count for one in block] == [20, 20, 20]
        for number, one in enumerate(block):
            rows = kept[path][y == number].double()
            torch.testing.assert_close(one.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.covariance(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-5)


def test_what_has_no_statistics_is_told() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(DataError, match="not class numbers"):
        class_moments(net, ("",), TensorDataset(torch.zeros(4, 2), torch.zeros(4)), lambda seen: [seen[""]])
    gap = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 0, 3, 3]))
    with pytest.raises(DataError, match=r"no sample of class \[1, 2\]"):
        class_moments(net, ("",), gap, lambda seen: [seen[""]])
    with pytest.raises(UsageError, match="no layer 'nowhere'"):
        class_moments(net, ("nowhere",), gap, lambda seen: [seen["nowhere"]])
