"""Captured programs that hold others, run without gradients or without autocast: put in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def inline(captured: fx.GraphModule) -> None:
    """Put programs that run under a mode of their own (without gradients, without autocast) in the main one's place."""
    graph = captured.graph
    while True:
        wrapped = next((n for n in graph.nodes if str(n.target) in WRAPPERS), None)
        if wrapped is None:
            return
        enter, leave, places = WRAPPERS[str(wrapped.target)]
        body = wrapped.args[places]
        assert isinstance(body, fx.Node)  # noqa: S101  (the exporter puts it there)
        inner = captured.get_submodule(str(body.target))
        assert isinstance(inner, fx.GraphModule)  # noqa: S101  (as above)
        with graph.inserting_before(wrapped):
            before = enter(graph, wrapped.args[:places])
            mapping = dict(
                zip((n for n in inner.graph.nodes if n.op == "placeholder"), wrapped.args[places + 1 :], strict=True)
            )
            made = graph.graph_copy(inner.graph, mapping)
            leave(graph, before)
        for inside, node in mapping.items():
            if inside.op == "get_attr":
                node.target = f"{body.target}.{inside.target}"
        for user in list(wrapped.users):
            user.replace_all_uses_with(made[user.args[1]])  # pyright: ignore[reportArgumentType, reportIndexIssue, reportOptionalSubscript]
            graph.erase_node(user)
        graph.erase_node(wrapped)
        if not body.users:
            graph.erase_node(body)


def _enter_grad(graph: fx.Graph, given: Sequence[Any]) -> fx.Node:
    before = graph.call_function(torch.is_grad_enabled)
    graph.call_function(torch._C._set_grad_enabled, tuple(given))  # noqa: SLF001  (what torch.no_grad itself calls)
    return before


def _leave_grad(graph: fx.Graph, before: fx.Node) -> None:
    graph.call_function(torch._C._set_grad_enabled, (before,))  # noqa: SLF001  (as above)


def _enter_autocast(graph: fx.Graph, given: Sequence[Any]) -> fx.Node:
    return graph.call_function(torch.amp.autocast_mode._enter_autocast, tuple(given))  # noqa: SLF001  (made for graphs)


def _leave_autocast(graph: fx.Graph, before: fx.Node) -> None:
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (before,))  # noqa: SLF001  (made for graphs)


# Operators that run a program under a mode: how it is entered and left, and how many arguments say which.
WRAPPERS: dict[str, tuple[Callable[..., fx.Node], Callable[..., None], int]] = {
    "wrap_with_set_grad_enabled": (_enter_grad, _leave_grad, 1),
    "wrap_with_autocast": (_enter_autocast, _leave_autocast, 4),
}
