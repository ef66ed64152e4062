"""What the clock cannot tell apart is neither a saving nor a cost; what is slower beyond that is struck off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.measuring import OnnxRuntime, onnx_form, time_ratio
from karui.model import Model, coupled_groups
from karui.recipes.budget import cells, recorder, timing
from karui.recipes.budget.blocks import Block, blocks_of, structure
from karui.recipes.budget.cache import Measured, TimingCache, added, typical
from karui.recipes.budget.cells import Cells
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.recorder import ROUNDS, Network, Rounds, Timed, head_to_head, recorded
from karui.recipes.budget.tables import EXPECTED, Coster
from karui.recipes.budget.timing import Stopwatch
from karui.sparsify import L1Filters
from karui.technique import Candidate


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    return Model(net.eval(), example=(torch.zeros(2, 8, 16, 16),))


def test_noise_is_no_difference():
    assert Measured(-1.0, 0.6).settled == 0.0
    assert Measured(-1.0, 0.4).settled == -1.0
    assert added([Measured(1.0, 3.0), Measured(1.0, 4.0)]) == Measured(2.0, 5.0)


def test_the_error_of_a_median_is_that_of_repeated_ones():
    draw = np.random.default_rng(0)
    found = [typical(1 + 0.1 * draw.standard_normal(51)) for _ in range(400)]
    assert np.median([each.error for each in found]) == pytest.approx(np.std([each.value for each in found]), rel=0.15)


def test_a_cache_that_cannot_be_kept_is_told_before_anything_is_measured(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be kept in .*under: .*KARUI_CACHE"):
        TimingCache.of_this_machine(tmp_path / "file" / "under")


def test_blocks_are_recorded_in_rounds(model: Model):
    blocks = {path: made[0] for path, made in blocks_of(model, 1).blocks.items()}
    found, calls = recorded(blocks, threads=1, calls={"0": lambda: sum(range(99_999))})
    assert set(found) == {"0", "2", "6"}
    rows = [row for each in found.values() for row in each.values()]
    assert all(row.shape == (ROUNDS,) and row.min() >= 0 for row in rows)
    assert sum(found["2"].values()).min() > 0
    assert calls["0"].shape == (ROUNDS,)
    assert calls["0"].min() > 0


def test_the_layers_of_a_network_are_found_in_it(model: Model):
    """Whatever the engine calls them: they take nearly all of it, and the large convolution most."""
    blocks = {path: made[0] for path, made in blocks_of(model, 1).blocks.items()}
    shares = Stopwatch(cache=TimingCache()).shares(model, onnx_form(model), list(blocks.values()))
    assert all(share.value > 0 for share in shares)
    assert 0.5 < added(shares).value < 1
    assert max(zip(shares, blocks, strict=True), key=lambda each: each[0].value)[1] == "2"


@pytest.mark.parametrize("known", [{"0", "6"}, set()])
def test_a_layer_that_goes_by_another_name_is_timed_by_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch, known: set[str]
):
    """It takes its part of what the largest of the others takes; where none is known, all together are the network."""
    machine = Noisy(0, 0.0)
    blocks = [block for found in blocks_of(model, 1).blocks.values() for block in found]
    within = {block.nodes[0].name: np.full(ROUNDS, 2 * machine.true(block)) for block in blocks if block.layer in known}
    rest = np.full(ROUNDS, 4e-4) - sum(within.values())
    monkeypatch.setattr(timing, "profiled", machine.profiled)
    monkeypatch.setattr(timing, "network", lambda *_: Network({"other": rest, **within}, np.zeros(ROUNDS)))
    shares = Stopwatch(cache=TimingCache()).shares(model, onnx_form(model), blocks)
    whole = 2e-4 if known else sum(machine.true(block) for block in blocks)
    assert [share.value for share in shares] == pytest.approx([machine.true(block) / whole for block in blocks])


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("node_Conv_38_token_1", "node_Conv_38"),
        ("fused node_linear", "node_linear"),
        ("relu_1_nchwc", "relu_1"),
        ("node_MatMul_75/MatMulScaleFusion/", "node_MatMul_75"),
        ("node_Gemm_9_MatMul_quant", "node_Gemm_9"),
        ("node_linear_1", "node_linear_1"),
    ],
)
def test_names_of_an_engine_are_those_of_the_graph(told: str, name: str, monkeypatch: pytest.MonkeyPatch):
    rows = {"network": {("Conv", told): np.full(ROUNDS, 3e-6), ("Add", "other"): np.full(ROUNDS, 2e-6)}}
    monkeypatch.setattr(recorder, "_beside_chain", lambda *_: (rows, 1e-6, np.full(ROUNDS, 1e-6)))
    share = recorder.network(recorder._Chain(1), 1).share({name})
    assert share is not None
    assert share.value == pytest.approx(0.5)


def test_head_to_head_tells_twice_the_work_and_not_a_block_from_itself(model: Model):
    """As the machine is; a busy one makes the error larger, and what is judged is the difference over the error."""
    block = blocks_of(model, 1).blocks["2"][0]
    large = blocks_of(Model(nn.Conv2d(32, 128, 3, padding=1), example=(torch.zeros(2, 32, 32, 32),)), 1).blocks[""][0]
    same, more = head_to_head(block, block, 1), head_to_head(large, block, 1)
    assert abs(same.value - 1) < max(5 * same.error, 0.2)
    assert more.value - 1 > 2 * more.error


def test_what_the_recorder_takes_itself_is_no_time_of_a_block(monkeypatch: pytest.MonkeyPatch):
    """It says 5 and 8 microseconds of operators that take 3 and 6, as it says 3 of those of the chain that take 1."""
    long, short, linked = recorder.LONG, recorder.SHORT, np.full(ROUNDS, 3e-6)

    def told(blocks: Mapping[str, Timed], _: int, calls: Mapping[str, Any]) -> Any:
        of = {("Conv", "one"): 5e-6, ("Relu", "two"): 8e-6, ("Transpose", "layout"): 9e-6}
        rows: dict[str, Any] = {name: {each: np.full(ROUNDS, of[each]) for each in of} for name in blocks}
        rows[long] = {("Sigmoid", f"s{k}"): linked for k in range(recorder.CHAIN + 1)}
        unrecorded = {long: 4e-6 + 1e-6 * recorder.CHAIN, short: 4e-6}
        return rows, {name: np.full(ROUNDS, unrecorded[name]) for name in calls}

    def taken() -> tuple[np.ndarray, Network]:
        some = recorder._Chain(2)
        return recorder.profiled({"block": some}, 1)["block"].seconds, recorder.network(some, 1)

    monkeypatch.setattr(recorder, "recorded", told)
    block, whole = taken()
    assert block == pytest.approx(9e-6), "without the change of layout, which a network has to pay"
    assert {name: each[0] for name, each in whole.operators.items()} == pytest.approx(
        {"one": 3e-6, "two": 6e-6, "layout": 7e-6}
    )
    assert whole.rest == pytest.approx(4e-6)
    linked *= 3
    assert taken()[0] == pytest.approx(2 * recorder.LEAST)


def test_something_is_taken_off_of_tiny_operators(monkeypatch: pytest.MonkeyPatch):
    real, told = recorder.recorded, []
    monkeypatch.setattr(recorder, "recorded", lambda *given: told.append(real(*given)) or told[-1])
    net = recorder.profiled({"chain": recorder._Chain(21)}, 1)["chain"].seconds
    [(rows, _)] = told
    assert 0 < np.median(net) < np.median(sum(rows["chain"].values()))


@pytest.mark.parametrize("busy", [0.3, 3.0])
def test_what_slows_all_for_a_while_drops_out(busy: float):
    slow = np.where(np.arange(ROUNDS) < ROUNDS // 2, busy, 1.0)
    ratio = Rounds(2e-5 * slow, 1).beside(Rounds(5e-5 * slow, 2))
    assert ratio.value == pytest.approx(0.4)
    assert 0 < ratio.error < 0.02


class Noisy:
    """A machine on which a block takes a time by its bytes, and lots of blocks are measured badly."""

    def __init__(self, seed: int, noise: float) -> None:
        self.draw, self.noise, self.faced = np.random.default_rng(seed), noise, 0

    @staticmethod
    def true(block: Block) -> float:
        return 1e-6 + 1e-9 * block.bytes + (5e-6 if len(block.nodes) > 2 else 0)

    def noisy(self, value: float, noise: float) -> Measured:
        return Measured(value * (1 + noise * self.draw.standard_normal()), noise * value)

    def profiled(self, blocks: Mapping[str, Block], threads: int) -> dict[str, Rounds]:
        del threads
        rounds = self.noise * self.draw.standard_normal((len(blocks), ROUNDS))
        noisy = zip(blocks.items(), np.maximum(1 + rounds, 0.1), strict=True)
        return {name: Rounds(self.true(block) * each) for (name, block), each in noisy}

    def head_to_head(self, new: Block, old: Block, threads: int, company: Mapping[str, Block]) -> Measured:
        del threads, company
        self.faced += 1
        return self.noisy(self.true(new) / self.true(old), 0.002)


def cut(units: int) -> Candidate:
    return Candidate(technique=L1Filters(), place="0", text=f"{units} fewer", cut={"0": torch.arange(units)})


def swapped(make: Callable[[], nn.Module], text: str) -> Candidate:
    return Candidate(technique=L1Filters(), place="2", text=text, layers=lambda: {"2": make()})


def chain(rank: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(32, rank, 1, bias=False), nn.Conv2d(rank, 32, 3, padding=1))


@pytest.mark.parametrize("noise", [0.001, 0.2])
def test_slower_is_decided_beyond_the_noise(model: Model, monkeypatch: pytest.MonkeyPatch, noise: float):
    """Whatever the machine does meanwhile: what is clearly faster stays, what is truly slower goes."""
    analysis, faced = coupled_groups(model), 0
    same = swapped(lambda: nn.Conv2d(32, 32, 3, padding=1), "the same once more")
    offers = [cut(2), cut(16), same, swapped(chain(8), "faster"), swapped(chain(31), "slower")]
    for seed in range(8):
        machine = Noisy(seed, noise)
        monkeypatch.setattr(timing, "profiled", machine.profiled)
        monkeypatch.setattr(timing, "head_to_head", machine.head_to_head)
        costs = Coster(Cells(model, analysis, Stopwatch(cache=TimingCache()), seconds=1e-4)).alone(offers)
        slower = {offer.text for offer, cost in zip(offers, costs, strict=True) if cost.slower}
        assert "slower" in slower
        assert not slower & {"2 fewer", "16 fewer", "faster"}
        faced += machine.faced
    assert noise < 0.1 or faced, "nothing was in doubt, and nothing was looked at again"


@pytest.mark.parametrize(("lanes", "noise"), [(8, 0.0), (16, 0.0), (1, 0.0), (8, 0.02), (16, 0.02)])
def test_the_widths_that_the_engine_rewards_are_found_through_noise(
    monkeypatch: pytest.MonkeyPatch, lanes: int, noise: float
):
    """An engine that works on so many channels at once."""
    for seed in range(8):
        machine = Noisy(seed, noise)

        monkeypatch.setattr(machine, "true", lambda block: 1e-6 * -(-max(map(len, block.weights.values())) // lanes))
        monkeypatch.setattr(timing, "profiled", machine.profiled)
        assert Stopwatch(cache=TimingCache()).multiple() == lanes


def test_seconds_of_the_menu_hold_no_noise(model: Model, monkeypatch: pytest.MonkeyPatch):
    """On a machine that tells nothing apart, no setting saves or costs time; bytes are what they are."""
    machine, noise = Noisy(0, 2.0), [1e-2, 1.0, 1e2]

    def profiled(blocks: Mapping[str, Block], threads: int) -> dict[str, Rounds]:
        del threads
        return {
            name: Rounds(machine.true(block) * np.resize(np.roll(noise, k), ROUNDS))
            for k, (name, block) in enumerate(blocks.items())
        }

    monkeypatch.setattr(timing, "profiled", profiled)
    monkeypatch.setattr(timing, "head_to_head", lambda *_: machine.noisy(1.0, 2.0))
    coster = Coster(Cells(model, coupled_groups(model), Stopwatch(cache=TimingCache()), seconds=1e-4))
    offers = [cut(2), cut(16)]
    coster.alone(offers)
    [first, second] = coster.tables({"units of 0": offers})
    assert np.count_nonzero(first.amounts["time"]) == np.count_nonzero(second.amounts["time"]) == 0
    assert (first.amounts["bytes"][1:] < 0).all()


def test_a_setting_saves_its_share_of_what_its_layer_takes_in_the_network(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    """A layer by itself may take less than within, where the caches hold what others left."""
    machine = Noisy(0, 0.0)
    blocks = {path: made[0] for path, made in blocks_of(model, 1).blocks.items()}
    within = {block.nodes[0].name: np.full(ROUNDS, 0.1 * (1 + k)) for k, block in enumerate(blocks.values())}
    monkeypatch.setattr(timing, "profiled", machine.profiled)
    monkeypatch.setattr(timing, "network", lambda *_: Network({**within, "other": np.full(ROUNDS, 0.4)}, np.zeros(1)))
    monkeypatch.setattr(timing, "head_to_head", machine.head_to_head)
    coster = Coster(Cells(model, coupled_groups(model), Stopwatch(cache=TimingCache()), seconds=2.0))
    offer = swapped(chain(8), "rank 8")
    [cost] = coster.alone([offer])
    [table] = coster.tables({"layer 2": [offer]})
    rank8 = 1e-6 + 4e-9 * (8 * 32 + 32 * 8 * 9 + 32) + 5e-6
    assert cost.seconds.value == pytest.approx((rank8 / machine.true(blocks["2"]) - 1) * 2.0 * 0.2)
    assert table.amounts[EXPECTED][-1] == pytest.approx(cost.seconds.value)


def test_layers_are_timed_in_company_and_equal_ones_are_made_once(model: Model, monkeypatch: pytest.MonkeyPatch):
    """Pairs alone have their weights in a near cache, which they have not within a network."""
    machine, lots, made = Noisy(0, 0.0), [], []

    def profiled(blocks: Mapping[str, Block], threads: int) -> dict[str, Rounds]:
        lots.append(set(blocks))
        return machine.profiled(blocks, threads)

    def exported(*given: Any) -> Block:
        made.append(given)
        return real(*given)

    real = cells.exchanged
    monkeypatch.setattr(cells, "exchanged", exported)
    monkeypatch.setattr(timing, "profiled", profiled)
    within = {node.name: np.full(ROUNDS, 1.0) for b in blocks_of(model, 1).blocks.values() for node in b[0].nodes}
    monkeypatch.setattr(timing, "network", lambda *_: Network(within, np.zeros(ROUNDS)))
    monkeypatch.setattr(timing, "head_to_head", machine.head_to_head)
    offers = [swapped(chain(8), "once"), swapped(chain(8), "twice")]
    coster = Coster(Cells(model, coupled_groups(model), Stopwatch(cache=TimingCache()), seconds=1.0))
    one, two = coster.alone(offers)
    assert len(made) == 1
    assert one.seconds == two.seconds
    company = {block.key for blocks in coster.cells.graph.blocks.values() for block in blocks}
    assert all(company <= lot for lot in lots)
    assert [len(lot) for lot in lots] == [len(company) + 1]


@pytest.mark.parametrize("error", [0.0, 0.03, 9.0])
def test_a_limit_is_kept_by_what_is_measured_and_noise_buys_nothing(error: float):
    def point(time: float, size: float = 0.3) -> Point:
        return Point(number=1, forms=(Form(name="", told="", time=time, bytes=size, error=error),))

    assert point(1.04).beyond({"time": 0.95}) == ["time"]
    assert point(0.67).beyond({"time": 0.6}) == ["time"]
    assert point(0.55).beyond({"time": 0.5, "bytes": 0.2}) == ["time", "bytes"]
    assert point(0.505).beyond({"time": 0.5, "bytes": 0.3}) == [], "what the best clock cannot tell apart"
    assert point(0.4, 0.3001).beyond({"time": 0.5, "bytes": 0.3}) == ["bytes"]


def test_within_the_error_above_a_limit_is_unsure():
    def unsure(time: float, error: float) -> bool:
        form = Form(name="", told="", time=time, bytes=0.3, error=error)
        return Point(number=1, forms=(form,)).unsure({"time": 0.6, "bytes": 0.5})

    assert unsure(0.64, 0.028)
    assert not unsure(0.64, 0.01)
    assert not unsure(0.59, 0.028), "it is met"


def test_a_network_raced_against_itself_takes_exactly_its_time():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    dense, other = (Model(each, example=(torch.zeros(1, 8),)) for each in (net, nn.Linear(8, 4).eval()))
    files = {"itself": (OnnxRuntime(), onnx_form(dense)), "other": (OnnxRuntime(), onnx_form(other))}
    times = Stopwatch(cache=TimingCache()).side_by_side(dense, onnx_form(dense), files)
    ratio = time_ratio(*times["itself"])
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert times["other"][0].samples != times["other"][1].samples


def test_a_network_on_larger_pictures_has_a_time_of_its_own(cache: Path):
    """The operators are the same, and so is the file but for the sizes of its inputs."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    watch = Stopwatch(cache=TimingCache.of_this_machine(cache / "sizes"))
    before = len(watch.cache.found)
    for size in (8, 32):
        model = Model(net.eval(), example=(torch.zeros(1, 3, size, size),))
        watch.whole(model, onnx_form(model))
    whole = [key for key in watch.cache.found if key.startswith(structure(onnx_form(model).data))]
    assert len(whole) == 2
    assert len(watch.cache.found) > before
