"""Rewriting a captured program for a cut: every argument that repeats a size, from the labels.

The program runs once under a tracer, so that the labels of each operator's inputs and outputs are known, and with
them every size after the cut. A rewrite is JSON: [name in the graph, operator before, operator after, its arguments],
where an argument may name a node of the graph ({"node": name}) or compute something ({"call": operator, "args":
[...]}).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from karui.errors import ArtifactError, CaptureError, require
from karui.model.copying import copied
from karui.model.graphform import graph_form
from karui.model.groups import analyse
from karui.model.program import Program
from karui.model.standins import StandIns, watched
from karui.model.trace import INPUT, Step, Trace, Tracer, Value, brief, mode_of

Rewrite = list[Any]
PLAIN: dict[str, Callable[..., Any]] = {"mul": operator.mul, "floordiv": operator.floordiv}


@dataclass(frozen=True)
class Site:
    """One operator of a program, what it did, and what is to die.

    Settings:
        node: the operator in the graph.
        found: the labels of every node's result.
        steps: the plain operators that it ran as.
        alive: which labels stay.
    """

    node: fx.Node
    found: dict[fx.Node, Any]
    steps: list[Step]
    alive: np.ndarray

    def kept(self, labels: np.ndarray) -> np.ndarray:
        """Which indices stay."""
        return np.flatnonzero(self.alive[labels])

    def labels(self, place: int) -> tuple[np.ndarray, ...]:
        """The labels of an argument."""
        given = self.node.args[place]
        return self.found[given].dims if isinstance(given, fx.Node) else ()

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by place or name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    @property
    def args(self) -> list[Any]:
        """The operator's arguments."""
        return list(self.node.args)

    def sizes(self, given: Any, dims: tuple[np.ndarray, ...]) -> list[Any]:
        """A list of sizes for dimensions with these labels, after the cut."""
        return [self.size(size, labels) for size, labels in zip(given, dims, strict=True)]

    def size(self, size: Any, labels: np.ndarray) -> Any:
        """One size after the cut; a symbolic one shrinks in proportion."""
        left = len(self.kept(labels))
        if left == len(labels) or (isinstance(size, int) and size < 0):
            return size
        if isinstance(size, int):
            return left
        return {"call": "floordiv", "args": [{"call": "mul", "args": [size, left]}, len(labels)]}


Change = tuple[str, list[Any]] | None
CHANGES: dict[str, Callable[[Site], Change]] = {}


def change(names: str) -> Callable[[Callable[[Site], Change]], Callable[[Site], Change]]:
    """Register how operators of these names are rewritten: (operator after, arguments), or None for as it is."""

    def register(function: Callable[[Site], Change]) -> Callable[[Site], Change]:
        CHANGES.update(dict.fromkeys(names.split(), function))
        return function

    return register


@change("view reshape _unsafe_view expand broadcast_to new_zeros new_ones new_empty new_full")
def _sized(site: Site) -> Change:
    """Operators whose second argument is the size of the result."""
    given = list(site.args[1])
    dims = site.found[site.node].dims
    return str(site.node.target), [site.args[0], site.sizes(given, dims), *site.args[2:]]


@change("zeros ones empty full rand randn")
def _made(site: Site) -> Change:
    """Operators whose first argument is the size of the result."""
    dims = site.found[site.node].dims
    return str(site.node.target), [site.sizes(list(site.args[0]), dims), *site.args[1:]]


@change("unflatten")
def _unflatten(site: Site) -> Change:
    dims = site.found[site.node].dims
    given = list(site.args[2])
    start = site.args[1] % len(site.labels(0))
    return str(site.node.target), [*site.args[:2], site.sizes(given, dims[start : start + len(given)])]


@change("repeat")
def _repeat(site: Site) -> Change:
    """A dimension of one that becomes many; copies of a longer one follow it."""
    dims, before = site.found[site.node].dims, site.labels(0)
    lead = len(dims) - len(before)
    times = [
        site.size(n, labels) if k < lead or len(before[k - lead]) == 1 else n
        for k, (n, labels) in enumerate(zip(site.args[1], dims, strict=True))
    ]
    return str(site.node.target), [site.args[0], times]


