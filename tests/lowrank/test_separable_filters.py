"""Separable filters (survey 14), three ways, in convolutions and as a bank alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.separable_bank import SeparableBank, separable_bank
from karui.lowrank.separable_filters import SeparableFilters
from karui.measuring import count
from karui.model import Classification, Model, resolve
from karui.numerics.separable import Mixture, by_nuclear_norm, mixed, rank_one, spread
from karui.numerics.separable_cp import by_tensor
from karui.numerics.sparse_coding import learn_filters
from karui.technique import Bench

pytestmark = pytest.mark.paper(14)


def technique(**settings: Any) -> SeparableFilters:
    return SeparableFilters(**{"restarts": 1, "rounds": 4, "images": 10, **settings})


def bench_of(x: Tensor) -> Bench:
    return Bench(train=TensorDataset(x, torch.zeros(len(x))))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("method", ["comb", "td", "direct"])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)  # fmt: skip
def test_a_layer_computes_its_dense_equivalent_and_costs_what_is_told(
    kind: Any, method: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 4, *[9] * (4 if kind is nn.Conv3d else 3))[..., 0]
    conv = kind(4, 24, 3, **settings)
    model = Model(nn.Sequential(conv), example=(x[:2],))
    step = technique(method=method, ranks=(("0", 4),))
    light = step.apply(model, bench_of(x))
    layer: Any = light.module[0]  # pyright: ignore
    assert isinstance(layer, SeparableBank)
    with torch.no_grad():
        assert relative(layer.dense()(x), layer(x)) < 1e-5
    (choice,) = step.choose(model)
    dims, groups = x.ndim - 2, settings.get("groups", 1)
    assert choice.parameters[1] == 4 * dims * 3 + 24 * 4 // groups * 4 + 24 * settings.get("bias", True)
    assert light.parameters == choice.parameters[1]
    assert count(light).macs == choice.macs[1]
    note: Any = light.lineage[-1]
    (entry,) = note.settings["factored"]
    assert entry["error"] == pytest.approx(relative(layer.kernel().detach(), conv.weight.detach().double()), rel=1e-4)
    for vectors in zip(*layer.filters, strict=True):
        assert all(len(one) == 4 for one in vectors)


def test_planted_slices_come_out_exact_also_channel_by_channel() -> None:
    torch.manual_seed(0)
    shared = [torch.randn(2, 5), torch.randn(2, 5)]
    own = [torch.randn(6, 1, 5), torch.randn(6, 1, 5)]
    x = torch.rand(2, 6, 9, 9)
    for way, weight in (
        (True, torch.einsum("ncm,ma,mb->ncab", torch.randn(16, 6, 2), *shared)),
        (False, torch.einsum("ncm,cma,cmb->ncab", torch.randn(16, 6, 1), *own)),
    ):
        conv = nn.Conv2d(6, 16, 5)
        with torch.no_grad():
            conv.weight.copy_(weight)
        model = Model(nn.Sequential(conv), example=(x,))
        light = technique(ranks=(("0", 2 if way else 1),), shared=way, restarts=3).apply(model, Bench())
        assert [len(one) for one in light.module[0].filters] == [1 if way else 6] * 2  # pyright: ignore
        with torch.no_grad():
            assert relative(light.module(x), conv(x)) < 1e-4


class Pyramid(nn.Module):
    """One convolution on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) + self.conv(x[:, :, ::2, ::2]).mean((2, 3))


def test_a_layer_on_maps_of_several_sizes_is_coded_on_those_that_show_most() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 2, 12, 12)
    pyramid = Model(Pyramid(), example=(x[:2],))
    flat = Model(nn.Sequential(pyramid.module.conv), example=(x[:2],))  # pyright: ignore
    settings: Any = {"method": "direct", "images": 16, "rounds": 2}
    both, single = (
        technique(ranks=((path, 4),), **settings).apply(model, bench_of(x)).module.get_submodule(path)
        for path, model in (("conv", pyramid), ("0", flat))
    )
    assert isinstance(both, SeparableBank)
    assert all(torch.equal(value, single.state_dict()[name]) for name, value in both.state_dict().items())


def test_each_refusal_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 3)),
        nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    x = torch.rand(2, 3, 8, 8)
    net(x)
    choices = {choice.path: choice for choice in technique().choose(Model(net, example=(x,)))}
    assert choices["0"].replaced
    assert choices["0"].macs[1] * 2 <= choices["0"].macs[0]
    assert "ConvTranspose2d" in choices["1"].reason
    for path in ("2", "3", "5"):
        assert "no two dimensions of space" in choices[path].reason
    assert "no space to split" in choices["7"].reason


