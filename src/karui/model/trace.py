"""Capture: run a module once and label every tensor that it makes, operator by operator.

The operators are seen below autograd, where composite ones (linear, matmul, LSTM, attention) have come apart into
plain ones, so that what is labelled is what is computed, whatever Python the model is made of. Nothing of the module
changes: buffers that a training-mode run would move are swapped for copies.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from karui.errors import CaptureError, KaruiError, require, told
from karui.model.escapes import DataDependentError, Reads, refuse, sized_by
from karui.model.labels import SINGLE, Dims, Labels
from karui.model.rules import Call, known_of, tensors_in, unknown
from karui.model.standins import StandIns, watched
from karui.model.walking import layers, lent, named_buffers, named_parameters

INPUT = "the model's input keeps its size"
OUTPUT = "the model's output keeps its size"

UNKNOWN = (None, None)
OUTSIDE = "it meets a tensor that is neither a parameter nor a buffer"


@dataclass(eq=False)
class Value:
    """What is known of a tensor: a label for each index of each dimension, and where it came from.

    Settings:
        dims: the labels, one array a dimension.
        origin: the parameter or buffer that it is, or is a view of; "" for none.
        data: whether it depends on the model's inputs.
    """

    dims: Dims
    origin: str = ""
    data: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape that the labels say."""
        return tuple([len(d) for d in self.dims])


