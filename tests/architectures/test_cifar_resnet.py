from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from karui.architectures import factories
from karui.architectures.cifar_resnet import BasicBlock, cifar_resnet, load_cifar_weights
from karui.data import load_data
from karui.errors import SettingError, UsageError
from karui.measuring import count, evaluate
from karui.model import Classification, Model, resolve


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [(20, 269_722, 40_551_040), (56, 853_018, 125_485_696), (110, 1_727_962, 252_887_680)],
)
def test_counts(depth: int, parameters: int, macs: int) -> None:
    told = count(Model(cifar_resnet(depth), example=(torch.zeros(1, 3, 32, 32),)))
    assert (told.parameters, told.macs) == (parameters, macs)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    x = torch.randn(2, 4, 6, 6)
    y = BasicBlock(4, 8, 2).shortcut(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert torch.equal(y[:, [0, 1, 6, 7]], torch.zeros(2, 4, 3, 3))
    odd = BasicBlock(4, 7, 2).shortcut(x)
    assert torch.equal(odd[:, 1:5], x[:, :, ::2, ::2])
    same = BasicBlock(4, 4, 1)
    assert same.shortcut(x) is x


def test_other_pictures_classes_and_widths() -> None:
    net = cifar_resnet(8, num_classes=7, in_channels=1, width=0.3).eval()
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert net.conv1.out_channels == 5


def test_every_factory_builds_a_network_by_name() -> None:
    known = factories()
    assert {"resnet20", "resnet56", "mobilenet", "wide_resnet"} <= set(known)
    for path in known.values():
        assert isinstance(resolve(path).build(), nn.Module)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(SettingError, match=rf"depth is {depth}; it must be 6n \+ 2, for example"):
        cifar_resnet(depth)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        load_cifar_weights(tmp_path / "missing.npz")
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 nothing of the kind")
    with pytest.raises(UsageError, match="cannot be read"):
        load_cifar_weights(bad)
    np.savez(tmp_path / "objects.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read"):
        load_cifar_weights(tmp_path / "objects.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UsageError, match="cannot be read"):
        load_cifar_weights(tmp_path / "one.npy")


def test_published_weights_reach_their_accuracy(shared_data: Path) -> None:
    net = cifar_resnet(20)
    net.load_state_dict(load_cifar_weights(shared_data / "cifar10_resnets" / "resnet20.npz"))
    pictures = load_data(f"cifar10:{shared_data / 'cifar10'}").test
    model = Model(net, example=(torch.zeros(1, 3, 32, 32),), task=Classification())
    score = evaluate(model, Subset(pictures, range(1000)))
    assert round(1000 * score.value) == 914
