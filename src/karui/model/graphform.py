"""The graph form: a model as its captured program, for cuts that its own forward cannot survive.

A forward that reshapes to numbers frozen in Python (heads, groups, a padding) breaks when channels go. Its program,
captured by `karui.model.program`, has those numbers as arguments, and `karui.model.rewrite` changes them. The program
calls the standard layers as modules, so that they keep their names, can be tapped and replaced, and know training
from evaluation. Where training computes something else, a second program holds it, over the same layers.

The batch is free; every other size of the inputs is that of the example, since numbers that the forward computed from
it (the last step of a sequence) are in the program. Inputs of another size are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from karui.errors import SurgeryError
from karui.model.program import Program


class GraphForm(nn.Module):
    """A network that computes its captured programs over the layers and parameters of the one it was captured from."""

    def __init__(
        self, state: nn.Module, evaluation: Program, training: Program, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.sizes = evaluation.sizes
        for name, child in state.named_children():
            self.add_module(name, child)
        for name, parameter in state.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        transient = state._non_persistent_buffers_set  # noqa: SLF001  (there is no public way to ask)
        for name, buffer in state.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in transient)
        for name, value in {**evaluation.constants, **training.constants}.items():
            wide = dtype is not None and value.dtype is torch.float32
            self.register_buffer(name, value.to(dtype) if wide else value, persistent=False)
        own = _kind(self)
        self.captured = (evaluation, training, torch.float32 if dtype is not None else own)
        self.compile_for(dtype or own)
        self.train(state.training)

    def compile_for(self, dtype: torch.dtype) -> None:
        """Write the programs for parameters of this type."""
        evaluation, training, before = self.captured
        run = evaluation.compiled(before, dtype)
        self.programs = {
            False: (run, evaluation.outputs),
            True: (run if training is evaluation else training.compiled(before, dtype), training.outputs),
        }
        self.written_for = dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GraphForm:
        """What `double`, `half` and `to` call; a program says of what type a first state is, so it follows."""
        super()._apply(fn, recurse)
        if _kind(self) != self.written_for:
            self.compile_for(_kind(self))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphForm:
        """A copy with layers and parameters of its own; the programs never change, and are shared."""
        for shared in (self.programs, self.captured):  # also, torch's tree specs warn when they are copied
            memo[id(shared)] = shared
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    def compute(self, *inputs: Any) -> Any:
        """The program of the current mode."""
        run, outputs = self.programs[self.training]
        flat, _ = tree_flatten((inputs, {}))
        for given, size in zip(flat, self.sizes, strict=False):
            if size is not None and tuple(given.shape[1:]) != size:
                told = f"inputs of {_told(size)} beside the batch, and was given {_told(given.shape[1:])}"
                hint = "Its program holds for that size: cut the dense model with an example of the size it is to take."
                raise SurgeryError(f"This network was cut for {told}.", hint)
        return tree_unflatten(run(self, *flat), outputs)


def _kind(module: nn.Module) -> torch.dtype:
    """The type of a module's numbers: of its first parameter or buffer that has any."""
    held = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in held if t.is_floating_point()), torch.float32)


def _told(size: tuple[int, ...]) -> str:
    """A size in words."""
    return "x".join(map(str, size)) or "single numbers"


@cache
def _class_for(inputs: tuple[str, ...]) -> type[GraphForm]:
    """A graph form whose forward takes inputs of these names, which exporters look at."""
    space: dict[str, Any] = {}
    names = ", ".join(inputs)
    exec(f"def forward(self, {names}):\n    return self.compute({names})", space)  # noqa: S102  (names of parameters)
    return type("GraphForm", (GraphForm,), {"forward": space["forward"], "__doc__": GraphForm.__doc__})


def graph_form(state: nn.Module, evaluation: Program, training: Program, dtype: torch.dtype | None = None) -> GraphForm:
    """The graph form of two programs over the layers of `state`; float32 may be another type."""
    return _class_for(evaluation.inputs)(state, evaluation, training, dtype)
