"""Capture by recording: the operators of two runs, of a batch of two and of three, become one program for any batch.

`torch.export` with a symbolic batch reasons about the size at every operator, which takes seconds. Here the model runs
as it is, above autograd, where composite operators (linear, attention, dropout) arrive whole, as they do in an export.
A number that differs between the runs is a multiple of the batch, or the model is left to `torch.export`; so is
whatever a recording does not see: paths that hang on the batch, values that leave for Python or come from nowhere,
changed modes (gradients, autocast, functional transforms), tensors of other classes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import peek_interpreter_stack
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from karui.model.escapes import Reads, reads_number, sized_by
from karui.model.standins import StandIns
from karui.model.trace import mode_of, plain_attention
from karui.model.walking import layers, lent, named_buffers, named_parameters

# What an operator may be told beside tensors and numbers.
WORDS = (str, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

LIFT = torch.ops.aten.lift_fresh.default


class UnrecordedError(Exception):
    """The model does what a recording does not see."""


@dataclass(frozen=True)
class Ref:
    """A tensor of a recording: an output of an operator, or a named tensor (input, parameter, buffer, constant)."""

    name: str = ""
    number: int = -1
    place: int | None = None


@dataclass(frozen=True)
class Ran:
    """One operator that ran: its arguments, flattened, with tensors as references; and the layer that ran it."""

    func: Any
    leaves: list[Any]
    spec: Any
    layer: str


@dataclass
class Recording:
    """One run.

    Settings:
        ran: its operators.
        constants: tensors that are neither inputs, parameters nor buffers, nor made by an operator.
        leaves, spec: the outputs, flattened, with tensors as references.
    """

    ran: list[Ran] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None


class Recorder(ProxyTorchDispatchMode):
    """Keeps every operator that runs, before composite ones come apart.

    It listens where `torch.export` does, which torch allows to modes of this class alone. None of its own set-up is
    wanted: it would import a compiler.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)  # noqa: SLF001  (the place of an export)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY  # noqa: SLF001  (as above)
        self.enter_stack = []
        self.made = Recording()
        self.held = {id(t): (t, Ref(name)) for name, t in named.items()}
        self.stand_ins = StandIns()
        self.fed: list[bool] = []
        self.path: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while this mode is on, so it need not be hidden from the compiler at every operator."""
        return False

    def ref(self, tensor: Tensor) -> Ref:
        """What a tensor is; one that comes from nowhere is kept as a constant."""
        held = self.held.get(id(tensor))
        if held is not None:
            return held[1]
        owner, ref = getattr(tensor, "_karui_ref", (None, None))
        if owner is self and ref is not None:
            return ref
        require_seen(type(tensor) in (Tensor, nn.Parameter), "a tensor of a class of its own")
        ref = Ref(f"constant_{len(self.made.constants)}")
        self.made.constants.append(tensor.detach().clone())
        self.held[id(tensor)] = (tensor, ref)
        return ref

    def put(self, tensor: Tensor, ref: Ref) -> None:
        """Name an operator's output; one that was written in place is known as the later value."""
        require_seen(type(tensor) in (Tensor, nn.Parameter), "a tensor of a class of its own")
        if id(tensor) in self.held:
            constant = self.held[id(tensor)][1].name.startswith("constant")
            lifted = constant and self.made.ran[ref.number].func is LIFT
            require_seen(lifted or not constant, "a constant that is written over")
            if lifted:  # what follows uses the copy
                self.held[id(tensor)] = (tensor, ref)
        else:
            tensor._karui_ref = (self, ref)  # pyright: ignore[reportAttributeAccessIssue]  # noqa: SLF001  (ours)

    def feeds(self, ref: Ref) -> bool:
        """Whether a tensor depends on the model's inputs; nobody reads what does."""
        return self.fed[ref.number] if ref.number >= 0 else ref.name.startswith("input ")

    def depends(self, tensor: Tensor) -> bool:
        """Whether Python may not read a tensor: any that the run made."""
        owner, _ = getattr(tensor, "_karui_ref", (None, None))
        return owner is self or id(tensor) in self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with no_python_dispatcher():
            require_seen(isinstance(func, torch._ops.OpOverload), "an operator that runs programs")  # noqa: SLF001  (its only name)
            require_seen(not reads_number(func) and not sized_by(func, args), "a value that decides what is run")
            require_seen(torch.is_grad_enabled(), "a part without gradients")
            require_seen(not torch.is_autocast_enabled("cpu"), "a part with autocast")
            require_seen(peek_interpreter_stack() is None, "a functional transform")
            leaves: list[Any] = []
            spec = flattened((args, kwargs), leaves)
            leaves = [self.ref(a) if isinstance(a, Tensor) else a for a in leaves]
            self.fed.append(any(isinstance(a, Ref) and self.feeds(a) for a in leaves))
            result = self.stand_ins.compute(func, args, kwargs) if self.fed[-1] else func(*args, **kwargs)
        number = len(self.made.ran)
        self.made.ran.append(Ran(func, leaves, spec, self.path[-1] if self.path else ""))
        if isinstance(result, Tensor):
            self.put(result, Ref(number=number))
        else:
            require_seen(isinstance(result, (tuple, list)), "an operator that gives no tensor")
            for place, part in enumerate(result):
                require_seen(isinstance(part, Tensor), "an operator that gives other things than tensors")
                self.put(part, Ref(number=number, place=place))
        return result


