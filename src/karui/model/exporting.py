"""Capture with `torch.export`, for models that do what a recording does not see."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

from karui.errors import SurgeryError, require
from karui.model.copying import copied
from karui.model.escapes import DataDependentError
from karui.model.inline import inline
from karui.model.program import Program, call_layers, named_inputs
from karui.model.trace import brief, first, mode_of, plain_attention


def export_program(module: nn.Module, example: tuple[Any, ...], *, training: bool) -> Program:
    """One program with a dynamic batch, by `torch.export`.

    Raises:
        SurgeryError: it cannot capture the module, or would freeze the batch size.
    """
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
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        node.meta["layer"] = stack[-1][0].partition("@")[0] if stack else ""
    call_layers(graph, module)
    graph.lint()
    spec = exported.call_spec.out_spec
    assert spec is not None  # noqa: S101  (an export has one)
    return Program(graph, named_inputs(module, example), spec, constants)


def _tidy(graph: fx.Graph) -> None:
    """Drop checks that hold sizes and types of the captured run."""
    for node in list(graph.nodes):
        asserts = node.op == "call_function" and "_assert" in str(node.target) and not node.users
        if asserts or (node.op == "call_module" and "guard" in str(node.target)):
            graph.erase_node(node)


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
