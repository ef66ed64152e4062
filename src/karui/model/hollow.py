"""A cut model whose weights are there only while it runs: a proof holds the whole model twice, and large ones are few.

They are indices of the whole model's, so they can be had again, to the bit, as long as that is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.model.copying import doubled
from karui.model.walking import named_buffers, named_parameters

if TYPE_CHECKING:
    from types import TracebackType


LARGE = 2**13
"""Values of a weight that makes room: with the many small ones that takes time and saves little."""


def smaller(module: nn.Module, kept: list[Any]) -> dict[int, Any]:
    """The given indices of the given tensors, by the identity of the whole ones: a memo for `copy.deepcopy`.

    So every reference to a tensor, shared names and a recurrent layer's own list included, finds the smaller one.
    """
    known: dict[str, Tensor] = {**named_parameters(module), **named_buffers(module)}
    memo: dict[int, Any] = {}
    for name, value in selected(known, kept):
        tensor = known[name]
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return memo


def selected(known: Mapping[str, Tensor], kept: list[Any]) -> Iterator[tuple[str, Tensor]]:
    """The given indices of each of the given tensors, one tensor after the other."""
    wanted: dict[str, list[tuple[int, list[int]]]] = {}
    for name, dim, indices in kept:
        wanted.setdefault(name, []).append((dim, indices))
    indexes: dict[tuple[int, ...], Tensor] = {}  # coupled tensors keep the same ones
    for name, cuts in wanted.items():
        if name in known:
            value = known[name].detach()
            for dim, indices in cuts:
                stay = tuple(indices)
                if stay not in indexes:
                    indexes[stay] = torch.tensor(indices)
                value = value.index_select(dim, indexes[stay].to(value.device))
            yield name, value


class Hollow:
    """A cut model of a whole one, without its large weights from the entry to the exit, but where they are asked for.

    Weights that it shares with the whole model, or that the whole one does not have, stay where they are.
    """

    def __init__(self, module: nn.Module, whole: nn.Module, kept: list[Any]) -> None:
        large = {name: p for name, p in named_parameters(module).items() if p.numel() >= LARGE}
        theirs = named_parameters(whole) if large else {}
        self.module = module
        self.pairs = {name: (p, theirs[name]) for name, p in large.items() if name in theirs and _own(p, theirs[name])}
        self.kept = [each for each in kept if each[0] in self.pairs]

    def __enter__(self) -> Hollow:
        self.empty()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.fill()

    def empty(self) -> None:
        """Let the large weights go."""
        for p, _ in self.pairs.values():
            p.data = p.data.new_empty(0)

    @contextmanager
    def filled(self) -> Iterator[nn.Module]:
        """The model with its weights; without the large ones afterwards."""
        self.fill()
        try:
            yield self.module
        finally:
            self.empty()

    def fill(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with its weights, the large ones in a wider precision if one is given: that rounds nothing."""
        for name, value in self._missing(dtype):
            self.pairs[name][0].data = value
        for p, q in self.pairs.values():
            if p.dtype is not (dtype or q.dtype):
                p.data = p.detach().to(dtype or q.dtype)
        return self.module

    def doubled(self) -> nn.Module:
        """A copy with its weights, in double precision."""
        twin = doubled(self.module)
        theirs = named_parameters(twin)
        for name, value in self._missing(torch.float64):
            theirs[name].data = value
        return twin

    def _missing(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The weights that are not there, one after the other."""
        gone = {name: q for name, (p, q) in self.pairs.items() if not p.numel()}
        cut = set()
        for name, value in selected(gone, self.kept):
            cut.add(name)
            yield name, value if dtype is None else value.to(dtype)
        for name, q in gone.items():
            if name not in cut:
                yield name, q.detach().to(q.dtype if dtype is None else dtype, copy=True)


def _own(p: nn.Parameter, q: nn.Parameter) -> bool:
    """Whether a plain parameter lies elsewhere than that of the same name."""
    return (
        type(p) is type(q) is nn.Parameter
        and p.is_floating_point()
        and p.layout is torch.strided
        and p.dtype is q.dtype
        and p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    )
