"""Low-rank regularisation (survey 22): what must hold, and what the paper shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.axes import axis_stages, chain_cost
from karui.layers.factored import FactoredConv
from karui.layers.spatial import split_stages
from karui.lowrank._common import fine_tune
from karui.lowrank.low_rank_regularization import LowRankRegularization, matrices_of, split_loss
from karui.measuring import count
from karui.model import Classification, Model
from karui.numerics.cp_fit import cp
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(22)


def technique(**settings: Any) -> LowRankRegularization:
    return LowRankRegularization(**{"epochs": 0, **settings})


def run(model: Model, x: Tensor) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.module(x)


def told(model: Model) -> dict[str, dict[str, Any]]:
    notes = [step for step in model.lineage if step.kind == "note" and "factored" in step.settings]  # pyright: ignore
    return {entry["layer"]: entry for entry in notes[-1].settings["factored"]}  # pyright: ignore


KINDS = [
    {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2, "padding": 2},
    {"padding": "same", "padding_mode": "reflect"}, {"padding": "same", "kernel_size": 4},
    {"padding": 1, "padding_mode": "circular", "groups": 4, "stride": 2},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("order", ["vertical", "horizontal"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("settings", KINDS)
def test_it_is_exact_at_the_rank_of_the_kernel_and_equals_its_dense_form_below(
    kind: Any, settings: dict[str, Any], order: Any
) -> None:
    torch.manual_seed(0)
    conv = kind(16, 24, **{"kernel_size": 3, **settings})
    dim = 0 if order == "vertical" else conv.weight.ndim - 3
    rank = 2 * conv.groups
    with torch.no_grad():  # a kernel of that rank
        for rows in conv.weight.split(24 // conv.groups):
            first = torch.randn(2, rows.shape[1], rows.shape[2 + dim])
            rest = [size for place, size in enumerate(rows.shape[2:]) if place != dim]
            second = torch.randn(rows.shape[0], 2, *rest)
            rows.copy_(torch.einsum("kci,nk...->nci...", first, second).movedim(2, 2 + dim))
    x = torch.randn(2, 16, *[9] * (conv.weight.ndim - 2))
    model = Model(conv, example=(x,))
    light = technique(rank=rank, order=order).apply(model, Bench())
    chain: Any = light.module
    assert isinstance(chain, FactoredConv)
    assert [stage.bias is not None for stage in chain] == [False, conv.bias is not None]
    torch.testing.assert_close(run(light, x), run(model, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chain.dense()(x), run(light, x), rtol=1e-4, atol=1e-4)
    below = technique(rank=conv.groups, order=order).apply(model, Bench())
    torch.testing.assert_close(below.module.dense()(x), run(below, x), rtol=1e-4, atol=1e-4)  # pyright: ignore
    assert count(light).macs == told(light)[""]["macs"][1]


def test_asymmetric_padding_and_stride_stay_with_their_dimension() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, (5, 3), stride=(3, 2), padding=(2, 0), dilation=(1, 2))
    x = torch.randn(2, 8, 17, 13)
    for order in ("vertical", "horizontal"):
        chain: Any = technique(rank=6, order=order).apply(Model(conv, example=(x,)), Bench()).module
        assert {tuple(stage.stride) for stage in chain} == {(3, 1), (1, 2)}
        torch.testing.assert_close(chain.dense()(x), chain(x), rtol=1e-4, atol=1e-4)


def test_the_error_is_the_tail_of_the_spectrum_and_values_are_split_evenly() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1)
    kernel = conv.weight.detach().double()
    matrix = torch.stack([torch.stack([kernel[:, c, i].flatten() for i in range(3)]) for c in range(8)]).reshape(24, 36)
    torch.testing.assert_close(matrices_of(conv)[0], matrix)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 4, 9):
        light = technique(ranks=(("", rank),)).apply(Model(conv, example=(torch.randn(1, 8, 6, 6),)), Bench())
        chain: Any = light.module
        lost = (kernel - chain.dense().weight.detach().double()).square().sum()
        torch.testing.assert_close(lost, values[rank:].square().sum(), rtol=1e-5, atol=1e-8)
        error = float((lost / kernel.square().sum()).sqrt())
        assert split_loss(conv, rank) == pytest.approx(error, rel=1e-5)
        assert told(light)[""]["error"] == pytest.approx(error, rel=1e-5)
        first, second = (stage.weight.detach().double() for stage in chain)
        for filters in (first, second.transpose(0, 1)):
            torch.testing.assert_close(filters.flatten(1).norm(dim=1), values[:rank].sqrt(), rtol=1e-4, atol=1e-5)


def test_no_iterative_solution_is_better() -> None:
    """Two hundred random starts of alternating least squares on the two factors end where the closed form is."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3)
    matrix, rank = matrices_of(conv)[0], 3
    closed, ends = split_loss(conv, rank), []
    for _ in range(200):
        left = torch.randn(matrix.shape[0], rank, dtype=torch.float64)
        for _ in range(30):
            right = torch.linalg.lstsq(left, matrix).solution
            left = torch.linalg.lstsq(right.T, matrix.T).solution.T
        ends.append(float((matrix - left @ right).norm() / matrix.norm()))
    assert min(ends) >= closed - 1e-9
    assert min(ends) == pytest.approx(closed, rel=1e-4)


