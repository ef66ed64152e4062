"""Blocks in 8 bits: integers go in and come out, shapes are the block's, and the cache keeps precisions apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from karui.measuring.engines import onnx_session
from karui.model import Model
from karui.recipes.budget import timing
from karui.recipes.budget.blocks import Block, blocks_of
from karui.recipes.budget.cache import TimingCache
from karui.recipes.budget.narrow import Narrow, narrowed
from karui.recipes.budget.recorder import ROUNDS, Rounds, Timed
from karui.recipes.budget.timing import Stopwatch


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.inner(x)).mean((2, 3)))


@pytest.fixture
def blocks() -> Mapping[str, tuple[Block, ...]]:
    torch.manual_seed(0)
    return blocks_of(Model(Residual().eval(), example=(torch.randn(2, 3, 8, 8),)), batch=2).blocks


def test_a_block_takes_and_gives_integers(blocks: Mapping[str, tuple[Block, ...]]):
    """Nothing is narrowed or widened within the block, also where its input is read twice."""
    for path, inputs in (("stem", 1), ("inner", 1), ("head", 1)):
        [block] = blocks[path]
        made = narrowed(block)
        assert isinstance(made, Narrow)
        graph = onnx.load_model_from_string(made.data()).graph
        kinds = [put.type.tensor_type.elem_type for put in (*graph.input, *graph.output)]
        assert kinds == [onnx.TensorProto.UINT8] * (inputs + 1), path
        [given] = onnx_session(made.data(), 1).run(None, made.feed())
        [plain] = onnx_session(block.data(), 1).run(None, block.feed())
        assert given.shape == plain.shape


def test_what_has_no_integer_form_is_timed_as_it_is(blocks: Mapping[str, tuple[Block, ...]]):
    [block] = blocks["stem"]
    damaged = replace(block, weights={name: array * float("nan") for name, array in block.weights.items()})
    assert narrowed(damaged) is damaged


def test_times_in_both_precisions_are_kept_apart(
    blocks: Mapping[str, tuple[Block, ...]], monkeypatch: pytest.MonkeyPatch
):
    """A block in 8 bits takes half as long as another where one in 32 takes a quarter."""

    def profiled(found: Mapping[str, Timed], threads: int) -> dict[str, Rounds]:
        del threads
        narrow = [isinstance(each, Narrow) for each in found.values()]
        taken = [1e-6 * (2 if all(narrow) else 4) ** place for place in range(len(found))]
        return {name: Rounds(np.full(ROUNDS, each)) for name, each in zip(found, reversed(taken), strict=True)}

    monkeypatch.setattr(timing, "profiled", profiled)
    watch = Stopwatch(cache=TimingCache())
    new, old = blocks["head"][0], blocks["inner"][0]
    for _ in range(2):
        for each, expected in ((replace(watch, narrow=True), 2), (watch, 4)):
            each.measure([("head", new, old)])
            assert each.change("head", old).value == expected


@pytest.mark.usefixtures("steady")
def test_steady_times_cover_both_precisions(blocks: Mapping[str, tuple[Block, ...]]):
    """Whoever tests a budget with 8 bits on has the same menu everywhere."""
    watch = Stopwatch(cache=TimingCache())
    new, old = blocks["head"][0], blocks["inner"][0]
    found = []
    for each in (replace(watch, narrow=True), watch):
        each.measure([("head", new, old)])
        found.append(each.change("head", old).value)
    assert 0 < found[0] != found[1]
