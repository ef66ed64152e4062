"""What the clock cannot tell apart is neither a saving nor a cost; what is slower beyond that is struck off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.measuring import OnnxRuntime, onnx_form, time_ratio
from karui.model import Model, coupled_groups
from karui.recipes.budget import recorder, timing
from karui.recipes.budget.blocks import Block, blocks_of, structure
from karui.recipes.budget.cache import Measured, TimingCache, added, less, typical
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.recorder import ROUNDS, head_to_head, recorded
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
    assert less(Measured(3.0, 0.3), Measured(1.0, 0.4)) == Measured(2.0, 0.5)
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
    found = recorded(blocks, threads=1)
    assert set(found) == {"0", "2", "6"}
    assert all(rows.shape[1] == ROUNDS for rows in found.values())
    assert found["2"].sum(axis=0).min() > 0


def test_head_to_head_tells_twice_the_work_and_not_a_block_from_itself(model: Model):
    """As the machine is; a busy one makes the error larger, and what is judged is the difference over the error."""
    block = blocks_of(model, 1).blocks["2"][0]
    large = blocks_of(Model(nn.Conv2d(32, 128, 3, padding=1), example=(torch.zeros(2, 32, 32, 32),)), 1).blocks[""][0]
    same, more = head_to_head(block, block, 1), head_to_head(large, block, 1)
    assert abs(same.value - 1) < max(5 * same.error, 0.2)
    assert more.value - 1 > 2 * more.error


def test_what_the_recorder_takes_itself_is_no_time_of_a_block(monkeypatch: pytest.MonkeyPatch):
    """A chain of tiny operators is hardly more than that; the difference of two lengths of it, unrecorded, is none."""
    chain = recorder._Chain(20, 256)
    told = np.median(recorded({"chain": chain}, 1)["chain"].sum(axis=0))
    net = recorder.profiled({"chain": chain}, 1)["chain"].value
    assert 0 < net <= told
    rows = np.full((3, ROUNDS), 5e-6)
    monkeypatch.setattr(recorder, "recorded", lambda blocks, _: dict.fromkeys(blocks, rows))
    monkeypatch.setattr(recorder, "own_time", lambda _: 2e-6)
    assert recorder.profiled({"block": chain}, 1)["block"].value == pytest.approx(9e-6)
    monkeypatch.setattr(recorder, "own_time", lambda _: 6e-6)
    assert recorder.profiled({"block": chain}, 1)["block"].value == pytest.approx(3 * recorder.LEAST)


class Noisy:
    """A machine on which a block takes a time by its bytes, and lots of blocks are measured badly."""

    def __init__(self, seed: int, noise: float) -> None:
        self.draw, self.noise, self.faced = np.random.default_rng(seed), noise, 0

    @staticmethod
    def true(block: Block) -> float:
        return 1e-6 + 1e-9 * block.bytes + (5e-6 if len(block.nodes) > 2 else 0)

    def noisy(self, value: float, noise: float) -> Measured:
        return Measured(value * (1 + noise * self.draw.standard_normal()), noise * value)

    def profiled(self, blocks: Mapping[str, Block], threads: int) -> dict[str, Measured]:
        del threads
        return {name: self.noisy(self.true(block), self.noise) for name, block in blocks.items()}

    def head_to_head(self, new: Block, old: Block, threads: int) -> Measured:
        del threads
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
        costs = Coster(model, analysis, Stopwatch(cache=TimingCache())).alone(offers)
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

        def profiled(blocks: Mapping[str, Block], threads: int, machine: Noisy = machine) -> dict[str, Measured]:
            del threads
            widths = {name: max(len(array) for array in block.weights.values()) for name, block in blocks.items()}
            return {name: machine.noisy(1e-6 * -(-width // lanes), machine.noise) for name, width in widths.items()}

        monkeypatch.setattr(timing, "profiled", profiled)
        assert Stopwatch(cache=TimingCache()).multiple() == lanes


def test_seconds_of_the_menu_hold_no_noise(model: Model, monkeypatch: pytest.MonkeyPatch):
    """On a machine that tells nothing apart, no setting saves or costs time; bytes are what they are."""
    machine = Noisy(0, 2.0)
    monkeypatch.setattr(timing, "profiled", machine.profiled)
    monkeypatch.setattr(timing, "head_to_head", lambda *_: machine.noisy(1.0, 2.0))
    coster = Coster(model, coupled_groups(model), Stopwatch(cache=TimingCache()))
    offers = [cut(2), cut(16)]
    coster.alone(offers)
    [first, second] = coster.tables({"units of 0": offers})
    assert np.count_nonzero(first.amounts["time"]) == np.count_nonzero(second.amounts["time"]) == 0
    assert (first.amounts["bytes"][1:] < 0).all()


@pytest.mark.parametrize("busy", [1.0, 1.6])
def test_layers_take_no_longer_together_than_their_network(model: Model, monkeypatch: pytest.MonkeyPatch, busy: float):
    """Where a busy machine makes layers slower than the network, a setting saves its share of the network's time."""
    machine = Noisy(0, 0.0)
    monkeypatch.setattr(timing, "profiled", machine.profiled)
    monkeypatch.setattr(timing, "head_to_head", machine.head_to_head)
    watch = Stopwatch(cache=TimingCache())
    every = [block for blocks in blocks_of(model, 1).blocks.values() for block in blocks]
    alone = sum(each.value for each in watch.blocks(every))
    offers, found = [cut(16), swapped(chain(8), "rank 8")], []
    for seconds in (None, alone / busy):
        coster = Coster(model, coupled_groups(model), watch, seconds)
        singles = [cost.seconds.value for cost in coster.alone(offers)]
        tables = coster.tables({"units of 0": offers[:1]})
        found.append([*singles, *(table.amounts[EXPECTED][-1] for table in tables)])
    assert max(found[0]) < 0
    assert np.allclose(np.array(found[0]) / busy, found[1])


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
