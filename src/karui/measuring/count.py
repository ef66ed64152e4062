"""Parameters and multiply-accumulates, layer by layer.

Convention: a multiply-accumulate (MAC) is one multiplication with its addition. Counted are convolutions, linear layers
and matrix products, those of attention and of recurrent layers included, and whatever reaches them by a function call,
for **one** sample. Not counted: normalisation, biases, activations, pooling, element-wise arithmetic. Zeros count as
any other weight does: a dense engine multiplies them; `nonzero` tells how many there are. Layers with a kernel of their
own are counted in their plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from karui.measuring import values
from karui.measuring.inference import batch_of, inference, tensors_of
from karui.measuring.values import count_text
from karui.model import Model
from karui.numerics.kernels import plain

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LayerCount:
    """One layer: a module that owns parameters or does multiply-accumulates.

    Settings:
        path: its name in the model; empty for the model itself.
        kind: its class.
        parameters: parameters it owns; one shared with an earlier layer counts there only.
        nonzero: those that are not zero.
        macs: multiply-accumulates for one sample.
        output_shape: shape of its (last call's first) output for one sample; empty where it was not called.
    """

    path: str
    kind: str
    parameters: int
    nonzero: int
    macs: int
    output_shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model holds and does for one sample; the layers add up to the totals."""

    parameters: int
    nonzero: int
    macs: int
    layers: tuple[LayerCount, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)

    def __str__(self) -> str:
        return f"{count_text(self.parameters)} parameters, {count_text(self.macs)} MACs"


def count(model: Model) -> Counts:
    """Parameters and multiply-accumulates of one sample.

    The model runs once, in evaluation mode, on the first sample of its example.

    Example:
        >>> counts = count(Model(nn.Linear(4, 2), example=(torch.zeros(3, 4),)))
        >>> counts.parameters, counts.macs
        (10, 8)
    """
    module = model.module
    ledger = _Ledger(module)
    with inference(module), plain(), _plain_attention(), ledger.watching(), ledger:
        module(*batch_of(model.example, 1))
    layers, seen = [], set()
    for path, part in module.named_modules():
        own = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for p in own)
        macs = ledger.macs.get(path, 0)
        if own or macs:
            layers.append(
                LayerCount(
                    path=path,
                    kind=type(part).__name__,
                    parameters=sum(p.numel() for p in own),
                    nonzero=sum(int(torch.count_nonzero(p)) for p in own),
                    macs=macs,
                    output_shape=ledger.shapes.get(path, ()),
                )
            )
    return Counts(
        parameters=sum(layer.parameters for layer in layers),
        nonzero=sum(layer.nonzero for layer in layers),
        macs=sum(layer.macs for layer in layers),
        layers=tuple(layers),
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention layers in their step-by-step form: the fused one is a single operator that belongs to no layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _recurrent(args: tuple[Any, ...]) -> int:
    """Each step multiplies by the weights of the input and those of the state."""
    return math.prod(args[0].shape[:-1]) * (args[1].numel() + args[2].numel())


# Operators whose cost torch's own registry does not know. A kernel of ours registers there
# (`torch.utils.flop_counter.register_flop_formula`, two operations for a multiply-accumulate).
_OWN: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten._scaled_dot_product_flash_attention_for_cpu: (  # noqa: SLF001
        lambda args: sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape) // 2
    ),
    _aten.mv: lambda args: args[0].numel(),
    _aten.addmv: lambda args: args[1].numel(),
    _aten.dot: lambda args: args[0].numel(),
    _aten.vdot: lambda args: args[0].numel(),
    _aten._trilinear: lambda args: math.prod(torch.broadcast_shapes(*_expanded(*args[:6]))),  # noqa: SLF001
}


def _operator_macs(packet: Any, args: tuple[Any, ...], out: Any) -> int:
    """Multiply-accumulates of one call of a known operator."""
    if packet in _OWN:
        return _OWN[packet](args)
    return flop_registry[packet](*args, out_val=out) // 2


def _expanded(*args: Any) -> list[tuple[int, ...]]:
    """The shapes of `_trilinear`'s operands once their missing dimensions are put in."""
    shapes = []
    for tensor, places in zip(args[:3], args[3:], strict=True):
        shape = list(tensor.shape)
        for place in places:
            shape.insert(place, 1)
        shapes.append(tuple(shape))
    return shapes


@dataclass
class _Calls:
    """Paths of the modules that are running, innermost last."""

    running: list[str] = field(default_factory=lambda: [""])


class _Ledger(TorchDispatchMode):
    """Books the multiply-accumulates of each operator to a layer.

    An operator belongs to the module that runs, if one of its operands is that module's own parameter; else to the
    owner of the parameter it reads (a function call, a captured graph); else to the module that runs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.macs: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._module = module
        self._calls = _Calls()
        self._owners: dict[int, list[str]] = {}
        for path, part in module.named_modules():
            for parameter in part.parameters(recurse=False):
                self._owners.setdefault(_storage(parameter), []).append(path)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for path, part in self._module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                handles.append(part.register_forward_pre_hook(self._enter(path)))
                handles.append(part.register_forward_hook(self._leave(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            del module, args
            self._calls.running.append(path)

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            self._calls.running.pop()
            first = next(iter(tensors_of(output)), None)
            if first is not None:
                self.shapes[path] = tuple(first.shape)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        packet = func._overloadpacket  # noqa: SLF001
        known = packet in flop_registry or packet in _OWN
        if not known and func is not torch.ops.prim.device.default:
            with self:
                split = func.decompose(*args, **kwargs)
            if split is not NotImplemented:
                return split
        out = func(*args, **kwargs)
        macs = _operator_macs(packet, args, out) if known else 0
        if macs:
            path = self._layer(args)
            self.macs[path] = self.macs.get(path, 0) + macs
        return out

    def _layer(self, args: Any) -> str:
        running = self._calls.running[-1]
        owners = [path for t in tensors_of(args) for path in self._owners.get(_storage(t), ())]
        return running if running in owners or not owners else owners[0]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001
