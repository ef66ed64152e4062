"""Train-prune-retrain, [63]: thresholds, rounds, dropout, real storage, and what the paper claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.architectures.perceptron import perceptron
from karui.artifact import load, save
from karui.data import Splits
from karui.errors import SettingError
from karui.measuring import evaluate
from karui.model import Classification, Model, Origin
from karui.sparsify._rounds import Selection, sensitivity
from karui.sparsify.magnitude import MagnitudePruning, dropout_after, retraining_dropout
from karui.technique import Bench
from karui.train import SGD, Adam, Constant, Influence, Training
from karui.train.masks import MaskKeeper, connections, density, masks_by_chance, zero_masks, zero_pruned

pytestmark = pytest.mark.paper(63)


def mlp(*sizes: int, seed: int = 0, dropout: float = 0.0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron(sizes, dropout), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def saved_network() -> nn.Module:
    """The factory of the network that is saved."""
    return mlp(64, 100, 50, 10).module


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, **settings: Any) -> Bench:
    training = Training(
        epochs=epochs,
        batch_size=64,
        optimizer=settings.pop("optimizer", Adam(lr=3e-3)),
        schedule=Constant(),
    )
    return Bench(
        train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed, **settings
    )


def zeros(model: Model) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in connections(model.module).items()}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Model, Any, Any]]:
    """What `Bench.fit` was given, call by call: the model, the training and the influence."""
    given: list[tuple[Model, Any, Any]] = []
    fit = Bench.fit

    def spy(self: Bench, model: Model, **settings: Any) -> Model:
        given.append((model.copy(), self.training, settings.get("influence")))
        return fit(self, model, **settings)

    monkeypatch.setattr(Bench, "fit", spy)
    return given


def test_threshold_is_exactly_quality_times_deviation_of_each_layer() -> None:
    model = mlp(64, 100, 50, 10)
    sparse = MagnitudePruning(quality=0.8, qualities={"1": 0.2}, rounds=1, epochs=0, dead=False).apply(model, Bench())
    for name, weight in connections(model.module).items():
        quality = 0.2 if name == "1.weight" else 0.8
        assert torch.equal(zeros(sparse)[name], weight.detach().abs() < quality * weight.detach().std())
        kept = ~zeros(sparse)[name]
        assert torch.equal(sparse.module.get_parameter(name)[kept], weight[kept])
    for name, value in model.module.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(sparse.module.get_parameter(name), value), "biases are no connections"


def test_later_thresholds_do_not_count_pruned_zeros() -> None:
    model = mlp(64, 100, 10)
    weight = model.module.get_parameter("1.weight").detach()
    twice = MagnitudePruning(quality=1.0, rounds=2, epochs=0, dead=False).apply(model, Bench())
    first = weight.abs() >= weight.std()
    second = first & (weight.abs() >= weight[first].std())
    assert torch.equal(~zeros(twice)["1.weight"], second)


@pytest.mark.parametrize("across", [True, False])
def test_shares_are_kept_to_the_weight(across: bool) -> None:
    model = mlp(64, 100, 50, 10)
    sparse = MagnitudePruning(keep=0.15, across=across, epochs=0, dead=False).apply(model, Bench())
    counts = {name: int((~zero).sum()) for name, zero in zeros(sparse).items()}
    if across:
        assert sum(counts.values()) == round(0.15 * (6400 + 5000 + 500))
        assert counts["5.weight"] > 0.15 * 500, "the last layer's weights are larger"
    else:
        assert counts == {"1.weight": 960, "3.weight": 750, "5.weight": 75}
    own = MagnitudePruning(keep=0.15, keeps={"5": 0.5}, epochs=0, dead=False).apply(model, Bench())
    assert int((~zeros(own)["5.weight"]).sum()) == 250
    assert sum(int((~zero).sum()) for zero in zeros(own).values()) == 250 + round(0.15 * 11400)
    spared = MagnitudePruning(keep=0.15, skip=("3",), epochs=0, dead=False).apply(model, Bench())
    assert not zeros(spared)["3.weight"].any()


def test_masks_nest_and_survivors_go_on_from_their_trained_values(digits: Splits, fits: list) -> None:
    bench = bench_of(digits, optimizer=SGD(lr=0.05, momentum=0.9, weight_decay=0.01))
    model = mlp(64, 40, 10)
    sparse = MagnitudePruning(keep=0.1, rounds=3, epochs=1, dead=False).apply(model, bench)
    stages = [given for given, _, _ in fits]
    assert len(stages) == 3
    for name, weight in connections(model.module).items():
        alive = [~zeros(stage)[name] for stage in stages]
        assert all(not (later & ~earlier).any() for earlier, later in pairwise(alive))
        assert torch.equal(alive[-1], ~zeros(sparse)[name])
        assert torch.equal(stages[0].module.get_parameter(name)[alive[0]], weight[alive[0]])
    shares = [density({name: ~zero for name, zero in zeros(stage).items()}) for stage in stages]
    assert shares == pytest.approx([0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1], rel=2e-3)
    assert [training.optimizer.lr for _, training, _ in fits] == pytest.approx([0.005] * 3)
    assert sparse.module.get_parameter("3.weight").abs().sum() > 0


def test_an_earlier_pruning_is_kept(digits: Splits) -> None:
    model = mlp(64, 40, 10)
    draw = torch.Generator().manual_seed(1)
    earlier = {name: torch.rand(w.shape, generator=draw) < 0.5 for name, w in connections(model.module).items()}
    zero_pruned(model.module, earlier)
    sparse = MagnitudePruning(keep=0.9, rounds=1, epochs=1, dead=False).apply(model, bench_of(digits))
    assert all(torch.equal(~zeros(sparse)[name], mask) for name, mask in earlier.items())


def test_dropout_falls_with_the_connections_before_it(digits: Splits, fits: list) -> None:
    assert retraining_dropout(0.5, 0.25) == 0.25
    model = mlp(64, 40, 30, 10, dropout=0.5)
    assert dropout_after(model) == {"3": "1.weight", "6": "4.weight"}
    sparse = MagnitudePruning(keep=0.25, across=False, rounds=1, epochs=1, dead=False).apply(model, bench_of(digits))
    influence = fits[0][2]
    working = model.copy().module
    influence.attach(working)
    seen = [working.get_submodule(path).p for path in ("3", "6")]
    assert seen == pytest.approx([0.25, 0.25])
    influence.finish(working)
    assert [working.get_submodule(path).p for path in ("3", "6")] == [0.5, 0.5]
    assert [sparse.module.get_submodule(path).p for path in ("3", "6")] == [0.5, 0.5]


def test_dead_units_are_cut_out_of_the_network(digits: Splits) -> None:
    model = bench_of(digits, 10).fit(mlp(64, 100, 50, 10))
    technique = MagnitudePruning(keep=0.03, rounds=2, epochs=1)
    thin, masked = (replace(technique, dead=dead).apply(model, bench_of(digits)) for dead in (True, False))
    assert thin.parameters < masked.parameters
    assert thin.module.get_parameter("1.weight").shape[0] < 100
    assert any(step.kind == "cut" for step in thin.lineage)
    assert thin.module(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_the_saved_file_holds_only_what_is_left(digits: Splits, tmp_path: Path) -> None:
    origin = Origin(f"{__file__}:saved_network")
    model = replace(mlp(64, 100, 50, 10), lineage=(origin,))
    sparse = MagnitudePruning(keep=0.1, epochs=1, dead=False).apply(model, bench_of(digits))
    sizes = {}
    for name, value in (("dense", model), ("sparse", sparse)):
        save(value, tmp_path / name, onnx=False)
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert sizes["sparse"] < 0.25 * sizes["dense"], sizes
    again = load(tmp_path / "sparse")
    for name, value in sparse.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name].view(torch.int32), value.view(torch.int32))


def test_local_pruning_lets_the_other_layers_rest(digits: Splits, fits: list, small_cnn: Callable[..., Model]) -> None:
    model = small_cnn((8, 8, 8))
    MagnitudePruning(keep=0.3, rounds=1, epochs=1, local=True, dead=False).apply(model, bench_of(digits))
    assert len(fits) == 2
    moving = []
    for given, _, influence in fits:
        working = given.module
        influence.attach(working)
        moving.append({name for name, p in working.named_parameters() if p.requires_grad})
        influence.finish(working)
        assert all(p.requires_grad for p in working.parameters())
    assert moving[0] == {"linear.weight", "linear.bias"}
    assert moving[1] == set(dict(model.module.named_parameters())) - moving[0]
    (first, _, _), (second, _, _) = fits
    assert not zeros(first)["conv2.weight"].any()
    assert zeros(first)["linear.weight"].float().mean() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(second.module.get_parameter("conv1.weight").abs() > 0, ~zeros(second)["conv1.weight"])
    assert zeros(second)["conv2.weight"].any()


def test_as_an_influence_all_rounds_are_in_one_training(digits: Splits) -> None:
    model, bench = mlp(64, 40, 10), bench_of(digits, 3)
    technique = MagnitudePruning(keep=0.1, rounds=3, l2=1e-4)
    seen: list[int] = []  # zeros after each step
    influence = technique.influence(model, bench)

    class Watch(Influence):
        def constraints(self, module: nn.Module, moment: Any) -> None:
            seen.append(sum(int((w == 0).sum()) for w in connections(module).values()))

    trained = bench.under(influence).fit(model, influence=Watch())
    total = 64 * 40 + 400
    assert sum(int(zero.sum()) for zero in zeros(trained).values()) == total - round(0.1 * total)
    assert seen == sorted(seen)
    assert len(set(seen)) == 3
    assert trained.module.state_dict().keys() == model.module.state_dict().keys()


def test_penalties_shrink_weights(digits: Splits) -> None:
    model = mlp(64, 40, 10)
    names = connections(model.module)
    sums = {}
    for name, settings in (("none", {}), ("l1", {"l1": 1e-3}), ("l2", {"l2": 1e-2})):
        learned = MagnitudePruning(keep=1.0, rounds=1, epochs=0, learn=3, **settings).apply(model, bench_of(digits))
        sums[name] = sum(float(learned.module.get_parameter(path).detach().abs().sum()) for path in names)
    assert sums["l1"] < 0.9 * sums["none"]
    assert sums["l2"] < 0.95 * sums["none"]


def test_the_scan_gives_each_layer_what_it_bears(digits: Splits) -> None:
    model, bench = bench_of(digits, 15).fit(mlp(64, 100, 50, 10)), bench_of(digits)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = sensitivity(model, bench)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert set(found.curves) == {"1.weight", "3.weight", "5.weight"}
    assert found.curves["1.weight"][0] >= found.curves["1.weight"][-1]
    technique = MagnitudePruning(max_drop=0.02, keep=0.05, rounds=1, epochs=0, dead=False)
    sparse = technique.apply(model, bench)
    for name, zero in zeros(sparse).items():
        assert float(zero.float().mean()) == pytest.approx(min(found.bearable(name, 0.02), 0.95), abs=0.002)
    assert evaluate(sparse, digits.test).value > 0.8


def test_it_is_a_selection_of_what_is_alive() -> None:
    model = mlp(64, 20, 10)
    alive = {"1.weight": torch.rand(20, 64) < 0.5}
    masks = Selection(keep=0.2).masks(model.module, alive, 1.0)
    assert list(masks) == ["1.weight"]
    assert not (masks["1.weight"] & ~alive["1.weight"]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep is 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keeps": {"1": 2.0}}, r"keeps\['1'\] is 2"),
        ({"quality": -1.0}, "quality is -1"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"learn": -1}, "learn is -1"),
        ({"l1": float("nan")}, "l1 is nan"),
        ({"qualities": {"1": 0.5}}, "qualities is given without quality"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MagnitudePruning(**settings)


def test_layers_that_are_not_there_are_told() -> None:
    model = mlp(64, 20, 10)
    with pytest.raises(SettingError, match="'seven' is not known"):
        MagnitudePruning(epochs=0, skip=("seven",)).apply(model, Bench())
    with pytest.raises(SettingError, match="keeps names 'seven' is not known"):
        MagnitudePruning(epochs=0, keeps={"seven": 0.5}).apply(model, Bench())


def test_nothing_asked_is_nothing_done() -> None:
    model = mlp(64, 20, 10)
    assert MagnitudePruning(keep=1.0).apply(model, Bench()) is model
    assert zero_masks(model.module) == {}


def accuracy(model: Model, digits: Splits) -> float:
    return evaluate(model, digits.test).value


@pytest.mark.effect
@pytest.mark.slow
def test_small_weights_matter_least_and_gentle_rounds_bear_more(digits: Splits) -> None:
    """64-100-50-10: against random connections at 15 % with equal retraining, and 20 % a round down to 8 %.

    Two seeds. Eleven rounds of ten passes stand against one cut with ten passes, so that rounds have more training in
    all; at equal passes the one cut is better (`results/iterative_magnitude_pruning.md`).
    """
    gaps, gains = [], []
    for seed in range(2):
        bench = bench_of(digits, 30, seed)
        dense = bench.fit(mlp(64, 100, 50, 10, seed=seed))
        technique = MagnitudePruning(keep=0.15, rounds=1, epochs=10, rate=0.3, dead=False)
        chance = MaskKeeper(masks_by_chance(dense.module, 0.15, seed))
        slower = replace(bench, training=replace(bench.training, optimizer=Adam(lr=0.3 * 3e-3)))
        retrained = slower.fit(dense, epochs=10, influence=chance)
        gaps.append(accuracy(technique.apply(dense, bench), digits) - accuracy(retrained, digits))
        eighth = replace(technique, keep=0.08)
        iterative = replace(eighth, rounds=11).apply(dense, bench)
        gains.append(accuracy(iterative, digits) - accuracy(eighth.apply(dense, bench), digits))
    assert sum(gaps) / 2 >= 0.15, gaps
    assert sum(gains) / 2 >= 0.01, gains


@pytest.mark.effect
@pytest.mark.slow
def test_l1_is_better_before_retraining_and_l2_after(digits: Splits) -> None:
    """Trained under either penalty, a fifth kept, mean of three seeds."""
    scores: dict[str, list[float]] = {"l1": [0.0, 0.0], "l2": [0.0, 0.0]}
    for seed in range(3):
        bench = bench_of(digits, 30, seed)
        for name, penalty in (("l1", {"l1": 3e-4}), ("l2", {"l2": 1e-3})):
            technique = MagnitudePruning(keep=1.0, learn=30, rounds=1, epochs=0, rate=0.3, dead=False, **penalty)
            learned = technique.apply(mlp(64, 100, 50, 10, seed=seed), bench)
            pruning = replace(technique, keep=0.2, learn=0)
            for number, epochs in enumerate((0, 10)):
                pruned = replace(pruning, epochs=epochs).apply(learned, bench)
                scores[name][number] += accuracy(pruned, digits) / 3
    assert scores["l1"][0] > scores["l2"][0], scores
    assert scores["l2"][1] >= scores["l1"][1] - 0.003, scores
