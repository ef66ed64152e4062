"""A model's captured computation, for its graph form.

A program calls the standard layers as modules; what lies between them is plain operators, whose arguments repeat the
sizes that Python computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec

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


@dataclass(frozen=True)
class Program:
    """A captured computation.

    Settings:
        graph: its operators; parameters, buffers and whole layers are named by their paths.
        inputs: the names of the inputs.
        outputs: how the flat outputs are put together.
        constants: tensors that it made once, by name.
        twin: the program that it is but for statistics of the batch, so that sizes stand where they do there.
        recorded: whether it was recorded (`karui.model.recording`), not exported.
        sizes: the size of each tensor that goes in, without the batch; None where it has none (numbers).
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: TreeSpec
    constants: dict[str, Tensor] = field(default_factory=dict)
    twin: Program | None = None
    recorded: bool = False
    sizes: tuple[tuple[int, ...] | None, ...] = ()

    def compiled(self, before: torch.dtype = torch.float32, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """A function of the module that holds the parameters, and the flat inputs; type `before` may be another one.

        It is so everywhere, also where the module asked for single precision by name: a program cannot tell that from
        the type of an input.
        """
        graph = self.graph
        if dtype is not None and dtype is not before:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.graph, {}))
            for node in graph.nodes:  # operators take a type by itself, never in a list
                if any(a is before for a in node.args):
                    node.args = tuple([dtype if a is before else a for a in node.args])
                if any(a is before for a in node.kwargs.values()):
                    node.kwargs = {name: dtype if a is before else a for name, a in node.kwargs.items()}
        code = graph.python_code("self")
        space = dict(code.globals)
        exec(code.src, space)  # noqa: S102  (the code is that of the graph, written by torch.fx)
        return space["forward"]


def named_inputs(module: nn.Module, example: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of a module's inputs."""
    named = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in NAMED][: len(example)]
    return (*named, *(f"input_{place}" for place in range(len(named), len(example))))


def call_layers(graph: fx.Graph, module: nn.Module) -> None:
    """Make operators that are a whole layer call the layer; `meta["layer"]` is the path of the one that ran them."""
    layers = dict(module.named_modules())
    for node in list(graph.nodes):
        path = node.meta.get("layer", "")
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
    if packet(node) not in names:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks  # noqa: SLF001  (their effect is in the graph already)
    weight = getattr(layer, "weight", None)
    used = [a for a in node.all_input_nodes if a.op == "get_attr"]
    mine = weight is None or any(attribute(module, str(a.target)) is weight for a in used)
    return (
        not hooked and mine and getattr(layer, "padding_mode", "zeros") == "zeros" and isinstance(node.args[0], fx.Node)
    )


def _counts_whole(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether an operator counts the batches of a layer that is called whole, and so counts them itself."""
    first = node.args[0]
    assert isinstance(first, fx.Node)  # noqa: S101  (asked before)
    return type(layers.get(str(first.target).rpartition(".")[0])) in WHOLE and not node.users


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a path; None where there is none."""
    owner, _, leaf = path.rpartition(".")
    try:
        return getattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return None


def packet(node: fx.Node) -> str:
    """The name of a node's operator, without its overload."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
