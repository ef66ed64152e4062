from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from karui.errors import ArtifactError, SurgeryError
from karui.model import (
    Model,
    Replace,
    build_layer,
    coupled_groups,
    describe_layer,
    edit_from_json,
    edit_to_json,
    remove_units,
    replace_layers,
)
from karui.model.graphform import GraphForm


class Net(nn.Module):
    """Holds one layer under two names and in a plain list, and another in a nested block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.plain = [self.first]
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.again(self.plain[0](self.first(x))))


def model(module: nn.Module | None = None) -> Model:
    torch.manual_seed(0)
    return Model(Net() if module is None else module, example=(torch.randn(3, 4),))


def run(value: Model) -> torch.Tensor:
    return value.module(*value.example)


def test_every_holder_of_a_shared_layer_is_given_the_new_one() -> None:
    old = model()
    new = replace_layers(old, {"first": nn.Linear(4, 4, bias=False)})
    net = new.module
    assert isinstance(net, Net)
    assert net.first is net.again is net.plain[0]
    assert net.first.bias is None
    weight = net.first.weight
    x = old.example[0]
    assert torch.equal(run(new), net.block(x @ weight.T @ weight.T @ weight.T))


def test_what_is_spent_is_not_copied() -> None:
    old, layer = model(), nn.Linear(4, 2)
    plain, spent = replace_layers(old, {"block.1": layer}), replace_layers(old, {"block.1": layer}, spent=[layer])
    assert plain.module.get_parameter("block.1.weight") is not layer.weight
    assert spent.module.get_parameter("block.1.weight") is layer.weight
    assert spent.module.get_parameter("first.weight") is not old.module.get_parameter("first.weight")
    both = replace_layers(old, {"block.1": layer}, spent=[old.module, layer])
    assert both.module.get_parameter("first.weight") is old.module.get_parameter("first.weight")
    assert both.module is not old.module
    assert torch.equal(run(both), run(plain))


def test_the_model_given_stays_as_it_is() -> None:
    old = model()
    before, state = run(old), copy.deepcopy(old.module.state_dict())
    new = replace_layers(old, {"block.1": nn.Linear(4, 2)})
    with torch.no_grad():
        for parameter in new.module.parameters():
            parameter.zero_()
    assert torch.equal(run(old), before)
    assert all(torch.equal(value, state[name]) for name, value in old.module.state_dict().items())
    assert type(new.module) is Net
    assert old.lineage == ()


def test_nested_path_and_several_at_once() -> None:
    new = replace_layers(model(), {"block.1": nn.Linear(4, 2, bias=False), "block.0": nn.Tanh()})
    assert isinstance(new.module.block[0], nn.Tanh)
    assert new.module.block[1].bias is None


def test_root() -> None:
    new = replace_layers(model(), {"": nn.Linear(4, 2)})
    assert isinstance(new.module, nn.Linear)
    assert run(new).shape == (3, 2)


def test_tensors_shared_with_the_rest_stay_shared() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    new_layer = nn.Linear(4, 4, bias=False)
    new_layer.weight = net[1].weight
    new = replace_layers(model(net), {"1": new_layer}).module
    assert new[0].weight is new[1].weight
    assert new[0].weight is not net[0].weight


def test_the_old_layer_may_live_on_inside_the_new_one() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    new = replace_layers(model(net), {"0": nn.Sequential(net[0], nn.Identity())})
    assert torch.equal(run(new), net(new.example[0]))


def test_mode_of_the_old_layer_is_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    new = replace_layers(model(net), {"0": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))})
    assert not any(layer.training for layer in new.module.modules())
    train = replace_layers(model(nn.Sequential(nn.Linear(4, 4)).train()), {"0": nn.Linear(4, 4).eval()})
    assert all(layer.training for layer in train.module.modules())


def test_replay_builds_the_same_structure_and_takes_the_weights() -> None:
    layers = {"first": nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4)), "block.0": nn.GELU()}
    new = replace_layers(model(), layers)
    saved = json.loads(json.dumps(edit_to_json(new.lineage[-1])))
    again = edit_from_json(saved)
    module = again.replay(Net(), new.example)
    assert module is not None
    module.load_state_dict(new.module.state_dict())
    assert torch.equal(module(*new.example), run(new))
    assert again.describe() == "replaced 2 layers by GELU, Sequential"
    assert replace_layers(model(), layers, "halved the rank").lineage[-1].describe() == "halved the rank"


def test_nothing_to_replace_is_the_same_model() -> None:
    old = model()
    assert replace_layers(old, {}) is old


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"frist": nn.Linear(4, 4)}, r"no layer 'frist'.*'first'"),
        ({"first": nn.Linear(4, 4), "again": nn.Linear(4, 4)}, "'first' and 'again' are one layer"),
        ({"block": nn.Linear(4, 2), "block.1": nn.Linear(4, 2)}, r"'block\.1' lies inside 'block'"),
        ({"block.1": nn.Linear(4, 2), "block": nn.Linear(4, 2)}, r"'block\.1' lies inside 'block'"),
        ({"block.1": nn.Linear(4, 3)}, r"'block\.1' \(Linear\) gives \(3, 3\) where the old one gave \(3, 2\)"),
        ({"block.1": nn.Linear(5, 2)}, "does not run with the new layer at 'block.1'"),
        ({"block.1": nn.LSTM(4, 2)}, "class torch.nn.modules.rnn.LSTM cannot be put into a model's lineage"),
    ],
)
def test_what_cannot_be_replaced_is_told(layers: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        replace_layers(model(), layers)


def test_a_class_instead_of_a_layer() -> None:
    with pytest.raises(SurgeryError, match=r"is a type, not a torch.nn.Module"):
        replace_layers(model(), {"first": nn.Identity})  # pyright: ignore[reportArgumentType]


def test_a_layer_whose_weights_are_used_directly_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    value = Model(Attention(), example=(torch.randn(2, 3, 4),))
    with pytest.raises(SurgeryError, match=r"does not call the layer 'attention\.out_proj'"):
        replace_layers(value, {"attention.out_proj": nn.Linear(4, 4)})


def test_the_short_cut_of_transformer_layers_is_found_out() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    value = Model(encoder, example=(torch.randn(2, 3, 4),))
    two = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 8))
    with pytest.raises(SurgeryError, match="does not run as it stands"):
        replace_layers(value, {"linear1": two})


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3, bias=False),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2, bias=False, padding_mode="circular"),
        nn.Conv3d(2, 2, 3),
        nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
        nn.BatchNorm2d(5, eps=1e-3, momentum=None, affine=False),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.LayerNorm((3, 4), eps=1e-6, bias=False),
        nn.GroupNorm(2, 4),
        nn.Embedding(7, 3, padding_idx=1),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.ReLU(inplace=True),
        nn.Hardtanh(-2.0, 2.0),
        nn.Identity(),
        nn.GELU(approximate="tanh"),
        nn.Flatten(2),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU())),
    ],
    ids=repr,
)
def test_layers_are_described_and_rebuilt(layer: nn.Module) -> None:
    path, settings = json.loads(json.dumps(describe_layer(layer)))
    again = build_layer(path, settings)
    assert repr(again) == repr(layer)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "torch.nn:Module",
        "torch.nn:_reduction",
        "torch.hub:load",
        "karui.errors:KaruiError",
        "karui.model.replace:nn",
        "karui.model.replace:copy.deepcopy",
        "karui.nowhere:Layer",
        "karuispoof:Layer",
        "subprocess:Popen",
        "",
    ],
)
def test_a_lineage_cannot_name_anything_else(path: str) -> None:
    step = Replace({"first": [path, {"args": "true"}]})
    with pytest.raises(ArtifactError, match="layer"):
        step.replay(Net(), ())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"first": ["torch.nn:Linear", {"in_features": 4}]}, "cannot be built from its saved settings"),
        ({"first": ["torch.nn:Linear", {"in_features": -4, "out_features": 2}]}, "cannot be built"),
        ({"first": ["torch.nn:Sequential", {}]}, "cannot be built"),
        ({"fist": ["torch.nn:Identity", {}]}, "no layer 'fist'"),
    ],
)
def test_a_damaged_lineage_is_told(layers: dict[str, list], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Replace(layers).replay(Net(), ())


def test_a_lineage_cannot_start_with_a_replacement() -> None:
    with pytest.raises(ArtifactError, match="no network to change"):
        Replace({}).replay(None, ())


def test_parametrised_layers_are_refused_rather_than_lost() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(SurgeryError, match="ParametrizedLinear"):
        replace_layers(model(), {"first": layer})


def test_a_layer_of_a_network_in_graph_form() -> None:
    class Padded(nn.Module):
        """Pads channels to a number frozen in Python, so that a cut of them needs the graph form."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.head = nn.Linear(8 * 36, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x).reshape(-1, 4, 36)
            return self.head(nn.functional.pad(y, (0, 0, 2, 2)).reshape(-1, 8 * 36))

    torch.manual_seed(0)
    dense = Model(Padded().eval(), example=(torch.randn(2, 1, 6, 6),))
    name = coupled_groups(dense).groups[0].name
    cut = remove_units(dense, {name: torch.tensor([1])})
    assert isinstance(cut.module, GraphForm)
    light = replace_layers(cut, {"conv": nn.Conv2d(1, 3, 3, padding=1, bias=False)})
    assert run(light).shape == run(dense).shape
    assert not torch.equal(run(light), run(cut))
    module = Padded()
    for step in light.lineage:
        module = step.replay(module, light.example)
    assert module is not None
    module.load_state_dict(light.module.state_dict())
    assert torch.equal(module.eval()(*light.example), run(light))
