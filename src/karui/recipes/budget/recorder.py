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
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from karui.measuring.engines import onnx_session
from karui.measuring.filed import File
from karui.measuring.layers import KERNEL, graph_name
from karui.recipes.budget.cache import Measured, typical

ROUNDS = 9
"""Rounds of calls; the first call of each is not counted."""
CALLS, ROUND = (4, 16), 200e-6
"""Least and most calls of a block in a round, and the seconds that they should last."""
RECORDER = 0.3e-6
"""Standard error of one operator's time: the recorder cuts off what is below a microsecond."""
TRIED = 3
"""Calls that tell how many a round needs."""
INTERRUPTED = 1.5
"""A call that takes more than this times the usual was interrupted."""
LEAST = 0.1e-6
"""The least that an operator is said to take, in seconds: what is taken off is an average."""
CHAIN, LONG, SHORT = 20, "chain of the recorder", "link of the chain"
"""Operators of a chain that tells the recorder's own time, beside a single one; and what the two are called."""
NETWORK = "network"
LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")
"""Operators that only a layer by itself pays for."""


class Timed(Protocol):
    """What can be timed: a file and what to feed it."""

    def data(self) -> bytes | File:
        """An ONNX file or its bytes."""
        ...

    def feed(self) -> dict[str, np.ndarray]:
        """Its inputs by name."""
        ...


@dataclass(frozen=True, eq=False)
class Rounds:
    """Seconds of one block.

    Settings:
        seconds: in each round, `[ROUNDS]`.
        operators: how many the recorder told of; each may be off by `RECORDER`.
    """

    seconds: np.ndarray
    operators: int = 0

    @property
    def unsure(self) -> float:
        """Standard error that more rounds do not lessen, in seconds."""
        return RECORDER * math.sqrt(self.operators)

    def beside(self, other: Rounds) -> Measured:
        """As a share of another, round by round: what slows the machine for a while slows both."""
        floor = math.hypot(self.unsure, other.unsure) / float(np.median(other.seconds))
        return typical(self.seconds / other.seconds, floor)


Rows = dict[tuple[str, str], np.ndarray]
"""Seconds of each operator in each round, `[ROUNDS]`, by its kind and name."""


def recorded(
    files: Mapping[str, Timed], threads: int, calls: Mapping[str, Callable[[], Any]] | None = None
) -> tuple[dict[str, Rows], dict[str, np.ndarray]]:
    """Files and calls run in turns.

    Args:
        files: each gets a session whose operators are recorded.
        threads: of the engine.
        calls: timed as they are.

    Returns:
        Rows of each file, and seconds of each call in each round, `[ROUNDS]`.
    """
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        prefix = Path(folder)
        sessions = {
            name: onnx_session(file.data(), threads, profile=str(prefix / str(number)))
            for number, (name, file) in enumerate(files.items())
        }
        turns = {name: _Turn(_bound(session, files[name].feed())) for name, session in sessions.items()}
        # A call on one thread is interrupted where the machine is busy; its processor time is not.
        clock = time.thread_time if threads == 1 else time.perf_counter
        plain = {name: _Turn(call, clock) for name, call in (calls or {}).items()}
        every = [*turns.values(), *plain.values()]
        for number in range(ROUNDS):
            for turn in every if number % 2 == 0 else reversed(every):
                turn.take()
        return (
            {name: _read(session.end_profiling(), turns[name].count) for name, session in sessions.items()},
            {name: _rounds(np.array(turn.taken).reshape(ROUNDS, -1)) for name, turn in plain.items()},
        )


