"""Capture of a model's computation as programs, with `torch.export`, for its graph form.

A program calls the standard layers as modules; what lies between them is plain operators, whose arguments repeat the
sizes that Python computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from karui.errors import SurgeryError, require
from karui.model.copying import copied
from karui.model.escapes import DataDependentError
from karui.model.inline import inline
from karui.model.trace import Step, Trace, brief, first, minds_training, mode_of, plain_attention, traced, widen

# Layers that are called whole: their forward is one operator on their input, and their attributes follow a cut.
WHOLE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("linear",),
    nn.Conv1d: ("conv1d",),
    nn.Conv2d: ("conv2d",),
    nn.Conv3d: ("conv3d",),
    nn.ConvTranspose1d: ("conv_transpose1d",),
    nn.ConvTranspose2d: ("conv_transpose2d",),
    nn.ConvTranspose3d: ("conv_transpose3d",),
    nn.BatchNorm1d: ("batch_norm",),
    nn.BatchNorm2d: ("batch_norm",),
    nn.BatchNorm3d: ("batch_norm",),
    nn.LayerNorm: ("layer_norm",),
    nn.GroupNorm: ("group_norm",),
    nn.Dropout: ("dropout",),
    nn.Dropout1d: ("feature_dropout",),
    nn.Dropout2d: ("feature_dropout",),
    nn.Dropout3d: ("feature_dropout",),
}
NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
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


@dataclass(frozen=True)
class Program:
    """A captured computation.

    Settings:
        graph: its operators; parameters, buffers and whole layers are named by their paths.
        inputs: the names of the inputs.
        outputs: how the flat outputs are put together.
        constants: tensors that it made once, by name.
        twin: the program that it is but for statistics of the batch, so that sizes stand where they do there.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: TreeSpec
    constants: dict[str, Tensor] = field(default_factory=dict)
    twin: Program | None = None

    def compiled(self, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """A function of the module that holds the parameters, and the flat inputs; float32 may be another type."""
        graph = self.graph
        if dtype is not None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.graph, {}))
            for node in graph.nodes:
                swapped = tree_map(lambda a: dtype if a is torch.float32 else a, (list(node.args), dict(node.kwargs)))
                node.args, node.kwargs = tuple(swapped[0]), swapped[1]
        code = graph.python_code("self")
        space = dict(code.globals)
        exec(code.src, space)  # noqa: S102  (the code is that of the graph, written by torch.fx)
        return space["forward"]


def capture_programs(module: nn.Module, example: tuple[Any, ...], seen: Trace | None = None) -> tuple[Program, Program]:
    """The evaluation and the training program of a module, with a dynamic batch; `seen` is a trace of it, if there is.

    Raises:
        SurgeryError: `torch.export` cannot capture it, or would freeze the batch size.
    """
    module = copied(module)
    evaluation = _export(module, widen(example), training=False)
    told = {_packet(n) for n in evaluation.graph.nodes if n.op == "call_function"} & MINDFUL
    if not told and not minds_training(module):
        return evaluation, evaluation
    runs = (
        [] if seen is None or seen.evaluated is None else [seen.steps[: seen.evaluated], seen.steps[seen.evaluated :]]
    )
    # A dropout that is called whole knows training from evaluation by itself, in either program.
    whole = {str(n.target) for n in evaluation.graph.nodes if n.op == "call_module"}
    quiet = [layer for path, layer in module.named_modules() if path in whole and type(layer) in DROPOUTS]
    if (runs and _names(runs[0]) == _names(runs[1])) or _same_operators(module, widen(example), quiet):
        return evaluation, _trained(evaluation, module) if told else evaluation
    return evaluation, _export(module, widen(example), training=True)


def require_one_path(module: nn.Module, example: tuple[Any, ...]) -> None:
    """Refuse a model in which the size of a tensor that depends on the input decides what is run.

    `torch.export` gives such sizes no value, and so cannot follow a path that hangs on one.

    Raises:
        DataDependentError: it does.
    """
    module = copied(module)
    try:
        with mode_of(module, False), plain_attention():
            torch.export.export(module, first(example), strict=False)
    except Exception as error:
        raise DataDependentError(
            f"The model makes tensors whose size depends on its input's values, and its path with it: {brief(error)}.",
            "Its channels cannot be cut; techniques that work layer by layer still can.",
        ) from error


