"""Peak memory of one inference: what a process needs on top of the engine itself.

- torch: the bytes of parameters and buffers, plus the peak that torch's own CPU allocator reports during one call
  (each allocation and release is recorded, so the figure is exact and repeats). Scratch memory that a library takes
  past torch's allocator is not in it.
- ONNX Runtime and OpenVINO: a fresh process loads the engine, notes its memory, loads the model and runs one batch on
  one thread; the figure is the growth of the peak resident memory (Linux only), good to a few hundred
  kilobytes. Weights, the engine's copies of them and its arenas are all in it.

The two are not comparable with each other; each is comparable between two models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from karui.errors import KaruiError
from karui.measuring.engines import Engine, OnnxRuntime, OpenVino, Torch
from karui.measuring.filed import write
from karui.measuring.inference import batch_of, inference, tensors_of
from karui.measuring.onnx import onnx_form
from karui.measuring.values import bytes_text
from karui.model import Model

SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of one inference of a batch in an engine, on one thread."""

    engine: str
    batch: int
    bytes: int

    def __str__(self) -> str:
        return f"peak memory ({self.engine}, batch {self.batch}): {bytes_text(self.bytes)}"


def peak_memory(
    model: Model, engines: Iterable[Engine], batches: Iterable[int]
) -> tuple[tuple[Memory, ...], tuple[str, ...]]:
    """Peak memory in each engine and batch size, and a reason for each that cannot be measured."""
    found, reasons = [], []
    for engine in engines:
        for batch in batches:
            try:
                size = _peak(model, engine, batch)
            except (KaruiError, RuntimeError, OSError) as error:
                reasons.append(f"peak memory in {engine.name} not measured: {str(error).partition(chr(10))[0]}")
                break
            found.append(Memory(engine=engine.name, batch=batch, bytes=size))
    return tuple(found), tuple(reasons)


def _peak(model: Model, engine: Engine, batch: int) -> int:
    if reason := engine.missing():
        raise RuntimeError(reason)
    if isinstance(engine, Torch):
        return torch_peak(model, batch)
    if isinstance(engine, (OnnxRuntime, OpenVino)):
        return _process_peak(model, engine.name, batch)
    raise RuntimeError("no way to look into this engine")


def torch_peak(model: Model, batch: int) -> int:
    """Bytes of parameters and buffers, and the peak of torch's CPU allocator in one call."""
    from torch.profiler import ProfilerActivity, profile

    # The recorder writes to the terminal at each start and stop, unless its log level is above all there are.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    inputs = batch_of(model.example, batch)
    with inference(model.module) as module:
        module(*inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            outputs = module(*inputs)
    del outputs
    live = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _held(model.module)}  # noqa: SLF001
    return peak + sum(held.values()) + sum(t.numel() * t.element_size() for t in tensors_of(inputs))


def _held(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


_PROBE = """
import json, pathlib, sys
import numpy as np

def peak():
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024

engine, model, inputs = sys.argv[1:]
arrays = [np.load(path) for path in json.loads(inputs)]
if engine == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    def load(path):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [put.name for put in session.get_inputs()]
        return lambda: session.run(None, dict(zip(names, arrays)))
else:
    import openvino
    core = openvino.Core()
    core.get_versions("CPU")
    def load(path):
        request = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1}).create_infer_request()
        return lambda: request.infer(arrays)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
load(model)()
print(json.dumps(peak() - before))
"""


def _process_peak(model: Model, engine: str, batch: int) -> int:
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("this system does not report a process's peak memory")
    with tempfile.TemporaryDirectory(prefix="karui-") as name:
        folder = Path(name)
        write(onnx_form(model), folder / "model.onnx")
        paths = []
        for number, tensor in enumerate(tensors_of(batch_of(model.example, batch))):
            paths.append(str(folder / f"{number}.npy"))
            np.save(paths[-1], tensor.numpy(), allow_pickle=False)
        words = [sys.executable, "-c", _PROBE, engine, str(folder / "model.onnx"), json.dumps(paths)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the process died"])[-1])
    return int(json.loads(done.stdout))