def flattened(value: Any, leaves: list[Any]) -> Any:
    """Add what an operator is given to `leaves`, and return how it nests: lists, tuples and dictionaries only."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple, [flattened(part, leaves) for part in value])
    if isinstance(value, dict):
        return (dict, [(name, flattened(part, leaves)) for name, part in value.items()])
    leaves.append(value)
    return None


def nested(spec: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of `flattened`."""
    if spec is None:
        return next(leaves)
    kind, parts = spec
    if kind is dict:
        return {name: nested(part, leaves) for name, part in parts}
    return kind(nested(part, leaves) for part in parts)


def require_seen(seen: bool, what: str) -> None:
    """Give up where a recording would miss something.

    Raises:
        UnrecordedError: not `seen`.
    """
    if not seen:
        raise UnrecordedError(what)


@contextmanager
def _layers(module: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the layer that runs on top of `path`."""
    names = {id(layer): name for name, layer in layers(module).items()}

    def enter(layer: nn.Module, _inputs: Any) -> None:
        path.append(names.get(id(layer), path[-1] if path else ""))

    def leave(_layer: nn.Module, _inputs: Any, _output: Any) -> None:
        path.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(module: nn.Module, example: tuple[Any, ...], *, training: bool) -> Recording:
    """One run of a module whose parameters want no gradients.

    Raises:
        UnrecordedError: it does what a recording does not see, or does not run.
    """
    own = named_buffers(module)
    buffers = {name: b.clone() for name, b in own.items()}
    inputs = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, example)
    given = {f"input {place}": t for place, t in enumerate(tree_leaves((inputs, {}))) if isinstance(t, Tensor)}
    recorder = Recorder({**named_parameters(module), **buffers, **given})
    kept = torch.random.get_rng_state()
    try:
        with (
            torch.enable_grad(),
            mode_of(module, training),
            plain_attention(),
            lent(module, {id(b): buffers[name] for name, b in own.items()}),
            Reads(recorder.depends),
            _layers(module, recorder.path),
            enable_python_dispatcher(),
            recorder,
        ):
            outputs = module(*inputs)
        leaves, recorder.made.spec = tree_flatten(outputs)
        recorder.made.leaves = [recorder.ref(a) if isinstance(a, Tensor) else a for a in leaves]
    except UnrecordedError:
        raise
    except Exception as error:  # the module is foreign code; `torch.export` will tell what is wrong with it
        raise UnrecordedError(str(error)) from error
    finally:
        torch.random.set_rng_state(kept)
    return recorder.made


def dynamic(one: Recording, other: Recording, module: nn.Module, example: tuple[Any, ...]) -> fx.Graph:
    """The graph of two recordings, of batches of two and of three, with sizes that follow the batch.

    Parameters, buffers and constants are named by their paths; `meta["layer"]` of a node is the path of its layer.

    Raises:
        UnrecordedError: they differ by more than multiples of the batch.
    """
    same = [r.func for r in one.ran] == [r.func for r in other.ran] and one.spec == other.spec
    require_seen(same, "a path that hangs on the batch")
    alike = len(one.constants) == len(other.constants) and all(map(_equal, one.constants, other.constants))
    require_seen(alike, "a constant that hangs on the batch or the input")
    return _Writer(module, example).write(one, other)


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
    return same and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


class _Writer:
    """Writes two recordings as one graph."""

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        self.graph = fx.Graph()
        self.module = module
        self.nodes: dict[Ref, fx.Node] = {}
        self.sizes: dict[int, fx.Node] = {}
        flat = tree_leaves((example, {}))
        for place, value in enumerate(flat):
            node = self.graph.placeholder(f"input_{place}")
            self.nodes[Ref(f"input {place}")] = node
            if isinstance(value, Tensor) and value.ndim and 1 not in self.sizes:
                with self.graph.inserting_after(node):
                    self.sizes[1] = self.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
        # A size that is asked for between two inputs would part them.
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if first is not None:
            last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            last.append(first)

    def write(self, one: Recording, other: Recording) -> fx.Graph:
        for number, (ran, again) in enumerate(zip(one.ran, other.ran, strict=True)):
            require_seen(ran.spec == again.spec and ran.layer == again.layer, "a path that hangs on the batch")
            args, kwargs = nested(ran.spec, iter(self.both(ran.leaves, again.leaves)))
            node = self.graph.call_function(_copying(ran.func), tuple(args), dict(kwargs))
            node.meta["layer"] = ran.layer
            self.nodes[Ref(number=number)] = node
        self.graph.output(tuple(self.both(one.leaves, other.leaves)))
        self.graph.eliminate_dead_code()
        return self.graph

    def both(self, leaves: list[Any], again: list[Any]) -> list[Any]:
        """Arguments that hold for any batch, from those of two and of three."""
        require_seen(len(leaves) == len(again), "a path that hangs on the batch")
        return [self.one(a, b) for a, b in zip(leaves, again, strict=True)]

    def one(self, value: Any, again: Any) -> Any:
        """One argument."""
        require_seen(type(value) is type(again), "a path that hangs on the batch")
        if isinstance(value, Ref):
            require_seen(value == again, "a path that hangs on the batch")
            return self.node(value)
        if value == again or (value != value and again != again):  # noqa: PLR0124  (not a number)
            require_seen(isinstance(value, (*WORDS, int, float, complex)), f"an argument of {type(value).__name__}")
            return value
        require_seen(type(value) is int and 3 * value == 2 * again, "a number that is no multiple of the batch")
        return self.multiple(value // 2)

    def multiple(self, times: int) -> fx.Node:
        """A multiple of the batch."""
        require_seen(1 in self.sizes, "a size that follows no input")
        if times not in self.sizes:
            self.sizes[times] = self.graph.call_function(operator.mul, (self.sizes[1], times))
            self.sizes[1].append(self.sizes[times])
        return self.sizes[times]

    def node(self, ref: Ref) -> fx.Node:
        """The node of a tensor."""
        if ref not in self.nodes:
            if ref.name:
                self.nodes[ref] = self.graph.create_node("get_attr", ref.name)
            else:
                whole = self.nodes[Ref(number=ref.number)]
                with self.graph.inserting_after(whole):
                    self.nodes[ref] = self.graph.call_function(operator.getitem, (whole, ref.place))
        return self.nodes[ref]


def _copying(func: Any) -> Any:
    """A constant is lifted as a copy, so that what is written into it stays out of the next run."""
    return torch.ops.aten.lift_fresh_copy.default if func is LIFT else func
