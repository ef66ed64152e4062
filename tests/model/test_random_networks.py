"""Random networks, random cuts: each is proved, and right by another measure than the proof's, or it is refused.

`KARUI_NETWORKS` sets how many networks are drawn; every one is cut several times, several groups at once.
"""

from __future__ import annotations

import copy
import os

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError
from karui.model import Analysis, Model, coupled_groups, remove_units
from karui.model.running import difference, run_double

NETWORKS = int(os.environ.get("KARUI_NETWORKS", "30"))
CUTS = 3
SIZE = 4


class Residual(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.two(torch.tanh(self.bn(self.one(x)))))


class Padded(nn.Module):
    """A convolution to more channels, and a shortcut with zeros for the new ones."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(width, width + 2 * more, 3, padding=1), more

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv(x)) + functional.pad(x, (0, 0, 0, 0, self.more, self.more))


class Concat(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([functional.gelu(self.conv(x)), x], 1)


class Halves(nn.Module):
    """Half of the channels is worked on; the halves change places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return torch.cat([two, torch.tanh(self.conv(one))], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).reshape(batch, channels, height, width)


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))


class Attention(nn.Module):
    """Positions as tokens; the numbers of heads and of channels in each are frozen in Python."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)
        self.heads, self.each = heads, each

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(*tokens.shape[:2], 3, self.heads, self.each).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        y = self.out(y.transpose(1, 2).reshape(*tokens.shape[:2], self.heads * self.each))
        return (tokens + y).transpose(1, 2).reshape(x.shape[0], -1, SIZE, SIZE)


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module], head: nn.Module, flatten: bool) -> None:
        super().__init__()
        self.blocks, self.head, self.flatten = nn.Sequential(*blocks), head, flatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


Made = tuple[list[nn.Module], int]


def plain(draw: st.DrawFn, width: int) -> Made:
    new = draw(st.sampled_from([4, 6, 8]))
    return [nn.Conv2d(width, new, 1), nn.BatchNorm2d(new), nn.ReLU()], new


def grouped(draw: st.DrawFn, width: int) -> Made:
    return [nn.Conv2d(width, 2 * width, 3, padding=1, groups=2), nn.Tanh()], 2 * width


def wise(draw: st.DrawFn, width: int) -> Made:
    return [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.SiLU()], width


def residual(draw: st.DrawFn, width: int) -> Made:
    return [Residual(width, draw(st.integers(2, 5)))], width


def padded(draw: st.DrawFn, width: int) -> Made:
    more = draw(st.integers(1, 2))
    return [Padded(width, more)], width + 2 * more


def concat(draw: st.DrawFn, width: int) -> Made:
    growth = draw(st.sampled_from([2, 4]))
    return [Concat(width, growth)], width + growth


def halves(draw: st.DrawFn, width: int) -> Made:
    return [Halves(width)], width


def shuffle(draw: st.DrawFn, width: int) -> Made:
    return [draw(st.sampled_from([Shuffle(2), nn.ChannelShuffle(2)]))], width


def gate(draw: st.DrawFn, width: int) -> Made:
    return [Gate(width)], width


def norm(draw: st.DrawFn, width: int) -> Made:
    return [nn.GroupNorm(2, width)], width


def attention(draw: st.DrawFn, width: int) -> Made:
    return [Attention(width, draw(st.integers(2, 3)), draw(st.integers(2, 3)))], width


def up(draw: st.DrawFn, width: int) -> Made:
    return [nn.Conv2d(width, 16, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)], 4


BLOCKS = [plain, grouped, wise, residual, padded, concat, halves, shuffle, gate, norm, attention, up]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A stem, up to five blocks, a head. Every activation maps 0 to 0, which the second measure below relies on."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.sampled_from([4, 6, 8]))
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.Tanh()]
    for block in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)):
        if width <= 24:
            made, width = block(draw, width)
            blocks += made
    flatten = draw(st.booleans())
    return Network(blocks, nn.Linear(width * SIZE * SIZE if flatten else width, 3), flatten).eval()


def silenced(net: nn.Module, found: Analysis, removed: dict[str, Tensor]) -> nn.Module:
    """The network whose removed units are never made: what reads them is left alone, unlike in the proof."""
    silent = copy.deepcopy(net).double()
    parameters = dict(silent.named_parameters())
    with torch.no_grad():
        for name, units in removed.items():
            for member in found[name].members:
                if member.tensor in parameters and member.role != "in":
                    parameters[member.tensor].index_fill_(member.dim, member.indices[units].reshape(-1), 0)
    return silent


@settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(net=networks(), data=st.data())
def test_every_cut_of_a_random_network_is_right_or_refused(net: Network, data: st.DataObject) -> None:
    dense = Model(net, example=(torch.randn(1, 3, SIZE, SIZE),))
    found = coupled_groups(dense)
    exact = [group for group in found if group.exact]
    x = (torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64),)
    for _ in range(CUTS if exact else 0):
        some = data.draw(st.lists(st.sampled_from(exact), min_size=1, max_size=4, unique_by=lambda group: group.name))
        removed = {
            group.name: torch.tensor(
                data.draw(st.lists(st.integers(0, group.size - 1), min_size=1, max_size=group.size - 1, unique=True))
            )
            for group in some
        }
        try:
            light = remove_units(dense, removed, analysis=found)
        except SurgeryError as refusal:
            event(f"refused: {refusal.message.split(':')[-1][:60]}")
            continue
        event("graph form" if light.lineage[-1].programs is not None else "own forward")
        expected = run_double(silenced(net, found, removed), x)
        again = light.lineage[-1].replay(copy.deepcopy(net).double(), (dense.example[0].double(),))
        gap = difference(run_double(again, x), expected)
        assert gap <= 1e-9 * max(1.0, float(expected[0].abs().max())), (removed, gap)
