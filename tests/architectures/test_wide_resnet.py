from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import nn

from karui.architectures import WideResNet
from karui.architectures.wide_resnet import WideBlock, blocks_of, build_wide_resnet
from karui.data import Splits
from karui.errors import SettingError
from karui.measuring import count, evaluate
from karui.model import Model
from karui.technique import Bench
from karui.train import Adam, Training

pytestmark = pytest.mark.paper(7)


def parameters(depth: int, width: int, **settings: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_wide_resnet(depth, width, **settings).parameters())


@pytest.mark.parametrize(
    ("depth", "width", "number"),
    [
        (10, 1, 77_850),
        (10, 2, 303_706),
        (16, 1, 175_066),
        (16, 4, 2_748_890),
        (16, 8, 10_961_370),
        (16, 10, 17_116_634),
        (22, 1, 272_282),
        (22, 8, 17_158_106),
        (22, 10, 26_797_914),
        (28, 10, 36_479_194),
        (28, 12, 52_517_850),
        (40, 1, 563_930),
        (40, 2, 2_243_546),
        (40, 4, 8_949_210),
        (40, 8, 35_748_314),
    ],
)
def test_parameters_of_the_paper(depth: int, width: int, number: int) -> None:
    assert parameters(depth, width) == number


def test_parameters_with_100_classes() -> None:
    assert parameters(28, 10, num_classes=100) == 36_536_884


@pytest.mark.parametrize(
    ("depth", "width", "macs"),
    [(10, 1, 12_501_632), (10, 2, 44_483_840), (16, 1, 26_657_408), (22, 1, 40_813_184), (28, 10, 5_243_328_768)],
)
def test_multiply_accumulates_of_the_paper(depth: int, width: int, macs: int) -> None:
    model = Model(build_wide_resnet(depth, width), example=(torch.zeros(1, 3, 32, 32),))
    assert count(model).macs == macs


def test_parameters_grow_with_the_square_of_the_width() -> None:
    assert parameters(28, 24) / parameters(28, 12) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("depth", [4, 11, 12, 20, 110])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth: int) -> None:
    with pytest.raises(SettingError, match=rf"depth is {depth}; .* must be 6n \+ 4, for example"):
        WideResNet(depth=depth)


def test_depth_counts_the_convolutions_of_a_block_and_not_the_shortcuts() -> None:
    assert [blocks_of(depth, length) for depth, length in ((28, 2), (40, 3), (22, 3), (40, 2))] == [4, 4, 2, 6]
    net = build_wide_resnet(22, 2, block="3,1,3")
    kernels = [conv.kernel_size[0] for conv in net.get_submodule("group2.1.convs")]  # pyright: ignore
    assert kernels == [3, 1, 3]
    convs = [name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d) and "skip" not in name]
    assert len(convs) == 22 - 4 + 1


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(16, 16, 1), (8, 16, 2), (8, 16, 1)])
def test_a_block_whose_last_convolution_is_zero_is_its_shortcut(inputs: int, outputs: int, stride: int) -> None:
    torch.manual_seed(0)
    block = WideBlock(inputs, outputs, stride, (3, 3), 0.0).eval()
    nn.init.zeros_(block.convs[1].weight)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, inputs, 8, 8)
    if block.skip is None:
        assert torch.equal(block(x), x)
    else:
        assert torch.equal(block(x), block.skip(block.norms[0](x).relu()))


def test_the_shortcut_is_a_bare_convolution_only_where_channels_differ() -> None:
    net = build_wide_resnet(16, 2)
    for group in ("group1", "group2", "group3"):
        first, second = net.get_submodule(group)  # pyright: ignore[reportGeneralTypeIssues]
        assert type(first.skip) is nn.Conv2d
        assert first.skip.bias is None
        assert first.skip.kernel_size == (1, 1)
        assert second.skip is None
    assert build_wide_resnet(16, 1).get_submodule("group1.0").skip is None


def test_dropout_lies_inside_the_block_and_not_on_the_shortcut() -> None:
    torch.manual_seed(0)
    block = WideBlock(16, 16, 1, (3, 3), 0.999).train()
    x = torch.randn(4, 16, 8, 8)
    shares = (block(x) - x).abs().gt(1e-6).float().mean()
    assert shares < 0.2, "with nearly everything dropped the block is nearly its shortcut"
    assert torch.allclose((block(x) - x).median(), torch.tensor(0.0), atol=1e-6)


def test_normalisation_comes_first_and_no_convolution_has_a_bias() -> None:
    net = build_wide_resnet(10, 1)
    assert next(iter(net.get_submodule("group1.0").children()))[0].__class__ is nn.BatchNorm2d
    assert all(layer.bias is None for layer in net.modules() if isinstance(layer, nn.Conv2d))


def test_pictures_of_28_pixels() -> None:
    net = build_wide_resnet(10, 1, in_channels=1)
    told = count(Model(net, example=(torch.zeros(1, 1, 28, 28),)))
    sides = {layer.path: layer.output_shape[-1] for layer in told.layers if layer.path.endswith("convs.1")}
    assert list(sides.values()) == [28, 14, 7]


def test_apply_builds_for_the_data(digits: Splits) -> None:
    bench = Bench(train=digits.train, validation=digits.validation, seed=3)
    net = WideResNet(depth=10, width=1, dropout=0.3, epochs=0).apply(None, bench)
    assert net.module.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert net.lineage[0].describe().startswith("built by karui.architectures.wide_resnet:build_wide_resnet(depth=10")


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0},
        {"dropout": 1.0},
        {"block": "3"},
        {"block": "3,2"},
        {"block": "x"},
        {"epochs": -1},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        WideResNet(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.effect
@pytest.mark.slow
def test_wide_and_shallow_is_as_good_as_thin_and_deep_and_wider_is_better(digits: Splits) -> None:
    """Equal work (44.5 against 40.8 million multiply-accumulates at 32 pixels), on digits.

    Time for each of them, of which the section asks 1.3 times less, and colour pictures are the benchmark's to tell.
    """
    bench = Bench(
        train=digits.train, validation=digits.validation, training=Training(batch_size=64, optimizer=Adam(lr=2e-3))
    )

    def accuracy(depth: int, width: int) -> float:
        step = WideResNet(depth=depth, width=width, epochs=3)
        models = [step.apply(None, replace(bench, seed=seed)) for seed in range(3)]
        return mean(100 * evaluate(model, digits.test).value for model in models)

    narrow, wide, deep = accuracy(10, 1), accuracy(10, 2), accuracy(22, 1)
    assert wide > 95
    assert wide > deep - 1
    assert wide > narrow
