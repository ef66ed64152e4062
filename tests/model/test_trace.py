from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import CaptureError
from karui.model import Model, coupled_groups, remove_units


class Masked(nn.Module):
    """An encoder that saves the work of a mask of ones, unless it is exported, as those of transformers do."""

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("positions", torch.arange(32).reshape(1, 32), persistent=False)
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.words(tokens) + self.places(self.positions[:, : tokens.shape[1]]))
        x = x + self.down(torch.relu(self.up(x)))
        exporting = torch.compiler.is_exporting() and not self.always
        if exporting or not mask.all():
            x = x * mask[..., None]
        return {"hidden": x, "logits": self.head(x[:, 0])}


def model(mask: Tensor, **settings: bool) -> Model:
    torch.manual_seed(0)
    return Model(Masked(**settings).eval(), example=(torch.randint(0, 50, (2, 9)), mask))


@pytest.mark.parametrize("ones", [True, False])
def test_a_look_at_the_mask_that_the_exporter_skips_hinders_no_cut(ones: bool) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[:, 6:] = int(ones)
    dense = model(mask)
    light = remove_units(dense, {"up": torch.arange(8)})
    assert light.module.up.out_features == 16
    assert not torch.compiler.is_exporting()
    assert set(light.module(*dense.example)) == {"hidden", "logits"}


def test_a_path_that_depends_on_the_data_even_when_exported_is_refused() -> None:
    with pytest.raises(CaptureError, match="takes a number out of a tensor that depends on its input"):
        coupled_groups(model(torch.ones(2, 9, dtype=torch.long), always=True))


def test_positions_beyond_the_example_are_no_units() -> None:
    found = coupled_groups(model(torch.ones(2, 9, dtype=torch.long)))
    assert [group.name for group in found] == ["up"]


class MaskedHeads(nn.Module):
    """Two heads of frozen number, whose training reads the mode: it needs its graph form where a head's width goes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.query, self.key, self.value = (nn.Linear(16, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.words(tokens)
        q, k, v = (layer(x).view(*tokens.shape, 2, 4).transpose(1, 2) for layer in (self.query, self.key, self.value))
        bias = None
        if torch.compiler.is_exporting() or not mask.all():
            bias = mask.bool()[:, None, None, :]
        x = nn.functional.scaled_dot_product_attention(q, k, v, bias, 0.1 if self.training else 0.0)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


def test_a_look_at_the_mask_hinders_no_graph_form() -> None:
    torch.manual_seed(0)
    example = (torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    dense = Model(MaskedHeads().eval(), example=example)
    light = remove_units(dense, {"value": torch.tensor([1])})
    assert light.parameters < dense.parameters
    assert light.module(*example).shape == (2, 3)


def test_control_flow_on_data_cannot_be_captured() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(CaptureError, match="takes a number out of a tensor"):
        coupled_groups(Model(Branching(), example=(torch.randn(1, 4),)))


def test_an_example_that_does_not_fit_is_said_plainly() -> None:
    with pytest.raises(CaptureError, match="does not run on its example"):
        coupled_groups(Model(nn.Linear(4, 2), example=(torch.randn(1, 3),)))


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, self.training)


def test_capture_leaves_the_model_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Dropping())
    net.train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    coupled_groups(Model(net, example=(torch.randn(1, 3, 6, 6),)))
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
