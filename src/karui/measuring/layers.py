"""Time, multiply-accumulates, parameters and bytes, layer by layer.

The times of layers do not add up to that of the model: a hook in torch, or the recorder of ONNX Runtime, costs a few
microseconds each time. They show where the time goes; how long the model takes is the clock's to say.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from karui.errors import UsageError, require
from karui.measuring import values
from karui.measuring.count import count
from karui.measuring.engines import Engine, OnnxRuntime, Torch, onnx_session
from karui.measuring.hollow import Hollow
from karui.measuring.inference import batch_of, inference, tensors_of
from karui.measuring.onnx import OnnxForm, onnx_form
from karui.model import Model

if TYPE_CHECKING:
    import onnx

HEAVY = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")
"""Operators that an engine melts others into: the whole is booked to the layer of the operator itself."""
KERNEL = "_kernel_time"
"""How the recorder's name of an operator's own time ends."""
_ADDED = re.compile(r"^fused |/.*$|_nchwc$|_token_\d+$|(_MatMul)?_quant$")


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One layer.

    Settings:
        path: its name in the model; empty for what the model does outside its layers.
        kind: its class.
        seconds: median time of the layer itself, without layers inside it.
        macs: multiply-accumulates for one sample.
        parameters: parameters it owns.
        bytes: bytes of those.
    """

    path: str
    kind: str
    seconds: float
    macs: int = 0
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The layers of a model, in an engine.

    Settings:
        engine, batch, threads: how it was run.
        layers: in the order of the model.
        rest: seconds that the engine spent on operators of its own, such as changes of layout, or a sum that it
            computes together with the normalisation behind it.
    """

    engine: str
    batch: int
    threads: int
    layers: tuple[LayerTime, ...] = ()
    rest: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> LayerTimes:
        """The value that `to_json` wrote."""
        return values.from_json(cls, saved)


def layer_times(
    model: Model, *, engine: Engine | None = None, batch: int = 1, threads: int = 1, rounds: int = 21
) -> LayerTimes:
    """Where the time goes: each layer's own time, median over `rounds` calls, beside its cost.

    Raises:
        CaptureError: the engine is ONNX Runtime and the model cannot be exported.
        UsageError: the engine does not tell the time of layers.

    Example:
        >>> net = Model(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), example=(torch.zeros(1, 4),))
        >>> [(layer.path, layer.kind, layer.macs) for layer in layer_times(net).layers if layer.path]
        [('0', 'Linear', 32), ('1', 'ReLU', 0)]
    """
    engine = engine or Torch()
    if isinstance(engine, Torch):
        seconds, rest = _torch_times(model, batch, threads, rounds), 0.0
    else:
        require(
            isinstance(engine, OnnxRuntime),
            f"{engine.name} does not tell the time of layers.",
            "Use Torch() or OnnxRuntime().",
            UsageError,
        )
        seconds, rest = _onnx_times(model, batch, threads, rounds)
    counts = {layer.path: layer for layer in count(model).layers}
    layers = []
    for path, part in model.module.named_modules():
        if path in seconds or path in counts:
            known = counts.get(path)
            layers.append(
                LayerTime(
                    path=path,
                    kind=type(part).__name__,
                    seconds=seconds.get(path, 0.0),
                    macs=known.macs if known else 0,
                    parameters=known.parameters if known else 0,
                    bytes=sum(p.numel() * p.element_size() for p in part.parameters(recurse=False)),
                )
            )
    return LayerTimes(engine=engine.name, batch=batch, threads=threads, layers=tuple(layers), rest=rest)


def _torch_times(model: Model, batch: int, threads: int, rounds: int) -> dict[str, float]:
    inputs, before = batch_of(model.example, batch), torch.get_num_threads()
    stopwatch = _Stopwatch()
    torch.set_num_threads(threads)
    try:
        with inference(model.module) as module, stopwatch.watching(module):
            module(*inputs)
            stopwatch.rounds.clear()
            for _ in range(rounds):
                stopwatch.rounds.append({})
                module(*inputs)
    finally:
        torch.set_num_threads(before)
    leaves = {path for path, part in model.module.named_modules() if not list(part.children())}
    paths = dict.fromkeys(path for found in stopwatch.rounds for path in found)
    times = {path: median(found.get(path, 0.0) for found in stopwatch.rounds) for path in paths}
    owners = {path for path, part in model.module.named_modules() if list(part.parameters(recurse=False))}
    inner = sum(t for path, t in times.items() if path not in leaves | owners)
    kept = {path: t for path, t in times.items() if path in leaves | owners}
    # What containers do between their layers (sums, reshapes) is the model's own.
    return {"": kept.pop("", 0.0) + inner, **kept} if inner > 0.01 * sum(times.values()) else kept


@dataclass
class _Stopwatch:
    """Each module's time without the modules that it calls."""

    rounds: list[dict[str, float]] = field(default_factory=lambda: [{}])
    _open: list[list[float]] = field(default_factory=list)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        handles = []
        for path, part in module.named_modules():
            if not isinstance(part, torch.jit.ScriptModule):
                handles.append(part.register_forward_pre_hook(self._enter))
                handles.append(part.register_forward_hook(self._leave(path)))
        self.rounds.append({})
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        del module, args
        self._open.append([time.perf_counter(), 0.0])

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args, output
            start, inside = self._open.pop()
            whole = time.perf_counter() - start
            found = self.rounds[-1]
            found[path] = found.get(path, 0.0) + whole - inside
            if self._open:
                self._open[-1][1] += whole

        return hook


def _onnx_times(model: Model, batch: int, threads: int, rounds: int) -> tuple[dict[str, float], float]:
    form = onnx_form(model)
    arrays = [t.numpy() for t in tensors_of(batch_of(model.example, batch))]
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        session = onnx_session(form, threads, profile=str(Path(folder) / "profile"))
        feed = dict(zip([put.name for put in session.get_inputs()], arrays, strict=True))
        for _ in range(rounds + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            taken.setdefault((event["name"], event["args"]["op_name"]), []).append(event["dur"] * 1e-6)
    layer_of = _layer_finder(form)
    times, rest = {}, 0.0
    for (name, operator), found in taken.items():
        path = layer_of(name, operator)
        once = median(found[1:] or found) * len(found) / (rounds + 1)  # the first call is never typical
        if path is None:
            rest += once
        else:
            times[path] = times.get(path, 0.0) + once
    return times, rest


def graph_name(name: str) -> str:
    """The name that a graph has for what ONNX Runtime has melted with others, or made anew, and named after it.

    Example:
        >>> [graph_name(name) for name in ("fused node_linear", "node_mul/MatMulScaleFusion/", "node_conv_token_7")]
        ['node_linear', 'node_mul', 'node_conv']
    """
    return _ADDED.sub("", name)


def _layer_finder(form: OnnxForm) -> Any:
    """From the name of what the engine ran to the layer that it came from; None for what the engine added itself."""
    graph = Hollow(form).proto.graph
    makers: dict[str, onnx.NodeProto] = {value: node for node in graph.node for value in node.output}
    nodes = {**makers, **{node.name: node for node in graph.node}}

    def find(name: str, operator: str) -> str | None:
        name = name.removesuffix(KERNEL)
        node = nodes.get(name) or nodes.get(graph_name(name))
        if node is None:
            return None
        if operator in HEAVY:
            # The engine names what it melted together after the last operator: go back to the heavy one.
            queue = [node]
            while queue:
                step = queue.pop(0)
                if step.op_type in HEAVY:
                    return form.layers[step.name]
                queue += [makers[value] for value in step.input if value in makers]
        return form.layers[node.name]

    return find