def _trained(evaluation: Program, module: nn.Module) -> Program:
    """The evaluation program where batch normalisations that are not called whole take the batch's statistics.

    This is all that training changes where it runs the same operators.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(evaluation.graph, {}))
    for node in list(graph.nodes):
        mean = node.args[3] if node.op == "call_function" and _packet(node) == "batch_norm" else None
        if isinstance(mean, fx.Node):
            node.args = (*node.args[:5], True, *node.args[6:])
            counter = str(mean.target).rpartition(".")[0] + ".num_batches_tracked"
            if isinstance(_attribute(module, counter), Tensor):
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
        names.append(_names(trace.steps))
    return names[0] == names[1]


def _given(x: Tensor) -> Tensor:
    """Dropout that drops nothing."""
    return x


def _names(steps: list[Step]) -> list[str]:
    """The operators that ran, beside those that count batches."""
    return [s.name for s in steps if not any("num_batches" in v.origin for v in s.inputs)]


def _packet(node: fx.Node) -> str:
    """The name of a node's operator, without its overload."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _export(module: nn.Module, example: tuple[Any, ...], *, training: bool) -> Program:
    """One program, with whole layers as calls."""
    shapes = tree_map(lambda t: {0: Dim.AUTO} if isinstance(t, Tensor) and t.ndim else None, example)
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # the exporter names what `*inputs` takes together
        fixed = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = (*shapes[:fixed], shapes[fixed:])
    try:
        with mode_of(module, training), plain_attention():
            exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        captured = exported.module(check_guards=False)
    except Exception as error:
        raise SurgeryError(f"The model has no graph form: {brief(error)}.", "Leave the group whole.") from error
    inline(captured)
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    frozen = [
        n.name
        for n, given in zip(inputs, tree_leaves((example, {})), strict=False)
        if isinstance(given, Tensor) and given.ndim and str(n.meta["val"].shape[0]).isdigit()
    ]
    require(
        not frozen,
        f"The model has no graph form: it fixes the batch size of its input '{', '.join(frozen)}'.",
        "Take sizes from its input's shape.",
        SurgeryError,
    )
    known = {
        name
        for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    }
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    constants = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            value = captured.get_submodule(node.target.rpartition(".")[0])
            value = getattr(value, node.target.rpartition(".")[2])
            require(
                isinstance(value, Tensor),
                f"The model has no graph form: its operator {next(iter(node.users)).target} runs a program of its own.",
                "",
                SurgeryError,
            )
            mode = "training" if training else "evaluation"
            constants[f"{mode}_constant_{len(constants)}"] = value.detach()
            node.target = f"{mode}_constant_{len(constants) - 1}"
    _tidy(graph)
    _call_layers(graph, module)
    graph.lint()
    spec = exported.call_spec.out_spec
    assert spec is not None  # noqa: S101  (an export has one)
    named = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in NAMED][: len(example)]
    names = (*named, *(f"input_{place}" for place in range(len(named), len(example))))
    return Program(graph, names, spec, constants)


def _tidy(graph: fx.Graph) -> None:
    """Drop checks that hold sizes and types of the captured run."""
    for node in list(graph.nodes):
        asserts = node.op == "call_function" and "_assert" in str(node.target) and not node.users
        if asserts or (node.op == "call_module" and "guard" in str(node.target)):
            graph.erase_node(node)


def _call_layers(graph: fx.Graph, module: nn.Module) -> None:
    """Make operators that are a whole layer call the layer."""
    layers = dict(module.named_modules())
    for node in list(graph.nodes):
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
        path = path.partition("@")[0]
        layer = layers.get(path)
        if node.op != "call_function" or layer is None or not path or not _is_whole(node, layer, module):
            continue
        with graph.inserting_before(node):
            call = graph.call_module(path, (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in list(graph.nodes):
        counter = (
            node.args and isinstance(node.args[0], fx.Node) and str(node.args[0].target).endswith("num_batches_tracked")
        )
        if node.op == "call_function" and counter and _counts_whole(node, layers):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _is_whole(node: fx.Node, layer: nn.Module, module: nn.Module) -> bool:
    """Whether an operator is all that its layer does."""
    names = WHOLE.get(type(layer), ())
    if _packet(node) not in names:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks  # noqa: SLF001  (their effect is in the graph already)
    weight = getattr(layer, "weight", None)
    used = [a for a in node.all_input_nodes if a.op == "get_attr"]
    mine = weight is None or any(_attribute(module, str(a.target)) is weight for a in used)
    return (
        not hooked and mine and getattr(layer, "padding_mode", "zeros") == "zeros" and isinstance(node.args[0], fx.Node)
    )


def _counts_whole(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether an operator counts the batches of a layer that is called whole, and so counts them itself."""
    first = node.args[0]
    assert isinstance(first, fx.Node)  # noqa: S101  (asked before)
    return type(layers.get(str(first.target).rpartition(".")[0])) in WHOLE and not node.users


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return None