def weights(convs: list[tuple[nn.Conv2d, int]]) -> int:
    stages = [split_stages(conv, k // conv.groups, conv.out_channels // conv.groups) for conv, k in convs]
    return sum(chain_cost(chain, (64, 64))[0] for chain in stages)


def test_weights_of_vgg16_and_caffenet_are_the_papers() -> None:
    with torch.device("meta"):
        widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
        ranks = (5, 24, 64, 64, 64, 128, 160, 192, 192, 256, 320, 320, 320)
        vgg = [(nn.Conv2d(a, b, 3, padding=1), k) for (a, b), k in zip(pairwise(widths), ranks, strict=True)]
        caffenet = [
            (nn.Conv2d(3, 96, 11, stride=4), 8),
            (nn.Conv2d(96, 256, 5, padding=2, groups=2), 40),
            (nn.Conv2d(256, 384, 3, padding=1), 60),
            (nn.Conv2d(384, 384, 3, padding=1, groups=2), 100),
            (nn.Conv2d(384, 256, 3, padding=1, groups=2), 200),
        ]
    assert weights(vgg) == 5_380_077
    assert sum(conv.weight.numel() for conv, _ in vgg) == 14_710_464
    assert weights(caffenet) == 466_312
    assert sum(conv.weight.numel() for conv, _ in caffenet) == 2_332_704


def test_groups_share_the_rank_evenly() -> None:
    torch.manual_seed(0)
    model = Model(nn.Conv2d(16, 24, 3, groups=2), example=(torch.randn(1, 16, 8, 8),))
    (choice,) = technique(rank=10).choose(model)
    assert choice.ranks == (10,)
    assert choice.parameters[1] == 10 * 3 * 8 + 24 * 3 * 5 + 24
    chain: Any = technique(rank=10).apply(model, Bench()).module
    assert [tuple(stage.weight.shape) for stage in chain] == [(10, 8, 3, 1), (24, 5, 1, 3)]


def test_the_other_order_is_the_optimum_of_the_other_matrix_and_the_better_may_be_asked_for() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1)
    with torch.no_grad():  # columns first needs two maps, rows first needs more
        conv.weight.copy_(torch.einsum("kcj,nki->ncij", torch.randn(2, 8, 3), torch.randn(12, 2, 3)))
    model = Model(conv, example=(torch.randn(1, 8, 6, 6),))
    orders: tuple[Any, ...] = ("vertical", "horizontal", "better")
    rows, columns, better = (
        told(technique(rank=2, order=order).apply(model, Bench()))[""]["error"] for order in orders
    )
    assert columns < 1e-4 < rows
    assert better == columns
    assert "dimension 1 first" in technique(rank=2, order="better").remarks(model)[0]
    turned = nn.Conv2d(8, 12, 3)
    turned.weight = nn.Parameter(conv.weight.detach().transpose(2, 3))
    assert split_loss(conv, 5, 1) == pytest.approx(split_loss(turned, 5, 0), rel=1e-9)


def test_rank_share_and_energy() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, stride=2, padding=1)
    model = Model(conv, example=(torch.randn(1, 16, 9, 9),))
    (choice,) = technique(share=0.3).choose(model)
    (more,) = technique(rank=choice.ranks[0] + 1).choose(model)
    assert choice.macs[1] <= 0.3 * choice.macs[0] < more.macs[1]
    # rows are halved before, columns after the first convolution
    assert choice.macs[1] == choice.ranks[0] * 3 * (16 * 5 * 9 + 24 * 5 * 5)
    values = torch.linalg.svdvals(matrices_of(conv)[0]).square()
    (held,) = technique(energy=0.6).choose(model)
    kept = [float(values[: held.ranks[0] - less].sum() / values.sum()) for less in (1, 0)]
    assert kept[0] < 0.6 <= kept[1]
    (left,) = technique(energy=1.0).choose(model)
    assert "would not save" in left.reason


