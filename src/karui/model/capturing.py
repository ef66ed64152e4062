"""Capture of a model's computation as programs, for its graph form: recorded where that is safe, exported elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from karui.errors import SurgeryError
from karui.model.copying import copied
from karui.model.exporting import export_program
from karui.model.program import Program, attribute, call_layers, named_inputs, packet
from karui.model.recording import UnrecordedError, dynamic, record
from karui.model.running import random_like
from karui.model.trace import Trace, minds_training, operators, traced, trains_alike, widen

DROPOUTS = frozenset({nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d})
# Operators that are told whether they train.
MINDFUL = frozenset(
    {
        "batch_norm",
        "instance_norm",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "rrelu",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
    }
)

Capture = Callable[..., Program]


def capture_programs(
    module: nn.Module, example: tuple[Any, ...], seen: Trace | None = None, *, recorded: bool | None = None
) -> tuple[Program, Program]:
    """The evaluation and the training program of a module, with a dynamic batch.

    Args:
        module: what is captured; left as it is.
        example: its inputs.
        seen: a trace of it, if there is.
        recorded: whether both are recorded or both exported, as they were before; None records where that is safe.

    Raises:
        SurgeryError: `torch.export` cannot capture it, or would freeze the batch size.
    """
    twin = copied(module)
    if recorded is not False:
        try:
            return _sized(_programs(twin, example, seen, record_program), example)
        except UnrecordedError as error:
            if recorded:
                raise SurgeryError(f"The model has no graph form: it cannot be recorded, for {error}.") from error
    return _sized(_programs(twin, example, seen, export_program), example)


def _sized(programs: tuple[Program, Program], example: tuple[Any, ...]) -> tuple[Program, Program]:
    """The programs with the sizes that their numbers were computed from, which are the ones they hold for."""
    sizes = tuple(tuple(t.shape[1:]) if isinstance(t, Tensor) and t.ndim else None for t in tree_leaves(example))
    evaluation = replace(programs[0], sizes=sizes)
    return evaluation, evaluation if programs[1] is programs[0] else replace(programs[1], sizes=sizes)


def record_program(module: nn.Module, example: tuple[Any, ...], *, training: bool) -> Program:
    """One program with a dynamic batch, from two runs: of the example, a batch of two, and with a random sample more.

    Raises:
        UnrecordedError: the module does what a recording does not see, or hangs on the batch.
    """
    generator = torch.Generator().manual_seed(3)
    more = tree_map(lambda t: _longer(t, generator), example)
    wants = {p: p.requires_grad for p in module.parameters()}
    try:
        for p in wants:
            p.requires_grad_(False)
        one, other = (record(module, given, training=training) for given in (example, more))
    finally:
        for p, want in wants.items():
            p.requires_grad_(want)
    mode = "training" if training else "evaluation"
    graph = dynamic(one, other, module, example)
    names = {f"constant_{place}": f"{mode}_constant_{place}" for place in range(len(one.constants))}
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names.get(node.target, node.target)
    call_layers(graph, module)
    graph.lint()
    constants = dict(zip(names.values(), one.constants, strict=True))
    assert one.spec is not None  # noqa: S101  (a run that ended has one)
    return Program(graph, named_inputs(module, example), one.spec, constants, recorded=True)


def _longer(value: Any, generator: torch.Generator) -> Any:
    """A batch with one sample more."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return torch.cat([value, random_like(value, generator)[:1]])


def _programs(
    module: nn.Module, example: tuple[Any, ...], seen: Trace | None, capture: Capture
) -> tuple[Program, Program]:
    """Both programs, captured in one way."""
    evaluation = capture(module, widen(example), training=False)
    told = {packet(n) for n in evaluation.graph.nodes if n.op == "call_function"} & MINDFUL
    if not told and not minds_training(module):
        return evaluation, evaluation
    # A dropout that is called whole knows training from evaluation by itself, in either program.
    whole = {str(n.target) for n in evaluation.graph.nodes if n.op == "call_module"}
    quiet = [layer for path, layer in module.named_modules() if path in whole and type(layer) in DROPOUTS]
    if (seen is not None and trains_alike(seen)) or _same_operators(module, widen(example), quiet):
        return evaluation, _trained(evaluation, module) if told else evaluation
    return evaluation, capture(module, widen(example), training=True)


def _trained(evaluation: Program, module: nn.Module) -> Program:
    """The evaluation program where batch normalisations that are not called whole take the batch's statistics.

    This is all that training changes where it runs the same operators.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(evaluation.graph, {}))
    for node in list(graph.nodes):
        mean = node.args[3] if node.op == "call_function" and packet(node) == "batch_norm" else None
        if isinstance(mean, fx.Node):
            node.args = (*node.args[:5], True, *node.args[6:])
            counter = str(mean.target).rpartition(".")[0] + ".num_batches_tracked"
            if isinstance(attribute(module, counter), Tensor):
                with graph.inserting_before(node):
                    graph.call_function(torch.ops.aten.add_.Tensor, (graph.get_attr(counter), 1))
    return replace(evaluation, graph=graph, twin=evaluation)


def _same_operators(module: nn.Module, example: tuple[Any, ...], quiet: list[nn.Module]) -> bool:
    """Whether training runs the operators that evaluation does, but for `quiet` layers, which do not train."""
    names = []
    for training in (False, True):
        kept = [layer.forward for layer in quiet]
        for layer in quiet:
            layer.forward = _given
        try:
            trace = traced(module, example, training=training)
        finally:
            for layer, forward in zip(quiet, kept, strict=True):
                layer.forward = forward
        names.append(operators(trace.steps))
    return names[0] == names[1]


def _given(x: Tensor) -> Tensor:
    """Dropout that drops nothing."""
    return x
