"""Where the channels of layers' outputs are, and what non-linearity they end with: [33] and [34] on any network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.distill._endings import MADE, ending
from karui.distill._layouts import Layout, layout_at, layouts_of
from karui.distill.hint import output_of
from karui.errors import SettingError, UsageError
from karui.model import Model

pytestmark = [pytest.mark.paper(33), pytest.mark.paper(34)]


class Steps(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.act = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.act(self, x)


def layouts(module: nn.Module, x: Tensor) -> dict[str, Layout]:
    return layouts_of(Model(module, example=(x,)))


def test_convolutions_have_channels_first_and_so_have_blocks_of_them() -> None:
    def dense(net: Any, x: Tensor) -> Tensor:
        return torch.cat([x, functional.relu(net.norm(net.conv(x)))], 1)

    block = Steps(dense, conv=nn.Conv2d(8, 6, 3, padding=1), norm=nn.BatchNorm2d(6))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), block, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    found = layouts(net, torch.zeros(2, 3, 8, 8))
    assert [found[path].shape for path in "0123"] == [(8, 8, 8), (8, 8, 8), (14, 8, 8), (14, 64)]
    assert {found[path].channels for path in ("0", "1", "2", "2.norm", "5")} == {"first"}
    assert not found["4"].has_map


def test_linear_layers_embeddings_and_transformers_have_them_last() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Embedding(30, 8), layer, nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12), nn.Dropout())
    found = layouts(net, torch.zeros(2, 7).long())
    assert {path: one.shape for path, one in found.items() if "." not in path} == {
        "0": (8, 7), "1": (8, 7), "2": (12, 7), "3": (12, 7), "4": (12, 7), "5": (12, 7)
    }  # fmt: skip
    assert {one.channels for one in found.values()} == {"last"}
    x = torch.arange(2 * 7 * 12.0).reshape(2, 7, 12)
    assert torch.equal(found["5"].first(x), x.transpose(1, 2))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_give_units_last_and_perhaps_the_time_first(kind: Any, batch_first: bool) -> None:
    def act(net: Any, x: Tensor) -> Tensor:
        said, _ = net.cells(x if batch_first else x.transpose(0, 1))
        return net.head(net.norm(said))

    net = Steps(act, cells=kind(3, 5, batch_first=batch_first), norm=nn.LayerNorm(5), head=nn.Linear(5, 4))
    for length in (7, 2):  # of two steps as of two samples
        found = layouts(net, torch.randn(2, length, 3))
        assert found["cells"] == Layout((5, length), "last", 0 if batch_first else 1)
        assert found["norm"] == found["cells"]
        assert found["head"] == Layout((4, length), "last", 0 if batch_first else 1)
    x = torch.randn(2, 7, 3)
    given = net.cells(x if batch_first else x.transpose(0, 1))  # pyright: ignore[reportCallIssue]
    wanted = given[0] if batch_first else given[0].transpose(0, 1)
    assert torch.equal(found["cells"].first(given), wanted.transpose(1, 2))


def test_blocks_that_turn_their_maps_are_told_by_the_number_of_channels() -> None:
    def convnext(net: Any, x: Tensor) -> Tensor:
        return x + net.wide(net.norm(net.depth(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    block = Steps(convnext, depth=nn.Conv2d(6, 6, 3, padding=1, groups=6), norm=nn.LayerNorm(6), wide=nn.Linear(6, 6))
    patches = Steps(lambda net, x: net.conv(x).flatten(2).transpose(1, 2), conv=nn.Conv2d(6, 10, 2, stride=2))
    net = nn.Sequential(nn.Conv2d(3, 6, 1), block, patches, nn.Dropout(), nn.Linear(10, 4))
    found = layouts(net, torch.zeros(2, 3, 8, 8))
    assert found["1"] == Layout((6, 8, 8))
    assert found["1.norm"] == Layout((6, 8, 8), "last")
    assert [found[path] for path in "234"] == [
        Layout((10, 16), "last"), Layout((10, 16), "last"), Layout((4, 16), "last")
    ]  # fmt: skip


def test_what_cannot_be_known_is_said_and_the_users_word_counts() -> None:
    net = Steps(lambda net, x: net.act_(net.same(x)), same=nn.Identity(), act_=nn.ReLU())
    model = Model(net, example=(torch.zeros(2, 5, 7),))
    assert layouts_of(model)["act_"].channels == ""
    with pytest.raises(SettingError, match=r"'x': layer 'act_' of the student.*\(5, 7\).*cannot be known.*channels="):
        layout_at("x", model, "act_", "student")
    assert layout_at("x", model, "act_", "student", "last") == Layout((7, 5), "last")
    assert layout_at("x", model, "act_", "student", "first") == Layout((5, 7))
    with pytest.raises(UsageError, match="no layer 'nope'"):
        layout_at("x", model, "nope", "student")

    def turning(net: Any, x: Tensor) -> Tensor:
        return net.line(net.conv(x).transpose(1, 2)).transpose(1, 2)

    turned = Steps(turning, conv=nn.Conv1d(6, 6, 1), line=nn.Linear(6, 6))
    square = layouts(nn.Sequential(turned, nn.Flatten(0, 1)), torch.zeros(2, 6, 6))
    assert square["0"].channels == "", "as many positions as channels, behind layers of both kinds"


@pytest.mark.parametrize("kind", sorted(MADE))
def test_the_ending_of_a_layer_is_found(kind: str) -> None:
    """As a module, as the last of a block, through pooling, and with the settings that it has."""
    made = MADE[kind]()
    block = nn.Sequential(nn.Conv1d(3, 4, 1), made, nn.Dropout(), nn.MaxPool1d(2))
    model = Model(nn.Sequential(block, nn.Flatten(), nn.Linear(8, 2)), example=(torch.randn(2, 3, 4),))
    x = torch.linspace(-8, 8, 50)
    for path in ("0", "0.1", "0.3"):
        found = ending(model, path, output_of, lambda output: output)
        assert found is not None
        torch.testing.assert_close(found(x), made(x))
    for path in ("0.0", "2"):
        assert isinstance(ending(model, path, output_of, lambda output: output), nn.Identity)


def test_functions_and_their_settings_are_found_too_and_what_is_not_is_none() -> None:
    for function, wanted in (
        (lambda x: functional.leaky_relu(x, 0.3), nn.LeakyReLU(0.3)),
        (lambda x: functional.gelu(x, approximate="tanh"), nn.GELU("tanh")),
        (torch.sigmoid, nn.Sigmoid()),
        (lambda x: x.relu_(), nn.ReLU()),
        (lambda x: functional.softplus(x, 3.0), nn.Softplus(3.0, 20.0)),
        (functional.softsign, None),
        (lambda x: x.relu() + x.sigmoid(), None),
    ):
        block = Steps(lambda net, x, function=function: function(net.layer(x)), layer=nn.Linear(3, 4))
        model = Model(nn.Sequential(block), example=(torch.randn(2, 3),))
        found = ending(model, "0", output_of, lambda output: output)
        assert type(found) is type(wanted)
        if found is not None and wanted is not None:
            x = torch.linspace(-8, 8, 50)
            torch.testing.assert_close(found(x), wanted(x))
    at_once = Model(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), example=(torch.randn(2, 3),))
    assert isinstance(ending(at_once, "0", output_of, lambda output: output), nn.ReLU)
    frozen = Model(nn.Sequential(nn.Embedding(9, 3), nn.Tanh()), example=(torch.zeros(2, 4).long(),))
    for parameter in frozen.module.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        assert isinstance(ending(frozen, "1", output_of, lambda output: output), nn.Tanh)
        assert isinstance(ending(frozen, "0", output_of, lambda output: output), nn.Identity)
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())