@change("repeat_interleave")
def _interleave(site: Site) -> Change:
    """As many copies of each index as are left, all indices losing the same ones."""
    dim = site.arg(2, "dim")
    if dim is None or not isinstance(site.args[1], int):
        return None
    before, after = (len(site.kept(dims[dim])) for dims in (site.labels(0), site.found[site.node].dims))
    return str(site.node.target), [site.args[0], after // before, *site.args[2:]]


@change("split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk")
def _split(site: Site) -> Change:
    """Parts that may shrink differently."""
    parts = site.found[site.node]
    dim = site.arg(2, "dim", 0) % len(site.labels(0))
    return "aten.split_with_sizes.default", [site.args[0], [len(site.kept(p.dims[dim])) for p in parts], dim]


@change("slice")
def _slice(site: Site) -> Change:
    """The surviving indices of the window, counted among the survivors; several runs are joined."""
    dim, start, end, step = site.arg(1, "dim", 0), site.arg(2, "start"), site.arg(3, "end"), site.arg(4, "step", 1)
    return _window(site, dim, slice(start, end, step))


@change("narrow")
def _narrow(site: Site) -> Change:
    """A slice told by its length; one that begins where a tensor says keeps its dimension."""
    dim, start, length = (site.arg(k, name) for k, name in enumerate(("dim", "start", "length"), 1))
    if not isinstance(start, int):
        return None
    start %= len(site.labels(0)[dim])
    return _window(site, dim, slice(start, start + length))


def _window(site: Site, dim: int, window: slice) -> Change:
    """What is left of a window on one dimension."""
    before = site.labels(0)[dim]
    stay = site.kept(before)
    if len(stay) == len(before):
        return None
    rank = np.full(len(before), -1)
    rank[stay] = np.arange(len(stay))
    taken = rank[np.arange(len(before))[window]]
    taken = taken[taken >= 0]
    runs = np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1)  # one that is empty where nothing is left
    ends = [[int(run[0]), int(run[-1]) + 1] if len(run) else [0, 0] for run in runs]
    pieces = [{"call": "aten.slice.Tensor", "args": [site.args[0], dim, *pair]} for pair in ends]
    if len(pieces) == 1:
        return "aten.slice.Tensor", pieces[0]["args"]
    return "aten.cat.default", [pieces, dim]


@change("select")
def _select(site: Site) -> Change:
    """The index, counted among the survivors."""
    _, dim, index = site.args
    before = site.labels(0)[dim]
    place = int(np.searchsorted(site.kept(before), index % len(before)))
    return str(site.node.target), [site.args[0], dim, place]


@change("pad constant_pad_nd")
def _pad(site: Site) -> Change:
    """Padded indices that stay."""
    dims, widths = site.found[site.node].dims, list(site.args[1])
    for k in range(len(widths) // 2):
        labels = dims[len(dims) - 1 - k]
        stay = site.kept(labels)
        if len(stay) < len(labels):
            left, right = max(widths[2 * k], 0), max(widths[2 * k + 1], 0)
            widths[2 * k] = int((stay < left).sum()) if left else widths[2 * k]
            widths[2 * k + 1] = int((stay >= len(labels) - right).sum()) if right else widths[2 * k + 1]
    return str(site.node.target), [site.args[0], widths, *site.args[2:]]


@change("group_norm")
def _group_norm(site: Site) -> Change:
    inner = next(s for s in site.steps if "native_group_norm" in s.name)
    groups = len(site.kept(inner.outputs[1].dims[1]))
    return str(site.node.target), [site.args[0], groups, *site.args[2:]]


@change("layer_norm rms_norm")
def _layer_norm(site: Site) -> Change:
    shape = list(site.args[1])
    dims = site.labels(0)
    return str(site.node.target), [
        site.args[0],
        site.sizes(shape, dims[len(dims) - len(shape) :]),
        *site.args[2:],
    ]


@change("conv1d conv2d conv3d")
def _convolution(site: Site) -> Change:
    return _grouped(site, 6, site.labels(0))


@change("conv_transpose1d conv_transpose2d conv_transpose3d")
def _transposed(site: Site) -> Change:
    return _grouped(site, 6, site.found[site.node].dims)


def _grouped(site: Site, place: int, dims: tuple[np.ndarray, ...]) -> Change:
    """The groups of a convolution: all channels over those of one group."""
    if site.arg(place, "groups", 1) == 1:
        return None
    weight = site.labels(1)
    channels = dims[len(dims) - len(weight) + 1]
    groups = len(site.kept(channels)) // len(site.kept(weight[1]))
    args = site.args
    return str(site.node.target), [*args[:place], groups, *args[place + 1 :]]


def interpret(
    program: Program, module: nn.Module, example: tuple[Any, ...], *, training: bool
) -> tuple[dict[fx.Node, Any], dict[fx.Node, list[Step]], Trace]:
    """Run a program over a module's parameters, and label the result of every node."""
    form = graph_form(copied(module), program, program)
    run = partial(_interpreted, program, form, example, training=training)
    return watched(run, lambda found: found[2].sized)


def _interpreted(
    program: Program, form: nn.Module, example: tuple[Any, ...], stand_ins: StandIns | None, *, training: bool
) -> tuple[dict[fx.Node, Any], dict[fx.Node, list[Step]], Trace]:
    """The same over its graph form, with stand-ins for its arithmetic or without."""
    trace = Trace()
    names = {
        id(t): name for name, t in [*form.named_parameters(), *form.named_buffers()] if name not in program.constants
    }
    tracer = Tracer(trace, names, stand_ins)
    flat, _ = tree_flatten((tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, example), {}))
    for t in flat:
        if isinstance(t, Tensor):
            tracer.put(t, Value(tuple(trace.labels.fixed(n, INPUT) for n in t.shape), data=True))
    found: dict[fx.Node, Any] = {}
    ran: dict[fx.Node, list[Step]] = {}

    class Labeller(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            start = len(trace.steps)
            result = super().run_node(n)
            told = tracer.value(result) if isinstance(result, Tensor) else None
            found[n] = told or tree_map(lambda t: tracer.value(t) if isinstance(t, Tensor) else t, result)
            ran[n] = trace.steps[start:]
            return result

    state = torch.random.get_rng_state()
    try:
        with torch.no_grad(), mode_of(form, training), tracer:
            Labeller(form, graph=program.graph).run(*flat, enable_io_processing=False)
    except Exception as error:
        raise CaptureError(f"The captured program does not run: {brief(error)}.") from error
    finally:
        torch.random.set_rng_state(state)
    return found, ran, trace


def rewrites(
    program: Program, module: nn.Module, example: tuple[Any, ...], kept: list[Any], *, training: bool
) -> list[Rewrite]:
    """What must change in a program when only the `kept` indices of the module's tensors stay."""
    found, ran, trace = interpret(program, module, example, training=training)
    alive = analyse(trace, []).alive(kept)
    changed: list[Rewrite] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "overloadpacket"):
            continue
        name = node.target.overloadpacket.__name__
        site = Site(node, found, ran[node], alive)
        if name == "scaled_dot_product_attention":
            changed += _scale(site)
        elif name in CHANGES and _touched(site):
            new = CHANGES[name](site)
            if new is not None and (new[0] != str(node.target) or list(new[1]) != list(node.args)):
                changed.append([node.name, str(node.target), new[0], _encode(new[1]), {}])
    return changed


