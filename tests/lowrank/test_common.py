"""Which layers can be replaced: the reasons are right, and looking leaves no trace."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from karui.errors import SettingError
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._scan import scan
from karui.model import Model


def anything(layer: object) -> str:
    del layer
    return ""


class Odd(nn.Module):
    """One of each layer that must not be replaced, and two that may."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.flat = nn.Linear(8 * 16 * 16, 12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.encoder = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.tied = nn.Linear(12, 12, bias=False)
        self.words = nn.Embedding(12, 12)
        self.words.weight = self.tied.weight
        self.unused = nn.Linear(12, 12)
        self.direct = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.normed(self.up(torch.relu(self.good(x)))))
        x = torch.relu(self.flat(x.flatten(1)))
        x = self.tied(x) + self.words(x.argmax(1))
        y = self.attention(x, x, x)[0]
        y = self.encoder(y[None])[0]
        return self.head(nn.functional.linear(y, self.direct.weight))


@pytest.fixture
def odd() -> Model:
    torch.manual_seed(0)
    return Model(Odd(), example=(torch.rand(2, 3, 8, 8),))


def test_each_layer_is_offered_or_refused_with_its_reason(odd: Model) -> None:
    seen, left = scan(odd, anything)
    assert [one.path for one in seen] == ["good", "flat", "head"]
    reasons = {choice.path: choice.reason for choice in left}
    assert "ConvTranspose2d is neither" in reasons["up"]
    assert "parametris" in reasons["normed"]
    assert "MultiheadAttention" in reasons["attention"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert "fast path" in reasons["encoder.linear1"]
    assert "shared with words.weight" in reasons["tied"]
    assert "neither" in reasons["words"]
    assert "does not call" in reasons["unused"]
    assert "does not call" in reasons["direct"]
    assert all(choice.path in choice.describe() for choice in left)


def test_places_and_feature_maps_are_seen(odd: Model) -> None:
    good, flat, head = scan(odd, anything)[0]
    assert (good.inputs, good.outputs, good.map) == (64, 64, ())
    assert (flat.inputs, flat.outputs, flat.map) == (1, 1, (8, 16, 16))
    assert (head.outputs, head.map) == (1, ())


def test_looking_leaves_modes_and_hooks_as_they_were(odd: Model) -> None:
    odd.module.train()
    odd.module.get_submodule("encoder").eval()
    modes = [layer.training for layer in odd.module.modules()]
    scan(odd, anything)
    assert [layer.training for layer in odd.module.modules()] == modes
    assert not any(layer._forward_hooks for layer in odd.module.modules())


def test_a_layer_called_with_different_inputs_has_no_one_map() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x.flatten(1)))

    (one,) = scan(Model(Twice(), example=(torch.rand(2, 4, 2, 2),)), anything)[0]
    assert one.calls == 2
    assert one.map == ()


def test_of_layers_as_wide_as_an_output_the_last_ones_give_it() -> None:
    def final(net: nn.Module, *shape: int) -> list[str]:
        return [one.path for one in scan(Model(net, example=(torch.rand(2, *shape),)), anything)[0] if one.final]

    assert final(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), 8) == ["2"]
    # As wide as the map of class scores is long, but not its channels.
    maps = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 1))
    assert "0" not in final(maps, 1, 16, 16)
    assert "2" in final(maps, 1, 16, 16)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.one(x), self.two(x)

    assert final(Heads(), 8) == ["one", "two"]


def test_old_weight_norm_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form is what is tested
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    _, left = scan(Model(nn.Sequential(layer), example=(torch.rand(1, 4),)), anything)
    assert "hook" in left[0].reason


def test_skip_names_layers_that_exist(odd: Model) -> None:
    seen, left = scan(odd, anything, skip=("good",))
    assert [one.path for one in seen] == ["flat", "head"]
    assert Choice("good", reason="named in skip") in left
    with pytest.raises(SettingError, match="godo"):
        scan(odd, anything, skip=("godo",))


def test_what_would_not_save_is_left() -> None:
    keep = Choice("a", ranks=(2,), full=(4,), parameters=(10, 9), macs=(10, 9))
    assert unless_larger(keep) is keep
    assert "parameters" in unless_larger(Choice("a", ranks=(2,), parameters=(10, 10), macs=(10, 9))).reason
    assert "multiply-adds" in unless_larger(Choice("a", ranks=(2,), parameters=(10, 9), macs=(10, 11))).reason
