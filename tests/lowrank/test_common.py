"""Which layers can be replaced: the reasons are right, looking leaves no trace, and costs are those of all calls."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.errors import SettingError
from karui.index import techniques
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._per_layer import Offering
from karui.lowrank._scan import scan
from karui.measuring import count
from karui.model import Model, replace_layers
from karui.technique import Bench


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


def test_places_are_those_of_all_calls_of_one_sample() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 3), nn.Linear(4, 4)

        def forward(self, maps: Tensor, words: Tensor) -> Tensor:
            y = self.conv(self.conv(maps.flatten(0, 1))).unflatten(0, maps.shape[:2])
            return y.sum() + self.linear(words.transpose(0, 1)).sum() + self.linear(words[:, :3].flatten(0, 1)).sum()

    example = (torch.zeros(2, 5, 3, 9, 7), torch.zeros(2, 7, 4))
    conv, linear = scan(Model(Twice(), example=example), anything)[0]
    assert (conv.calls, conv.inputs, conv.outputs) == (2, 5 * (9 * 7 + 7 * 5), 5 * (7 * 5 + 5 * 3))
    assert (conv.space, conv.made) == (5 * ((9, 7),) + 5 * ((7, 5),), 5 * ((7, 5),) + 5 * ((5, 3),))
    assert (linear.calls, linear.space, linear.inputs, linear.outputs) == (2, ((7,), (), (), ()), 10, 10)


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


class Pyramid(nn.Module):
    """All layers are called on a large map and on a small one, or on sequences as long as those; one on two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=(1, 0))
        self.even = nn.Conv2d(24, 24, 3, padding=1)
        self.patch = nn.Linear(24 * 4 * 6, 24)
        self.word = nn.Linear(24, 40)
        self.head = nn.Linear(40, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.level(x), self.level(functional.avg_pool2d(x, 2))], 1)

    def level(self, x: Tensor) -> Tensor:
        x = torch.relu(self.even(torch.relu(self.down(torch.relu(self.stem(x))))))
        whole = self.patch(functional.adaptive_avg_pool2d(x, (4, 6)).flatten(1))
        return self.head(torch.relu(self.word(x.flatten(2).mT + whole.unsqueeze(1))))


SETTINGS: dict[str, dict[str, Any]] = {
    "asymmetric_nonlinear": {"ratio": 0.25, "spatial_split": True, "fully_connected": True},
    "biclustered_cp": {"linear_share": 0.5},
    "biclustered_svd": {"linear_share": 0.5},
    "compression_aware_training": {"share": 0.5, "lam": 0.0, "tuning": 0},
    "cp_decomposition": {"solver": "als", "restarts": 0, "sweeps": 5},
    "flattened_conv": {},
    "group_brain_damage": {"linear": True, "cut_unread": False, "tuning": 0},
    "lcnn": {"size": 4, "linear_size": 8, "norm": False},
    "low_rank_expansion": {"objective": "filter"},
    "low_rank_filters": {},
    "low_rank_output": {"ratio": 0.25, "layer": "head"},
    "low_rank_regularization": {"share": 0.5, "order": "horizontal", "scratch": False},
    "low_rank_sparse": {},
    "monochromatic": {"colours": 2, "ranks": (("down", 4),)},
    "product_quantization": {"lookup": True, "correct": False, "codewords": 4, "conv_codewords": 4},
    "rank_constrained": {"layer": "patch", "frames": 4},
    "separable_filters": {},
    "sic_layer": {},
    "spatial_bottleneck": {"changing": True},
    "svd_restructuring": {"share": 0.5},
    "svd_softmax": {"layer": "head"},
    "topological_conv": {},
    "tucker2": {"ratio": 0.25},
}
"""Settings with which each technique of the room acts on shared layers, quickly."""
ROOM = {entry.card["slug"]: entry for entry in techniques() if entry.room == "lowrank"}


def pyramid() -> tuple[Model, Bench]:
    torch.manual_seed(0)
    rows = TensorDataset(torch.rand(8, 3, 17, 14), torch.zeros(8))
    return Model(Pyramid().eval(), example=(torch.rand(2, 3, 17, 14),)), Bench(train=rows)


def macs_of(model: Model, path: str) -> int:
    return sum(layer.macs for layer in count(model).layers if layer.path == path or layer.path.startswith(f"{path}."))


def made_by(slug: str, **settings: Any) -> Any:
    kind = ROOM[slug].load()
    bare = {name: 0 for name in ("epochs",) if name in kind.__dataclass_fields__}
    return kind(**bare, **settings)


def test_the_room_is_whole() -> None:
    assert set(SETTINGS) == set(ROOM)


@pytest.mark.parametrize("slug", SETTINGS)
def test_what_is_told_of_a_layer_called_on_several_sizes_is_what_is_counted(slug: str) -> None:
    model, bench = pyramid()
    light = made_by(slug, **SETTINGS[slug]).apply(model, bench)
    notes: list[Any] = [change for change in light.lineage if hasattr(change, "settings")]
    told = {entry["layer"]: entry["macs"] for note in notes for entry in note.settings.get("factored", [])}
    told |= {note.settings["layer"]: note.settings["macs"] for note in notes if "macs" in note.settings}
    assert told
    for path, macs in told.items():
        assert list(macs) == [macs_of(model, path), macs_of(light, path)], path


@pytest.mark.parametrize("slug", [slug for slug, entry in ROOM.items() if issubclass(entry.load(), Offering)])
def test_a_menu_is_as_much_faster_on_a_layer_called_on_several_sizes_as_it_says(slug: str) -> None:
    model, bench = pyramid()
    step, tried = made_by(slug), 0
    for one in step._scan(model)[0]:
        for speedup in step.ladder:
            alone, choice = step.alone(model, one, speedup)
            if choice.replaced and alone.pays(choice):
                layer = alone.layer_for(one, choice, bench, step.evidence(model, one, bench)).eval()
                light = replace_layers(model, {one.path: layer})
                assert choice.macs == (macs_of(model, one.path), macs_of(light, one.path))
                tried += 1
    assert tried


@pytest.mark.paper(16)
def test_a_speed_up_of_the_whole_network_is_met_where_layers_are_called_on_several_sizes() -> None:
    model, bench = pyramid()
    light = made_by("asymmetric_nonlinear", speedup=2.0, images=8).apply(model, bench)
    assert 0.9 * count(model).macs / 2 < count(light).macs <= count(model).macs / 2