def _touched(site: Site) -> bool:
    """Whether an input or output of an operator loses an index."""
    values = [site.found[n] for n in (*site.node.all_input_nodes, site.node)]
    flat = [v for value in values for v in ((value,) if isinstance(value, Value) else tree_leaves(value))]
    return any(not site.alive[d].all() for v in flat if isinstance(v, Value) for d in v.dims)


def _scale(site: Site) -> list[Rewrite]:
    """Attention divides by the root of the width that it had."""
    width = site.labels(0)[-1]
    if site.node.kwargs.get("scale") is not None or len(site.kept(width)) == len(width):
        return []
    target = str(site.node.target)
    return [[site.node.name, target, target, _encode(site.args), {"scale": len(width) ** -0.5}]]


def _encode(value: Any) -> Any:
    """Arguments as JSON values."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {k: _encode(v) for k, v in value.items()}
    return int(value) if isinstance(value, np.integer) else value


def apply_rewrites(program: Program, changed: list[Rewrite]) -> Program:
    """The program with its arguments changed.

    Raises:
        ArtifactError: the program is not the one that the rewrites were made for.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, mapping))
    nodes = {old.name: new for old, new in mapping.items()}
    for name, before, after, args, kwargs in changed:
        node = nodes.get(name)
        require(
            node is not None and str(node.target) == before,
            f"The saved cut changes operator '{name}' ({before}), which is not in the captured model.",
            "Load it with the model and the version of torch that it was made with.",
            ArtifactError,
        )
        assert node is not None  # noqa: S101  (for the type checker)
        with graph.inserting_before(node):
            new = tuple(_decode(a, graph, nodes) for a in args)
        if after != before:
            node.kwargs = {}
        node.target, node.args = _operator(after), new
        node.kwargs = {**node.kwargs, **kwargs}
    graph.lint()
    return replace(program, graph=graph)


def _decode(value: Any, graph: fx.Graph, nodes: dict[str, fx.Node]) -> Any:
    """Arguments from JSON values; computations become nodes at the graph's insertion point."""
    if isinstance(value, list):
        return [_decode(v, graph, nodes) for v in value]
    if isinstance(value, dict) and "node" in value:
        return nodes[value["node"]]
    if isinstance(value, dict):
        return graph.call_function(_operator(value["call"]), tuple(_decode(a, graph, nodes) for a in value["args"]))
    return value


def _operator(name: str) -> Callable[..., Any]:
    """The operator of that name."""
    if name in PLAIN:
        return PLAIN[name]
    space, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), overload)
