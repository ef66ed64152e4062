"""Product quantisation of networks (survey 19)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.artifact.pack import pack
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.product_quantized import QuantizedConv, QuantizedLinear
from karui.lowrank.product_quantization import ProductQuantization
from karui.measuring import count
from karui.model import Classification, Model, resolve
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(19)


def technique(**settings: Any) -> ProductQuantization:
    small: dict[str, Any] = {"codewords": 8, "conv_codewords": 8, "images": 40, "sweeps": 1, "turns": 1}
    return ProductQuantization(**{**small, **settings})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def bench_of(x: Tensor) -> Bench:
    return Bench(train=TensorDataset(x, torch.zeros(len(x), dtype=torch.long)))


def with_lookup(layer: Any, lookup: bool) -> Any:
    """The same layer by tables, or decoded."""
    other = type(layer)(**{**layer.settings(), "lookup": lookup})
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 4},
    ],
)  # fmt: skip
def test_a_convolution_by_tables_is_the_decoded_one(kind: Any, correct: bool, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.rand(16, 8, *[7] * dims)
    conv = kind(8, 36, 3, **settings)
    model = Model(nn.Sequential(conv), example=(x[:2],))
    step = technique(conv_sub_dim=4, correct=correct)
    light = step.apply(model, bench_of(x))
    layer: Any = light.module[0]  # pyright: ignore
    assert isinstance(layer, QuantizedConv)
    with torch.no_grad():
        tables = with_lookup(layer, True)(x)
        assert relative(tables, layer(x)) < 1e-5
        assert relative(layer.dense()(x), layer(x)) < 1e-5
    groups = settings.get("groups", 1)
    size = min(4, 8 // groups)
    assert layer.codes.shape == (36, 8 // groups // size, 3**dims)
    (choice,) = step.choose(model)
    assert choice.parameters[1] == light.parameters == 8 * 8 + 36 * settings.get("bias", True)
    bits = layer.bits()
    assert bits["books"] == 32 * 8 * 8
    assert bits["codes"] == 3 * 36 * (8 // groups // size) * 3**dims


def test_a_linear_layer_by_tables_is_the_decoded_one() -> None:
    torch.manual_seed(0)
    x = torch.rand(30, 5, 24)
    model = Model(nn.Sequential(nn.Linear(24, 100)), example=(x[:2],))
    light = technique().apply(model, bench_of(x))
    layer: Any = light.module[0]  # pyright: ignore
    assert isinstance(layer, QuantizedLinear)
    with torch.no_grad():
        assert relative(with_lookup(layer, True)(x), layer(x)) < 1e-5
        assert relative(layer.dense()(x), layer(x)) < 1e-5


@pytest.mark.parametrize(
    "space", [{}, {"padding": 2, "dilation": 2}, {"padding": 2, "dilation": 2, "padding_mode": "reflect"}]
)
def test_tables_cost_what_the_paper_counts(space: Any) -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 8, 9, 9)
    conv = nn.Conv2d(8, 32, 3, stride=2, **space)
    side = conv(x[:1]).shape[-1]
    net = nn.Sequential(conv, nn.Flatten(), nn.Linear(32 * side**2, 64))
    model = Model(net, example=(x[:2],))
    step = technique(conv_sub_dim=4, lookup=True, correct=False)
    light = step.apply(model, Bench())
    macs = 81 * 8 * 8 + 32 * side**2 * 8  # `hw_in C K`, whatever is padded, and `Cs K`
    assert count(light).macs == macs == sum(choice.macs[1] for choice in step.choose(model))
    assert count(technique(correct=False).apply(model, Bench())).macs == count(model).macs
    # `hw_out d^2 N C / C'` and `Ct Cs / C's` additions, which are no multiply-adds.
    told = [choice.remark for choice in step.choose(model)]
    assert told == [
        f"{side**2 * 9 * 32 * 2:,} additions of what is looked up",
        f"{64 * 32 * side**2 // 4:,} additions of what is looked up",
    ]
    assert not any(choice.remark for choice in technique(correct=False).choose(model))


def test_gradients_of_codebooks_are_those_of_the_decoded_weight() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(8, 6, subspaces=2, codewords=3, lookup=True)
    layer.codes.copy_(torch.randint(3, (6, 2)))
    x = torch.randn(5, 8)
    layer(x).square().sum().backward()
    assert layer.books.grad is not None
    other = with_lookup(layer, False)
    other(x).square().sum().backward()
    torch.testing.assert_close(layer.books.grad, other.books.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bytes_are_those_of_the_layers_own_numbers(dtype: torch.dtype) -> None:
    model = Model(nn.Linear(64, 256).to(dtype), example=(torch.zeros(2, 64, dtype=dtype),))
    step, each = technique(sub_dim=4, codewords=16, correct=False), dtype.itemsize
    light = step.apply(model, Bench())
    bits = {"books": 8 * each * 64 * 16, "codes": 4 * 256 * 16, "bias": 8 * each * 256}
    assert light.module.bits() == bits  # pyright: ignore
    told = f"{64 * 256 * each:,} -> {(bits['books'] + bits['codes']) // 8:,} bytes"
    assert told in step.choose(model)[0].describe()
    # Codes weigh as much whatever the layer's numbers do: here they pay beside wide numbers only.
    tight = technique(sub_dim=1, codewords=160, correct=False).choose(model)[0]
    assert tight.replaced == (dtype == torch.float64)


def test_codes_have_the_promised_width_on_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 512))
    origin = resolve(f"{_factory(tmp_path)}:network")
    module = origin.replay(None, ())
    assert module is not None
    module.load_state_dict(net.state_dict())
    model = Model(module, example=(torch.rand(2, 512),), lineage=(origin,))
    light = technique(sub_dim=8, codewords=16, correct=False).apply(model, Bench())
    codes = dict(light.module.named_buffers())["0.codes"]
    stored = pack(codes)
    assert stored.header["index_bits"] == 4
    assert len(stored.arrays["codes"]) == 512 * 64 * 4 // 8
    saved = save(light, tmp_path / "light", onnx=False)
    (note,) = [e for e in light.lineage if e.kind == "note"]  # pyright: ignore
    assert "bytes" in json.dumps(note.settings["factored"])  # pyright: ignore
    promised = 4 * 512 * 16 + 512 * 64 * 4 // 8 + 4 * 512
    assert promised <= saved.weights_bytes <= promised + 6000  # with the tables and the lineage
    assert saved.weights_bytes < 4 * 512 * 512 / 10
    again = load(tmp_path / "light")
    assert torch.equal(dict(again.module.named_buffers())["0.codes"], codes)


def _factory(folder: Path) -> Path:
    file = folder / "factory.py"
    file.write_text(
        "from torch import nn\n\n\ndef network() -> nn.Module:\n    return nn.Sequential(nn.Linear(512, 512))\n",
        encoding="utf-8",
    )
    return file


def test_each_refusal_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 14, 3), nn.ConvTranspose2d(14, 8, 2), nn.Flatten(), nn.LazyLinear(96),
        nn.Linear(96, 3),
    )  # fmt: skip
    x = torch.rand(2, 3, 12, 12)
    net(x)
    model = Model(net, example=(x,))
    choices = {c.path: c for c in ProductQuantization(conv_sub_dim=3, conv_codewords=16).choose(model)}
    assert choices["0"].replaced
    assert choices["1"].ranks == (2, 16)
    assert "do not part" in choices["1"].remark
    assert "ConvTranspose2d" in choices["2"].reason
    assert choices["4"].replaced
    assert "would not save bytes" in choices["5"].reason
    off = {c.path: c for c in ProductQuantization(codewords=0).choose(model)}
    assert off["4"].reason == "codewords is 0"
    own = ProductQuantization(codewords=0, conv_codewords=0, layers=(("4", 8, 16),)).choose(model)
    assert [c.path for c in own if c.replaced] == ["4"]
    with pytest.raises(SettingError, match="conv9"):
        ProductQuantization(layers=(("conv9", 2, 4),)).choose(model)
    with pytest.raises(NeedError, match="calibration"):
        ProductQuantization().apply(model, Bench())


@pytest.mark.parametrize("lookup", [False, True])
def test_saved_exported_and_loaded_it_is_equal(lookup: bool, tmp_path: Path) -> None:
    origin = resolve(f"{Path(__file__).parents[1] / 'law_network.py'}:network")
    module = origin.replay(None, ())
    assert module is not None
    model = Model(module.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    light = technique(lookup=lookup).apply(model, bench_of(torch.rand(30, 1, 8, 8)))
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "light").module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sub_dim": 0}, "sub_dim"), ({"codewords": 257}, "codewords"), ({"conv_sub_dim": 0}, "conv_sub_dim"),
        ({"conv_codewords": -1}, "conv_codewords"), ({"layers": (("a", 0, 4),)}, "layers"), ({"images": 0}, "images"),
        ({"positions": 0}, "positions"), ({"sweeps": 0}, "sweeps"), ({"turns": 0}, "turns"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def perceptron() -> nn.Module:
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.effect
@pytest.mark.slow
def test_correction_halves_the_error_and_chained_inputs_help(digits: Splits) -> None:
    scores: dict[str, list[float]] = {name: [] for name in ("dense", "kmeans", "corrected", "unchained")}
    x = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
    distances: dict[str, list[float]] = {"kmeans": [], "corrected": [], "unchained": []}
    for seed in range(3):
        training = Training(epochs=12, batch_size=32, optimizer=Adam(lr=2e-3), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        torch.manual_seed(seed)
        dense = bench.fit(Model(perceptron(), example=(x[:2],), task=Classification()))
        own: Any = {"sub_dim": 8, "codewords": 8, "images": 1000, "skip": ("5",)}
        lights = {
            "dense": dense,
            "kmeans": ProductQuantization(correct=False, **own).apply(dense, bench),
            "corrected": ProductQuantization(**own).apply(dense, bench),
            "unchained": ProductQuantization(chained=False, **own).apply(dense, bench),
        }
        with torch.no_grad():
            seen = {name: [light.module.eval()[:stop](x) for stop in (2, 4)] for name, light in lights.items()}  # pyright: ignore
            given = {1: x.flatten(1), 3: torch.relu(seen["dense"][0])}
            alone = {
                name: [
                    relative(lights[name].module[place](one), dense.module[place](one)) for place, one in given.items()
                ]  # pyright: ignore
                for name in ("kmeans", "unchained")
            }
        # Each layer by itself.
        shares = [after / before for before, after in zip(alone["kmeans"], alone["unchained"], strict=True)]
        assert shares[0] <= 0.65, alone
        assert shares[1] <= 0.5, alone
        for name, found in distances.items():
            found.append(relative(seen[name][1], seen["dense"][1]))
        for name, light in lights.items():
            scores[name].append(100 * bench.evaluate(light, "test").value)
        bits = [sum(lights["corrected"].module[place].bits().values()) for place in (1, 3)]  # pyright: ignore
        assert 32 * (64 * 256 + 256 * 256 + 512) / sum(bits) >= 10
    assert mean(scores["corrected"]) >= mean(scores["kmeans"]) + 3, scores
    pairs = zip(distances["corrected"], distances["unchained"], distances["kmeans"], strict=True)
    assert all(chained < alone and chained <= 0.5 * kmeans for chained, alone, kmeans in pairs), distances