def test_depthwise_kernels_are_split_and_what_has_no_space_is_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 5, groups=8), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4)
    )
    lines = technique(rank=8).remarks(Model(net, example=(torch.randn(1, 8, 8, 8),)))
    assert lines[0].startswith("0: rank 8 of 40, 208 -> 88 parameters")
    for path, reason in (("1", "one position"), ("2", "ConvTranspose2d"), ("4", "no space")):
        assert any(line.startswith(f"{path}: left as it is") and reason in line for line in lines), (path, lines)


def test_the_given_model_stays_and_both_factors_learn(small_cnn: Callable[..., Model], digits: Splits) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.module.state_dict())
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(optimizer=Adam(lr=1e-3)))
    start, tuned = (technique(epochs=epochs).apply(model, bench).module.state_dict() for epochs in (0, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    for number in range(2):
        assert not torch.equal(start[f"conv2.{number}.weight"], tuned[f"conv2.{number}.weight"])


class Plain(nn.Module):
    """Seven 3x3 convolutions on the 8x8 digits, with or without batch normalisation."""

    def __init__(self, *, normalised: bool) -> None:
        super().__init__()
        widths = (1, 16, 24, 24, 32, 32, 32, 32)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) if normalised else nn.Identity() for w in widths[1:])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            x = nn.functional.max_pool2d(x, 2) if depth in (2, 4) else x
        return self.head(x.mean((2, 3)))


