from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from karui.architectures import MobileNetConvert
from karui.architectures.cifar_resnet import resnet8
from karui.architectures.mobilenet_convert import is_convertible, separable_like
from karui.data import Splits
from karui.errors import SettingError, SurgeryError
from karui.layers.separable import Separable2d
from karui.measuring import count
from karui.model import Classification, Model, layer_at
from karui.technique import Bench

pytestmark = pytest.mark.paper(4)


@pytest.fixture
def bench(digits: Splits) -> Bench:
    return Bench(train=digits.train, validation=digits.validation)


def residual() -> Model:
    torch.manual_seed(0)
    return Model(resnet8(in_channels=1).eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
        nn.Conv2d(8, 12, 3, dilation=2, padding="same"),
        nn.Conv2d(8, 12, 5, padding="valid"),
    ],
    ids=str,
)
def test_shape_and_bias_are_the_old_layers(conv: nn.Conv2d) -> None:
    layer = separable_like(conv)
    x = torch.randn(2, 8, 11, 10)
    assert layer(x).shape == conv(x).shape
    assert (layer.pointwise.bias is None) == (conv.bias is None)
    assert [type(part) for part in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(8, 1, 3),
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 12, 3),
        nn.Linear(8, 12),
    ],
    ids=str,
)
def test_what_is_left_alone(layer: nn.Module) -> None:
    assert not is_convertible(layer, 8)


def test_every_spatial_convolution_but_the_stem_is_converted(bench: Bench) -> None:
    dense = residual()
    light = MobileNetConvert(epochs=0).apply(dense, bench)
    kinds = {path: type(layer) for path, layer in light.module.named_modules()}
    assert kinds["conv1"] is nn.Conv2d
    assert sum(kind is Separable2d for kind in kinds.values()) == 6
    assert light.lineage[-1].describe() == "made 6 convolutions depthwise-separable"
    shape = torch.zeros(2, 1, 8, 8)
    assert light.module.eval()(shape).shape == dense.module(shape).shape
    for path in ("layer2.0.conv1", "layer3.0.conv2"):
        old = count(dense)
        conv = layer_at(dense.module, path)
        assert isinstance(conv, nn.Conv2d)
        before = next(layer.macs for layer in old.layers if layer.path == path)
        after = sum(layer.macs for layer in count(light).layers if layer.path.startswith(f"{path}."))
        assert after / before == pytest.approx(1 / conv.out_channels + 1 / 9)


def test_share_takes_those_that_do_most_work_and_skip_leaves(bench: Bench) -> None:
    model = residual()
    work = {layer.path: layer.macs for layer in count(model).layers}
    chosen = MobileNetConvert(share=0.5).choose(model)
    rest = set(MobileNetConvert().choose(model)) - set(chosen)
    assert len(chosen) == 3
    assert min(work[path] for path in chosen) >= max(work[path] for path in rest)
    assert chosen[0] not in MobileNetConvert(skip=(chosen[0],)).choose(model)


def test_the_seed_draws_the_weights(bench: Bench) -> None:
    one, two = (MobileNetConvert(epochs=0).apply(residual(), bench).module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_errors(bench: Bench, small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(SettingError, match=r"no layer 'conv9'. Did you mean"):
        MobileNetConvert(skip=("conv9",)).apply(small_cnn(), bench)
    with pytest.raises(SurgeryError, match="no convolution to make depthwise-separable"):
        MobileNetConvert(min_inputs=99).apply(small_cnn(), bench)
    for settings in ({"share": 1.5}, {"min_inputs": 0}, {"epochs": -1}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            MobileNetConvert(**settings)  # pyright: ignore[reportArgumentType]