@dataclass(frozen=True)
class Step:
    """One operator that ran: its name, and the values of its tensor inputs and outputs, for the proof."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass
class Trace:
    """What one or several runs of a module said of its tensors.

    Settings:
        labels: every label and what was said of them.
        slots: labels of each parameter and buffer that was used, a list with one array for each dimension.
        produced, consumed: for each weight, labels that a contraction passed on or summed over.
        counts: sizes that are not shapes: (parameter name, attribute of its module, labels whose survivors it counts).
        steps: the operators, in the order in which they ran.
        exported: whether the module is told, where it asks, that it is being exported; see `as_exported`.
        example: the inputs that it ran on.
        sized: whether some tensor's size depends on the values of the inputs.
        evaluated: how many of the steps are of the evaluation run, where one of training follows.
    """

    labels: Labels = field(default_factory=Labels)
    slots: dict[str, Dims] = field(default_factory=dict)
    produced: dict[str, list[np.ndarray]] = field(default_factory=dict)
    consumed: dict[str, list[np.ndarray]] = field(default_factory=dict)
    counts: list[tuple[str, str, np.ndarray]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    exported: bool = False
    example: tuple[Any, ...] = ()
    sized: bool = False
    evaluated: int | None = None


class Tracer(TorchDispatchMode):
    """Labels the outputs of each operator that runs under it; `stand_ins` spare the arithmetic of the input's."""

    def __init__(self, trace: Trace, names: dict[int, str], stand_ins: StandIns | None = None) -> None:
        super().__init__()
        self.trace = trace
        self.stand_ins = stand_ins
        self.labels = trace.labels
        self.names = names
        self.known: dict[int, tuple[Tensor, Value]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while this mode is on, so it need not be hidden from the compiler at every operator."""
        return False

    def find(self, tensor: Tensor) -> Value | None:
        """What was said of a tensor, if anything.

        Tensors that the run makes carry their value, as the run's activations must not be kept alive by it; those that
        outlive the run are held in `known`.
        """
        held = self.known.get(id(tensor))
        return held[1] if held is not None else self.carried(tensor)

    def carried(self, tensor: Tensor) -> Value | None:
        """What a tensor that the run made carries with it."""
        owner, value = getattr(tensor, "_karui_value", UNKNOWN)
        return value if owner is self.trace else None

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the model's inputs."""
        known = self.find(tensor)
        return known is not None and known.data

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a parameter or buffer is labelled when it is first met."""
        held = self.known.get(id(tensor))
        known = held[1] if held is not None else self.carried(tensor)
        if known is None:
            name = self.names.get(id(tensor), "")
            if name:
                if name not in self.trace.slots:
                    self.trace.slots[name] = tuple(self.labels.fresh(n) for n in tensor.shape)
                known = Value(self.trace.slots[name], origin=name)
            else:
                known = Value(tuple(self.labels.fixed(n, OUTSIDE) for n in tensor.shape))
            self.known[id(tensor)] = (tensor, known)
        return known

    def set(self, tensor: Tensor, dims: Dims, origin: str = "") -> None:
        """Say what the labels of an operator's output are; the only index of a dimension must stay."""
        for labels in dims:
            if len(labels) == 1 and labels[0] >= 0:
                self.labels.lock(labels, SINGLE)
        self.put(tensor, Value(dims, origin))

    def put(self, tensor: Tensor, value: Value) -> None:
        """Keep what is known of a tensor."""
        held = self.known.get(id(tensor))
        if held is not None:
            self.known[id(tensor)] = (tensor, value)
        else:
            tensor._karui_value = (self.trace, value)  # pyright: ignore[reportAttributeAccessIssue]  # noqa: SLF001  (ours)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = known_of(func)
        if known.split is not None:
            with self:
                return known.split(*args, **kwargs)
        inputs = [self.value(t) for t in known.tensors(args, kwargs)]
        data = any(v.data for v in inputs)
        if data and known.reads_number:
            refuse()
        if data and known.sized:
            self.trace.sized |= any(self.value(t).data for t in sized_by(func, args))
        spare = self.stand_ins if data else None
        result = func(*args, **kwargs) if spare is None else spare.compute(func, args, kwargs)
        outputs = tensors_in(result)
        call = Call(func, args, kwargs, result)
        made: list[Value] = []
        try:
            known.rule(self, call)
            made = [self.value(t) for t in outputs]
            fits = all(value.sizes == t.shape for value, t in zip(made, outputs, strict=True))
        except (ValueError, IndexError, TypeError, AttributeError):
            fits = False
        if not fits:
            unknown(self, call)
            made = [self.value(t) for t in outputs]
        for value in made:
            value.data = value.data or data
        self.trace.steps.append(Step(known.name, tuple(inputs), tuple(made)))
        return result


@contextmanager
def mode_of(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in training or evaluation mode, and afterwards as it was: attributes that a run sets go, too.

    What layers keep between evaluation runs (attention biases that were looked up once) is dropped before and after, by
    a turn to training mode, as such layers do when they train.
    """
    modules = list(layers(module).values())
    before = [m.training for m in modules]
    minds = minds_mode(modules)

    def turn(training: bool) -> None:
        if minds:
            module.train(True)
            module.train(training)
        else:
            for m in modules:
                m.__dict__["training"] = training  # what `train` sets, without its walk

    turn(training)
    attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
    attributes += [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]  # noqa: SLF001  (one may be set anew)
    try:
        yield
    finally:
        for now, old in attributes:
            _restore(now, old)
        turn(True)
        for m, was in zip(modules, before, strict=True):
            m.__dict__["training"] = was


def minds_mode(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these layers does something of its own when it is turned to training or evaluation mode."""
    return any(cls.train is not nn.Module.train for cls in {type(m) for m in modules})


def _restore(attributes: dict[str, Any], old: dict[str, Any]) -> None:
    """Attributes of a module as they were before a run."""
    if attributes.keys() == old.keys() and all(map(operator.is_, attributes.values(), old.values())):
        return
    for name, value in old.items():
        if attributes.get(name) is not value:
            attributes[name] = value
    if len(attributes) > len(old):
        for name in attributes.keys() - old.keys():
            del attributes[name]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention modules compute by plain operators, not by their fused inference path."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def as_exported(wanted: bool) -> Iterator[None]:
    """Let `torch.compiler.is_exporting()` be true if wanted, as it is while `torch.export` runs a module.

    The encoders of transformers look whether a mask is all ones, to save the work of applying it, unless exported.
    """
    with _compiling_state_context() if wanted else nullcontext():
        yield


def widen(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The example with its first sample twice: statistics over a batch of one are refused by batch normalisation."""
    return tree_map(lambda t: t[:1].repeat(2, *[1] * (t.ndim - 1)) if isinstance(t, Tensor) and t.ndim else t, example)


def first(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The example's first sample, as a batch of one."""
    return tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.ndim else t, example)


def run_traced(
    module: nn.Module, example: tuple[Any, ...], trace: Trace, *, training: bool, stand_ins: StandIns | None = None
) -> None:
    """Run `module` once on `example`, adding to `trace`.

    Args:
        module: what to run; left as it is.
        example: its inputs.
        trace: what is added to.
        training: whether it runs in training mode.
        stand_ins: what spares the arithmetic; None computes all.

    Raises:
        CaptureError: the run fails, or control flow depends on the data.
    """
    own = named_buffers(module)
    buffers = {id(b): b.clone() for b in own.values()}
    names: dict[int, str] = {id(p): name for name, p in named_parameters(module).items()}
    names |= {id(buffers[id(b)]): name for name, b in own.items()}
    tracer = Tracer(trace, names, stand_ins)
    inputs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, example)
    for t in tree_leaves(inputs):
        if isinstance(t, Tensor):
            tracer.put(t, Value(tuple(trace.labels.fixed(n, INPUT) for n in t.shape), data=True))
    kept = torch.random.get_rng_state()
    try:
        with (
            torch.no_grad(),
            mode_of(module, training),
            plain_attention(),
            as_exported(trace.exported),
            Reads(tracer.depends),
            lent(module, buffers),
            tracer,
        ):
            outputs = module(*inputs)
    except KaruiError:
        raise
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise CaptureError(
            f"The model does not run on its example input in {mode} mode: {brief(error)}.",
            "Give an example input that its forward accepts.",
        ) from error
    finally:
        torch.random.set_rng_state(kept)
    leaves = tree_leaves(outputs)
    made = [t for t in leaves if isinstance(t, Tensor)]
    require(
        bool(made),
        f"The model gives {told(leaves[0] if leaves else outputs)}, in which no tensor is found.",
        "Wrap the network so that it gives tensors, in tuples, lists or dicts.",
        CaptureError,
    )
    for t in made:
        for d in tracer.value(t).dims:
            trace.labels.lock(d, OUTPUT)


def brief(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def minds_training(module: nn.Module) -> bool:
    """Whether a class of the user's own reads `training`, so that its training run may take another path."""
    for cls in {type(m) for m in layers(module).values()}:
        if cls.__module__.startswith("torch.nn."):
            continue
        functions = (f for c in cls.__mro__ if not c.__module__.startswith("torch.") for f in vars(c).values())
        if any("training" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in functions):
            return True
    return False


def capture(module: nn.Module, example: tuple[Any, ...]) -> Trace:
    """Label every tensor of the module's evaluation run and, where it may differ, of its training run.

    One sample of the example is enough; a network that takes a fixed batch is run on the whole of it.

    Raises:
        CaptureError: the model does not run on its example, or control flow depends on the data.
    """
    return watched(lambda stand_ins: _captured(module, example, stand_ins), lambda trace: trace.sized)


def _captured(module: nn.Module, example: tuple[Any, ...], stand_ins: StandIns | None) -> Trace:
    """The same, with stand-ins for its arithmetic or without."""
    try:
        trace = _traced(module, first(example), stand_ins, training=False)
    except DataDependentError:
        raise
    except CaptureError:
        trace = _traced(module, example, stand_ins, training=False)
    if minds_training(module):
        trace.evaluated = len(trace.steps)
        try:
            run_traced(module, first(example), trace, training=True, stand_ins=stand_ins)
        except DataDependentError:
            raise
        except CaptureError:  # a batch normalisation of one value in each channel; what ran before it stays true
            del trace.steps[trace.evaluated :]
            run_traced(module, widen(example), trace, training=True, stand_ins=stand_ins)
    return trace


def trains_alike(trace: Trace) -> bool:
    """Whether the training run was seen to run the operators of the evaluation run, beside those that count batches."""
    end = trace.evaluated
    return end is not None and operators(trace.steps[:end]) == operators(trace.steps[end:])


def operators(steps: list[Step]) -> list[str]:
    """The operators that ran, beside those that count batches."""
    return [s.name for s in steps if not any("num_batches" in v.origin for v in s.inputs)]


def traced(module: nn.Module, example: tuple[Any, ...], *, training: bool) -> Trace:
    """What one run says of the tensors; where the path depends on the data, that of the path which is exported.

    Raises:
        CaptureError: the model does not run on its example, or its path depends on the data even when exported.
    """
    run = partial(_traced, module, example, training=training)
    return watched(run, lambda trace: trace.sized)


def _traced(module: nn.Module, example: tuple[Any, ...], stand_ins: StandIns | None, *, training: bool) -> Trace:
    """The same, with stand-ins for its arithmetic or without."""
    trace = Trace(example=example)
    try:
        run_traced(module, example, trace, training=training, stand_ins=stand_ins)
    except DataDependentError:
        trace = Trace(example=example, exported=True)
        run_traced(module, example, trace, training=training, stand_ins=stand_ins)
    return trace
