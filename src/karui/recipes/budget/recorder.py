"""Blocks run in turns, each in a session of its own, with the engine's own recorder on.

The recorder tells the time of the operator without the changes of layout around it, which a layer inside a network does
not pay. It counts whole microseconds on the wall, so short blocks are called more often, and calls that were
interrupted by something else on the machine are cut down to what the block usually takes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from karui.measuring.engines import onnx_session
from karui.recipes.budget.cache import Measured, typical

ROUNDS = 9
"""Rounds that are counted; one before them is not."""
CALLS, ROUND = (4, 16), 200e-6
"""Least and most calls of a block in a round, and the seconds that they should last."""
RECORDER = 0.3e-6
"""Standard error of one operator's time: the recorder cuts off what is below a microsecond."""
INTERRUPTED = 1.5
"""A call that takes more than this times the usual was interrupted."""
LEAST = 0.1e-6
"""The least that an operator is said to take, in seconds: what is taken off is an average."""
CHAIN, SIZES, CHAINS = 20, (256, 1024, 4096), 15
"""Operators of a chain that tells the recorder's own time, numbers that each works on, and how often it is run."""
LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")


class Timed(Protocol):
    """What can be timed: a file and what to feed it."""

    def data(self) -> bytes:
        """The bytes of an ONNX file."""
        ...

    def feed(self) -> dict[str, np.ndarray]:
        """Its inputs by name."""
        ...


def recorded(blocks: Mapping[str, Timed], threads: int) -> dict[str, np.ndarray]:
    """Seconds of each block, without changes of layout: `[operators, ROUNDS]`, the rounds of all blocks in turns."""
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        prefix = Path(folder)
        sessions = {
            name: onnx_session(block.data(), threads, profile=str(prefix / str(number)))
            for number, (name, block) in enumerate(blocks.items())
        }
        feeds = {name: block.feed() for name, block in blocks.items()}
        calls = {name: _calls(lambda n=name: sessions[n].run(None, feeds[n])) for name in sessions}
        for number in range(ROUNDS):
            for name in sessions if number % 2 == 0 else reversed(sessions):
                for _ in range(calls[name]):
                    sessions[name].run(None, feeds[name])
        return {name: _read(session.end_profiling(), calls[name]) for name, session in sessions.items()}


def _calls(run: Callable[[], Any]) -> int:
    """How often a block is called in a round; it has been called a few times then."""
    run()
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(max(math.ceil(ROUND / max(min(taken), 1e-7)), CALLS[0]), CALLS[1])


def _read(file: str, calls: int) -> np.ndarray:
    """The mean of each round's calls, operator by operator, from a record of all calls."""
    events = json.loads(Path(file).read_text(encoding="utf-8"))
    taken: dict[str, list[float]] = {}
    for event in events:
        kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if kernel and event["args"].get("op_name") not in LAYOUT:
            taken.setdefault(event["name"], []).append(event["dur"] * 1e-6)
    rows = [_rounds(np.array(durations), calls) for durations in taken.values()]
    return np.array(rows) if rows else np.zeros((1, ROUNDS))


def _rounds(durations: np.ndarray, calls: int) -> np.ndarray:
    counted = durations[-ROUNDS * calls :].reshape(ROUNDS, calls)
    usual = np.median(counted)
    return np.minimum(counted, INTERRUPTED * usual + RECORDER).mean(axis=1)


@dataclass(frozen=True)
class _Chain:
    """Tiny operators one after the other; each works on so many numbers."""

    operators: int
    numbers: int

    def data(self) -> bytes:
        """The bytes of an ONNX file."""
        from onnx import TensorProto, helper

        nodes = [helper.make_node("Sigmoid", [f"x{k}"], [f"x{k + 1}"], name=f"s{k}") for k in range(self.operators)]
        puts = [
            helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, [1, self.numbers]) for k in (0, self.operators)
        ]
        graph = helper.make_graph(nodes, "chain", puts[:1], puts[1:])
        opset = helper.make_opsetid("", 18)
        return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()

    def feed(self) -> dict[str, np.ndarray]:
        """Its input by name."""
        return {"x0": np.zeros((1, self.numbers), np.float32)}


@cache
def own_time(threads: int) -> float:
    """Seconds that the recorder adds to each operator; measured once in a process.

    It is what it says of the operators of a chain, less what they add to a call of which nothing is recorded.
    """
    return max(float(np.median([_own_time(_Chain(CHAIN, numbers), threads) for numbers in SIZES])), 0.0)


def _own_time(chain: _Chain, threads: int) -> float:
    seconds = []
    for operators in (1, 1 + chain.operators):
        each = _Chain(operators, chain.numbers)
        session, feed = onnx_session(each.data(), threads), each.feed()
        seconds.append(_shortest(lambda run=session.run, feed=feed: run(None, feed)))
    told = recorded({"chain": chain}, threads)["chain"]
    return float(np.median(told.mean(axis=0))) - (seconds[1] - seconds[0]) / chain.operators


def _shortest(run: Callable[[], Any]) -> float:
    """Seconds of a call that nothing interrupted."""
    taken = []
    for _ in range(CHAINS * CALLS[1]):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.quantile(taken, 0.25))


def _sums(rows: np.ndarray, threads: int) -> np.ndarray:
    """Seconds of a block in each round: of all its operators, without the recorder's own time."""
    return np.maximum(rows - own_time(threads), LEAST).sum(axis=0)


def profiled(blocks: Mapping[str, Timed], threads: int) -> dict[str, Measured]:
    """The time of each block."""
    found = recorded(blocks, threads)
    return {name: typical(_sums(rows, threads), RECORDER * math.sqrt(len(rows))) for name, rows in found.items()}


SITTINGS, CLOSE = (3, 6), 0.02
"""Least and most sittings of two that are timed head to head, and the uncertainty that is good enough, as a share."""


def head_to_head(new: Timed, old: Timed, threads: int) -> Measured:
    """The time of a block as a share of another's: their rounds in pairs, in sessions that are made anew a few times.

    It ends where the two are told apart, or are as good as equal.
    """
    ratios: list[np.ndarray] = []
    found = Measured(1.0)
    for sitting in range(SITTINGS[1]):
        both = recorded({"new": new, "old": old} if sitting % 2 == 0 else {"old": old, "new": new}, threads)
        before = _sums(both["old"], threads)
        ratios.append(_sums(both["new"], threads) / before)
        if sitting + 1 < SITTINGS[0]:
            continue
        found = _across(ratios, RECORDER * math.sqrt(len(both["new"]) + len(both["old"])) / before.min())
        if Measured(found.value - 1, found.error).clear or found.error < CLOSE / 2:
            break
    return found


def _across(ratios: list[np.ndarray], floor: float) -> Measured:
    """The median, and the larger of two errors: that of all rounds, and what one sitting differs by from another."""
    within = typical(np.concatenate(ratios), floor)
    apart = float(np.std([np.median(each) for each in ratios], ddof=1)) / math.sqrt(len(ratios))
    return Measured(within.value, max(within.error, apart))