@pytest.mark.parametrize("method", ["comb", "direct"])
def test_saved_and_loaded_it_is_as_small_and_equal(method: str, tmp_path: Path) -> None:
    origin = resolve(f"{Path(__file__).parents[1] / 'law_network.py'}:network")
    module = origin.replay(None, ())
    assert module is not None
    model = Model(module.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    light = technique(method=method).apply(model, bench_of(torch.rand(30, 1, 8, 8)))
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    x = torch.rand(2, 1, 8, 8)
    again = load(tmp_path / "light")
    with torch.no_grad():
        assert torch.equal(again.module.eval()(x), light.module.eval()(x))


def test_needs_are_those_of_the_method(small_cnn: Callable[..., Model]) -> None:
    assert technique().apply(small_cnn(), Bench()).parameters < small_cnn().parameters
    with pytest.raises(NeedError, match="calibration"):
        technique(method="direct").apply(small_cnn(), Bench())
    with pytest.raises(SettingError, match="conv9"):
        technique(ranks=(("conv9", 2),)).apply(small_cnn(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"method": "cp"}, "method"), ({"speedup": 0.9}, "speedup"), ({"ranks": (("conv1", 0),)}, "ranks"),
        ({"method": "direct", "shared": False}, "shared"), ({"restarts": 0}, "restarts"), ({"images": 0}, "images"),
        ({"sparsity": 0.0}, "sparsity"), ({"flatness": 0.5}, "flatness"), ({"rounds": 0}, "rounds"),
        ({"epochs": -1}, "epochs"), ({"learning_rate": 0.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def gabors(seed: int, size: int = 9) -> Tensor:
    """48 oriented filters: twelve angles, two phases, two scales, a little shaken."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(size, dtype=torch.float64) - size // 2
    down, across = torch.meshgrid(places, places, indexing="ij")
    made = []
    for number in range(48):
        shake = torch.rand(2, generator=generator).tolist()
        angle = math.pi * (number % 12) / 12 + 0.1 * shake[0]
        scale = (1.6, 2.2)[number // 24] * (1 + 0.1 * shake[1])
        along = across * math.cos(angle) + down * math.sin(angle)
        beside = down * math.cos(angle) - across * math.sin(angle)
        wave = torch.cos(math.pi / 2 * along / scale + math.pi / 2 * (number // 12 % 2))
        one = torch.exp(-(along**2 + beside**2 / 2) / (2 * scale**2)) * wave
        made.append((one - one.mean()) / (one - one.mean()).norm())
    return torch.stack(made)


def features(pictures: Tensor, found: Mixture | None, bank: Tensor) -> Tensor:
    """What the bank makes of pictures; by the separable filters if they are given."""
    conv: nn.Module = nn.Conv2d(1, len(bank), bank.shape[1:], bias=False)  # pyright: ignore
    with torch.no_grad():
        conv.weight.copy_(bank.unsqueeze(1))  # pyright: ignore
        if found is not None:
            conv = separable_bank(conv, [one.unsqueeze(0) for one in found.factors], found.mix.unsqueeze(1))  # pyright: ignore
        return conv(pictures.unsqueeze(1)).flatten()


@pytest.mark.effect
@pytest.mark.slow
def test_a_third_of_the_filters_holds_the_bank_and_tensors_do_it_best(digits: Splits) -> None:
    pictures = torch.stack([digits.train[i][0][0] for i in range(80)])
    pictures = nn.functional.interpolate(pictures[:, None], scale_factor=3, mode="bicubic")[:, 0]
    for seed in range(3):
        bank = gabors(seed)
        values = torch.linalg.svdvals(bank).square()
        alone = float((1 - values[:, 0].sum() / values.sum()).sqrt())
        tensor, nuclear = by_tensor(bank, 16), by_nuclear_norm(bank, 16)
        learned = learn_filters(pictures, 16, (9, 9), flatness=0.1, rounds=15, seed=seed)
        direct = mixed(bank, rank_one(learned))
        assert tensor.error <= nuclear.error <= direct.error, (tensor.error, nuclear.error, direct.error)
        assert tensor.error < 0.3 * alone
        assert by_tensor(bank, 24).error < 0.5 * tensor.error
        assert max(float(spread(one.filters()).max()) for one in (tensor, nuclear, direct)) < 1e-6
        sides = torch.stack([features(pictures, found, bank) for found in (None, tensor)])
        assert float(torch.corrcoef(sides)[0, 1]) > 0.98
