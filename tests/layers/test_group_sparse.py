"""Group-sparse layers: equal to the masked dense layer, smaller, saved, exported (survey 26)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.artifact import load, save
from karui.errors import SettingError
from karui.layers.group_sparse import GroupSparseConv, GroupSparseLinear, group_sparse_layer
from karui.measuring import count
from karui.model import Model, build_layer, describe_layer, replace_layers

pytestmark = pytest.mark.paper(26)

LAYERS = [
    (nn.Linear(20, 7), (20,)),
    (nn.Conv1d(6, 8, 5, stride=2, padding=2, bias=False), (6, 17)),
    (nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (6, 11, 13)),
    (nn.Conv2d(8, 12, 3, groups=2, padding="same"), (8, 7, 7)),
    (nn.Conv2d(6, 8, 4, padding=2, padding_mode="reflect"), (6, 9, 9)),
    (nn.Conv2d(6, 8, 1), (6, 9, 9)),
    (nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1)), (4, 3, 5, 6)),
]
NAMES = ["linear", "conv1d", "strided, dilated", "grouped", "even, reflect", "pointwise", "conv3d"]


def pattern(layer: Any, share: float = 0.3) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(getattr(layer, "groups", 1), layer.weight[0].numel()) < share


def masked(layer: Any, alive: Tensor) -> Any:
    mask = alive.repeat_interleave(len(layer.weight) // len(alive), 0).reshape(layer.weight.shape)
    with torch.no_grad():
        layer.weight.mul_(mask)
    return layer


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_it_computes_what_the_masked_layer_does_and_holds_only_what_is_left(layer: Any, shape: Any) -> None:
    alive = pattern(layer)
    dense, new = masked(layer, alive), group_sparse_layer(layer, alive)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(new(x), dense(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new.dense()(x), dense(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # where the kernel serves
        torch.testing.assert_close(new(x), dense(x), rtol=1e-5, atol=1e-5)
    each = len(layer.weight) // len(alive)
    assert new.weight.numel() == each * int(alive.sum())
    sizes = [count(Model(one, example=(x[:1],))).macs for one in (layer, new)]
    assert sizes[1] * alive.numel() == sizes[0] * int(alive.sum())


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_it_is_rebuilt_saved_in_its_small_form_and_exported(layer: Any, shape: Any, tmp_path: Path) -> None:
    model = Model(layer.eval(), example=(torch.randn(2, *shape),))
    light = replace_layers(model, {"": group_sparse_layer(layer, pattern(layer))})
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=layer)
    state = light.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.module.state_dict().items())
    rebuilt = build_layer(*describe_layer(light.module)).state_dict()
    assert {name: value.shape for name, value in rebuilt.items()} == {
        name: value.shape for name, value in state.items()
    }


def test_a_group_without_columns_gives_its_bias_and_settings_are_checked() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2)
    alive = torch.zeros(2, 18, dtype=torch.bool)
    alive[1, 3] = True
    new = group_sparse_layer(conv, alive)
    made = new(torch.randn(1, 4, 3, 3))
    torch.testing.assert_close(made[0, :3, 0, 0], conv.bias[:3])  # pyright: ignore
    with pytest.raises(SettingError, match="live is"):
        GroupSparseConv(4, 6, (3, 1), live=[[1, 5, 0]])
    with pytest.raises(SettingError, match="live is"):
        GroupSparseLinear(4, 6, live=5)


def test_it_learns_and_is_compiled_into_one_program() -> None:
    torch.manual_seed(0)
    layer = group_sparse_layer(nn.Conv2d(4, 6, 3, padding=1), torch.rand(1, 36) < 0.4)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert x.grad is not None
    program = torch.export.export(nn.Sequential(layer.eval()), (x.detach(),))
    assert "patch_rows" not in str(program.graph)
    torch.testing.assert_close(program.module()(x.detach()), layer(x.detach()))
