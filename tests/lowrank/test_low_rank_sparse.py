"""Low rank plus sparse (survey 24): the technique, and what the paper shows."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredLinear
from karui.layers.low_rank_sparse import LowRankPlusSparse
from karui.lowrank._common import factor_matrix, fine_tune
from karui.lowrank.low_rank_sparse import ENTRY, LowRankAndSparse
from karui.model import Classification, Model, Note, build_layer, describe_layer, replace_layers
from karui.numerics.bilateral import keep_largest, low_rank_sparse
from karui.numerics.regression import Moments
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(24)


def technique(**settings: Any) -> LowRankAndSparse:
    return LowRankAndSparse(**settings)


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


def told(model: Model) -> dict[str, Any]:
    note = model.lineage[-1]
    assert isinstance(note, Note)
    return note.settings  # pyright: ignore


LAYERS = [
    (nn.Linear(30, 24), (30,)),
    (nn.Conv1d(12, 16, 5, stride=2, padding=2, bias=False), (12, 17)),
    (nn.Conv2d(12, 16, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (12, 11, 13)),
    (nn.Conv2d(12, 24, 3, groups=2, padding="same"), (12, 7, 7)),
    (nn.Conv3d(6, 16, 3, padding=1), (6, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "conv1d", "strided, dilated", "grouped", "conv3d"])
def test_a_sum_is_within_its_sizes_and_is_saved_exported_and_loaded(layer: Any, shape: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(layer.eval(), example=(torch.randn(2, *shape),))
    bench = Bench(train=TensorDataset(torch.randn(60, *shape), torch.zeros(60)))
    light = technique(rank=3, density=0.1, images=60, positions=8, sweeps=5).apply(model, bench)
    new: Any = light.module
    assert isinstance(new, LowRankPlusSparse)
    groups = getattr(layer, "groups", 1)
    assert int((new.sparse.weight != 0).sum()) <= groups * round(0.1 * layer.weight.numel() / groups)
    x = model.example[0]
    dense = new.low.dense()
    torch.testing.assert_close(run(light, x), dense(x) + new.sparse(x), rtol=1e-4, atol=1e-4)
    assert (new.sparse.bias is None) == (layer.bias is None)
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=layer)
    torch.testing.assert_close(run(again, x), run(light, x))
    assert {k: v.shape for k, v in build_layer(*describe_layer(new)).state_dict().items()} == {
        k: v.shape for k, v in new.state_dict().items()
    }


def test_end_points_are_plain_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(nn.Linear(30, 24), example=(torch.randn(2, 30),))
    bench = Bench(train=TensorDataset(torch.randn(100, 30), torch.zeros(100)))
    low = technique(rank=4).apply(model, bench)
    assert isinstance(low.module, FactoredLinear)
    assert low.parameters == 4 * 54 + 24
    sparse = technique(rank=0, density=0.1).apply(model, bench)
    assert type(sparse.module) is nn.Linear
    assert int((sparse.module.weight != 0).sum()) == 72
    save(sparse, tmp_path / "sparse", onnx=False)
    save(model, tmp_path / "dense", onnx=False)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] < 0.5 * sizes[1]


def test_the_budget_is_kept_and_its_best_split_is_no_worse_than_either_end() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 40)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 40) / 2)
        layer.weight.view(-1)[torch.randperm(1600)[:30]] += 5
    model = Model(layer, example=(torch.randn(2, 40),))
    bench = Bench(train=TensorDataset(torch.randn(300, 40), torch.zeros(300)))
    errors = {}
    for share in (None, 0.0, 0.5, 1.0):
        light = technique(budget=0.25, sparse_share=share, images=300).apply(model, bench)
        (entry,) = told(light)["factored"]
        errors[share] = entry["error"]
        kept = [module for module in light.module.modules() if isinstance(module, nn.Linear)]
        numbers = sum(w.numel() if (w != 0).all() else ENTRY * int((w != 0).sum()) for w in (m.weight for m in kept))
        assert numbers <= 0.25 * 1600
    assert errors[None] <= min(errors.values()) + 1e-9
    assert errors[None] < 0.5 * min(errors[0.0], errors[1.0])


def test_retraining_keeps_zeros_and_moves_all_else(digits: Splits) -> None:
    torch.manual_seed(0)
    model = Model(perceptron((64, 48, 10)).eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification())
    training = Training(batch_size=64, optimizer=Adam(lr=1e-3, weight_decay=1e-2))
    bench = Bench(train=digits.train, training=training)
    settings: dict[str, Any] = {"rank": 3, "density": 0.1, "images": 100, "sweeps": 3}
    bare, tuned = (technique(**settings, epochs=epochs).apply(model, bench).module.state_dict() for epochs in (0, 1))
    assert bare.keys() == tuned.keys()
    sparse = [name for name in bare if name.endswith("sparse.weight")]
    assert sparse
    for name in sparse:
        assert torch.equal(bare[name] == 0, tuned[name] == 0)
    assert all(not torch.equal(bare[name], tuned[name]) for name in bare)


def test_what_is_too_small_or_lacks_data_is_told() -> None:
    model = Model(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.PReLU()), example=(torch.zeros(1, 3, 8, 8),))
    bench = Bench(train=TensorDataset(torch.randn(9, 3, 8, 8), torch.zeros(9)))
    assert technique(budget=0.1).apply(model, bench).parameters == model.parameters
    assert "0: left as it is: it is too small to save" in technique(budget=0.1).remarks(model)
    with pytest.raises(NeedError, match="low_rank_sparse"):
        technique().apply(model, Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"budget": 0.0}, "budget"), ({"sparse_share": 1.5}, "sparse_share"), ({"rank": -1}, "rank"),
        ({"rank": 2, "density": 1.0}, "density"), ({"density": 0.1}, "density"), ({"rank": 0}, "rank"),
        ({"images": 0}, "images"), ({"positions": 0}, "positions"), ({"sweeps": 0}, "sweeps"),
        ({"epochs": -1}, "epochs"), ({"learning_rate": 0.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def trained(digits: Splits, seed: int) -> tuple[Model, Bench]:
    torch.manual_seed(seed)
    net = perceptron((64, 128, 128, 128, 10))
    fresh = Model(net.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification())
    training = Training(epochs=10, batch_size=32, optimizer=Adam(lr=2e-3), schedule=Cosine())
    bench = Bench(train=digits.train, test=digits.test, training=training, seed=seed)
    return bench.fit(fresh), bench


def hidden_of(model: Model, data: Any, depth: int) -> Tensor:
    """What the linear layer at that depth is given."""
    x = torch.stack([data[i][0] for i in range(len(data))])
    linear = [layer for layer in model.module.modules() if isinstance(layer, nn.Linear)]
    seen: list[Tensor] = []
    handle = linear[depth].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    run(model, x)
    handle.remove()
    return seen[0].double()


@pytest.mark.effect
def test_on_a_planted_sum_the_mix_beats_both_ends_on_held_out_responses(digits: Splits) -> None:
    """128x128, rank 6 plus 2 % large entries, on real hidden activations, an eighth of the numbers."""
    model, _ = trained(digits, 0)
    x, held = (hidden_of(model, data, 2) for data in (digits.train, digits.test))
    torch.manual_seed(0)
    weight = torch.randn(128, 6).double() @ torch.randn(6, 128).double() / 6**0.5
    weight.view(-1)[torch.randperm(128 * 128)[:328]] += 4 * torch.randn(328).double()
    moments = Moments.of(x, x @ weight.T)
    room = 128 * 128 / 8

    def lost(rank: int, entries: int) -> float:
        fit = low_rank_sparse(moments.yx, moments.xx, float(moments.yy.trace()), rank, entries)
        apart = held @ (weight - fit.matrix()).T
        return float(apart.norm() / (held @ weight.T).norm())

    mixed, low, sparse = lost(6, int(room - 6 * 256)), lost(int(room / 256), 0), lost(0, int(room))
    assert mixed < low, (mixed, low, sparse)
    assert mixed < sparse / 2, (mixed, low, sparse)


@pytest.mark.effect
@pytest.mark.slow
def test_fitted_to_data_it_is_ahead_before_retraining_and_nears_the_dense_network_after(digits: Splits) -> None:
    """A perceptron at an eighth of its weights, two seeds; beside it the SVD of its weights, and magnitude pruning.

    After six epochs it is a point below the dense network; two, as in the paper, did not bring it within one.
    """
    scores: dict[str, list[float]] = {name: [] for name in ("dense", "mix", "own inputs", "svd", "pruned", "after")}
    ratios = []
    for seed in range(2):
        model, bench = trained(digits, seed)
        step = technique(budget=1 / 8, images=1000)
        layers = {path: layer for path, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}
        sizes = {path: int(layer.weight.numel() / 8 / sum(layer.weight.shape)) for path, layer in layers.items()}
        svd = {path: factor_matrix(layer, max(1, sizes[path]))[0] for path, layer in layers.items()}
        pruned = model.copy()
        for path, layer in layers.items():
            mine: Any = pruned.module.get_submodule(path)
            mine.weight.data.copy_(keep_largest(layer.weight.detach(), int(layer.weight.numel() / 8 / ENTRY)))
        mix = step.apply(model, bench)
        found = {
            "dense": model,
            "mix": mix,
            "own inputs": technique(budget=1 / 8, images=1000, asymmetric=False).apply(model, bench),
            "svd": replace_layers(model, svd),
            "pruned": pruned,
            "after": fine_tune(mix, bench, 6, 2e-3, "retrain"),
        }
        for name, one in found.items():
            scores[name].append(100 * bench.evaluate(one, "test").value)
        x, held = (hidden_of(model, data, 2) for data in (digits.train, digits.test))
        weight = list(layers.values())[2].weight.detach().double()
        moments = Moments.of(x, x @ weight.T)
        fitted = low_rank_sparse(moments.yx, moments.xx, float(moments.yy.trace()), 4, 680).matrix()
        eye = torch.eye(128).double()
        blind = low_rank_sparse(weight, eye, float(weight.square().sum()), 4, 680).matrix()
        ratios.append(float((held @ (weight - fitted).T).norm() / (held @ (weight - blind).T).norm()))
    assert max(ratios) < 0.75, ratios
    assert mean(scores["mix"]) > max(mean(scores["svd"]), mean(scores["pruned"])), scores
    assert mean(scores["mix"]) >= mean(scores["own inputs"]) - 0.5, scores
    assert mean(scores["after"]) > mean(scores["dense"]) - 2, scores