def plain(*, normalised: bool, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(Plain(normalised=normalised), example=(torch.rand(2, 1, 8, 8),), task=Classification())


def test_from_scratch_normalisation_follows_the_second_convolution_once_and_none_is_between() -> None:
    scratch = technique(scratch=True, share=0.5)
    bare = scratch.apply(plain(normalised=False), Bench()).module
    added: Any = bare.get_submodule("convs.3")
    assert [type(layer) for layer in added] == [FactoredConv, nn.BatchNorm2d]
    assert [stage.bias for stage in added[0]] == [None, None]
    normed = scratch.apply(plain(normalised=True), Bench()).module
    assert type(normed.get_submodule("convs.3")) is FactoredConv
    without = technique(scratch=True, normalise=False, share=0.5).apply(plain(normalised=False), Bench()).module
    assert type(without.get_submodule("convs.3")) is FactoredConv
    assert without.get_submodule("convs.3").stages[1].bias is not None  # pyright: ignore


def test_what_is_told_from_scratch_counts_the_normalisation() -> None:
    for normalised, settings in ((False, {}), (True, {}), (False, {"normalise": False})):
        model = plain(normalised=normalised)
        step = technique(scratch=True, share=0.5, **settings)
        saved = sum(a - b for choice in step.choose(model) for a, b in [choice.parameters])
        assert step.apply(model, Bench()).parameters == model.parameters - saved


def one_way(rows_first: bool) -> nn.Conv2d:
    """Sixty-four channels, whose kernel needs four maps one way, and many the other."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    first, second = torch.randn(4, 64, 3), torch.randn(64, 4, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("kci,nkj->ncij" if rows_first else "kcj,nki->ncij", first, second))
    return conv


def test_a_budget_is_offered_what_the_second_scheme_of_paper_13_leaves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(one_way(True), nn.ReLU(), one_way(False))
    model = Model(net, example=(torch.randn(1, 64, 6, 6),))
    offered = list(LowRankRegularization().candidates(model, Bench()))
    assert [one.place for one in offered] == ["2", "2"]
    for one in offered:
        assert one.layers is not None
        (chain,) = one.layers().values()
        assert [stage.kernel_size for stage in chain.children()] == [(1, 3), (3, 1)]
        x = torch.randn(2, 64, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(chain(x), net[2](x), rtol=1e-3, atol=1e-3)
        light = one.technique.apply(model, Bench()).module
        assert type(light.get_submodule("0")) is nn.Conv2d
        assert all(torch.equal(a, b) for a, b in zip(chain.parameters(), light.get_submodule("2").parameters()))  # noqa: B905
    line = Model(nn.Conv1d(64, 64, 5), example=(torch.randn(1, 64, 9),))
    assert [one.place for one in LowRankRegularization().candidates(line, Bench())] == ["", ""]


def test_from_scratch_all_weights_are_drawn_anew_by_the_seed() -> None:
    model = plain(normalised=True)
    one, same, other = (
        technique(scratch=True, share=0.5).apply(model, Bench(seed=seed)).module.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("convs.0.weight", "convs.3.0.weight", "convs.3.1.weight", "head.weight"):
        if name in one:
            assert not torch.equal(one[name], other[name])
    assert not torch.equal(one["head.weight"], model.module.state_dict()["head.weight"])


def test_a_fresh_chain_spreads_its_outputs_as_a_fresh_convolution_does() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, bias=False)
    chain = FactoredConv(split_stages(conv, 48, 64))
    x = torch.randn(4, 64, 12, 12)
    with torch.no_grad():
        assert float(chain(x).std() / conv(x).std()) == pytest.approx(1, rel=0.1)


def test_training_without_data_is_refused_first(small_cnn: Callable[..., Model]) -> None:
    for scratch in (False, True):
        with pytest.raises(NeedError, match="training data"):
            technique(epochs=1, scratch=scratch).apply(small_cnn(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"share": 0.0}, "share"), ({"rank": 0}, "rank"), ({"energy": 1.5}, "energy"), ({"order": "both"}, "order"),
        ({"rank": 3, "energy": 0.5}, "energy"), ({"ranks": (("a", 0),)}, "ranks"), ({"epochs": -1}, "epochs"),
        ({"energy": 0.5, "scratch": True}, "scratch"), ({"learning_rate": -1.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def test_ranks_of_layers_that_are_not_there_are_told(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(SettingError, match="conv9"):
        technique(ranks=(("conv9", 2),)).apply(small_cnn(), Bench())


def trained(digits: Splits, model: Model, seed: int, epochs: int) -> tuple[Model, Bench]:
    training = Training(epochs=epochs, batch_size=32, optimizer=Adam(lr=1e-2), schedule=Cosine())
    bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
    return bench.fit(model), bench


def accuracy(bench: Bench, model: Model) -> float:
    return 100 * bench.evaluate(model, "test").value


@pytest.mark.effect
@pytest.mark.slow
def test_the_closed_form_needs_one_epoch_and_beats_random_factors(digits: Splits) -> None:
    scores: dict[str, list[float]] = {"dense": [], "tuned": [], "random": []}
    for seed in range(3):  # fine-tuned at a tenth of the training's rate, as is usual
        model, bench = trained(digits, plain(normalised=True, seed=seed), seed, epochs=8)
        step = technique(share=1 / 3, skip=("convs.0",))
        bare = step.apply(model, bench)
        assert all(entry["macs"][0] >= 3 * entry["macs"][1] for entry in told(bare).values())
        drawn = bare.copy()
        for layer in drawn.module.modules():
            if isinstance(layer, FactoredConv):
                layer.reset_parameters()
        scores["dense"].append(accuracy(bench, model))
        scores["tuned"].append(accuracy(bench, fine_tune(bare, bench, 1, 1e-3, "fine-tune")))
        scores["random"].append(accuracy(bench, fine_tune(drawn, bench, 1, 1e-3, "fine-tune")))
    assert mean(scores["tuned"]) >= mean(scores["dense"]) - 1, scores
    assert mean(scores["random"]) < mean(scores["tuned"]) - 1, scores


@pytest.mark.effect
@pytest.mark.slow
def test_cp_that_is_fitted_well_is_closer_to_trained_kernels_at_equal_cost(digits: Splits) -> None:
    """Against what is said of it: the closed form is the best of its shape, yet greedy CP alone is as far off."""
    model, bench = trained(digits, plain(normalised=True), 0, epochs=8)
    ratios: dict[str, list[float]] = {"nls": [], "greedy": []}
    for path, entry in told(technique(share=1 / 3, skip=("convs.0",)).apply(model, bench)).items():
        conv: Any = model.module.get_submodule(path)
        unit = chain_cost(axis_stages(conv, 1), (8, 8))[0] / conv.weight.numel()
        rank = round(entry["macs"][1] / entry["macs"][0] / unit)
        for solver, found in ratios.items():
            error = cp(conv.weight.detach(), rank, solver=solver, restarts=0, sweeps=50, iterations=10).error  # pyright: ignore
            found.append(entry["error"] / error)
    assert min(ratios["nls"]) > 1, ratios
    assert mean(ratios["greedy"]) < mean(ratios["nls"]) - 0.05, ratios


@pytest.mark.effect
@pytest.mark.slow
def test_from_scratch_the_factored_network_reaches_the_dense_one_and_needs_normalisation(digits: Splits) -> None:
    scores: dict[str, list[float]] = {"dense": [], "factored": [], "without": []}
    for seed in range(3):
        dense, bench = trained(digits, plain(normalised=True, seed=seed), seed, epochs=8)
        bare = plain(normalised=False, seed=seed)
        settings: dict[str, Any] = {"scratch": True, "share": 0.5, "skip": ("convs.0",), "epochs": 8}
        assert sum(choice.replaced for choice in technique(**settings).choose(bare)) >= 6
        scores["dense"].append(accuracy(bench, dense))
        scores["factored"].append(accuracy(bench, technique(**settings).apply(bare, bench)))
        scores["without"].append(accuracy(bench, technique(**settings, normalise=False).apply(bare, bench)))
    assert mean(scores["factored"]) >= mean(scores["dense"]) - 0.7, scores
    assert mean(scores["without"]) < mean(scores["factored"]) - 1, scores