class _Turn:
    """One of what is run in turns.

    Args:
        run: it.
        clock: tells seconds.
    """

    def __init__(self, run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.run, self.clock = run, clock
        self.count, self.taken = TRIED, []
        self.take()
        self.count = min(max(math.ceil(ROUND / max(min(self.taken), 1e-7)), CALLS[0]), CALLS[1])
        self.taken: list[float] = []

    def take(self) -> None:
        """One round."""
        self.run()  # fills the caches, which whatever had the turn before has filled with its own
        for _ in range(self.count):
            start = self.clock()
            self.run()
            self.taken.append(self.clock() - start)


def _bound(session: Any, feed: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    return lambda: session.run(None, feed)


def _read(file: str, calls: int) -> Rows:
    """The mean of each round's calls, operator by operator, from a record of all calls."""
    taken: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(Path(file).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            name = event["args"].get("op_name", ""), event["name"].removesuffix(KERNEL)
            taken.setdefault(name, []).append(event["dur"] * 1e-6)
    every = 1 + TRIED + ROUNDS * (calls + 1)
    rows = {}
    for name, found in taken.items():
        each = np.array(found).reshape(every, -1).sum(axis=1)  # in a loop it runs more than once in a call
        rows[name] = _rounds(each[1 + TRIED :].reshape(ROUNDS, calls + 1)[:, 1:])
    return rows


def _rounds(durations: np.ndarray) -> np.ndarray:
    """The mean of each round, `[rounds, calls]`, without what interrupted calls took longer."""
    usual = np.median(durations)
    return np.minimum(durations, INTERRUPTED * usual + RECORDER).mean(axis=1)


@dataclass(frozen=True)
class _Chain:
    """Tiny operators one after the other; each works on so many numbers."""

    operators: int
    numbers: int = 1024

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


def profiled(blocks: Mapping[str, Timed], threads: int) -> dict[str, Rounds]:
    """Blocks timed in turns, without changes of layout and what the recorder takes itself."""
    rows, own, _ = _beside_chain(blocks, threads)
    found = {}
    for name, row in rows.items():
        kept = np.array([each for (kind, _), each in row.items() if kind not in LAYOUT] or [np.zeros(ROUNDS)])
        found[name] = Rounds(np.maximum(kept - own, LEAST).sum(axis=0), len(kept))
    return found


@dataclass(frozen=True, eq=False)
class Network:
    """The operators of a whole network.

    Settings:
        operators: seconds of each in each round, by its name, `[ROUNDS]`.
        rest: seconds of a call that does hardly anything, which are part of a network's time and of no operator's.
    """

    operators: Mapping[str, np.ndarray]
    rest: np.ndarray

    def share(self, names: Set[str]) -> Measured | None:
        """What operators of these names take of the whole, round by round; None where there are none."""
        found = [each for name, each in self.operators.items() if name in names]
        whole = np.sum(list(self.operators.values()), axis=0) + self.rest
        return typical(np.sum(found, axis=0) / whole) if found else None


def network(file: Timed, threads: int) -> Network:
    """A network's operators, without what the recorder takes itself. Their names are those that the graph has."""
    rows, own, rest = _beside_chain({NETWORK: file}, threads)
    operators: dict[str, np.ndarray] = {}
    for (_, name), row in rows[NETWORK].items():
        told = graph_name(name)
        operators[told] = operators.get(told, 0.0) + np.maximum(row - own, LEAST)
    return Network(operators, rest)


def _beside_chain(files: Mapping[str, Timed], threads: int) -> tuple[dict[str, Rows], float, np.ndarray]:
    """Rows of files; what the recorder adds to each operator; and a call that does hardly anything, in each round.

    What the recorder adds is what it says of the operators of a chain, less what they add to a call of which nothing is
    recorded. It is found beside the files each time, as a busy machine makes it three times as long.
    """
    long, short = _Chain(1 + CHAIN), _Chain(1)
    rows, taken = recorded({**files, LONG: long}, threads, {LONG: _run(long, threads), SHORT: _run(short, threads)})
    told = np.mean(list(rows.pop(LONG).values()), axis=0)
    own = float(np.median(told - (taken[LONG] - taken[SHORT]) / CHAIN))
    return rows, max(own, 0.0), taken[SHORT]


def _run(block: Timed, threads: int) -> Callable[[], Any]:
    """A call of which nothing is recorded."""
    return _bound(onnx_session(block.data(), threads), block.feed())


SITTINGS, CLOSE = (3, 6), 0.02
"""Least and most sittings of two that are timed head to head, and the uncertainty that is good enough, as a share."""


def head_to_head(new: Timed, old: Timed, threads: int, company: Mapping[str, Timed] | None = None) -> Measured:
    """The time of a block as a share of another's: their rounds in pairs, in sessions that are made anew a few times.

    It ends where the two are told apart, or are as good as equal. Others may keep them company, as in a network.
    """
    ratios: list[np.ndarray] = []
    found = Measured(1.0)
    for sitting in range(SITTINGS[1]):
        pair = {"new": new, "old": old} if sitting % 2 == 0 else {"old": old, "new": new}
        both = profiled({**(company or {}), **pair}, threads)
        light, before = both["new"], both["old"]
        ratios.append(light.seconds / before.seconds)
        if sitting + 1 < SITTINGS[0]:
            continue
        found = _across(ratios, math.hypot(light.unsure, before.unsure) / before.seconds.min())
        if Measured(found.value - 1, found.error).clear or found.error < CLOSE / 2:
            break
    return found


def _across(ratios: list[np.ndarray], floor: float) -> Measured:
    """The median, and the larger of two errors: that of all rounds, and what one sitting differs by from another."""
    within = typical(np.concatenate(ratios), floor)
    apart = float(np.std([np.median(each) for each in ratios], ddof=1)) / math.sqrt(len(ratios))
    return Measured(within.value, max(within.error, apart))
