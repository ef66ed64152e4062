"""Engines that run a model: torch itself, ONNX Runtime (what people deploy on), OpenVINO."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from karui.errors import UsageError, require
from karui.measuring.filed import File, write
from karui.measuring.inference import tensors_of
from karui.measuring.onnx import onnx_form
from karui.model import Model

Run = Callable[[tuple[Any, ...]], Any]
"""One inference: inputs in, whatever the engine returns out (tensors or arrays, see `outputs_of`)."""


@runtime_checkable
class Engine(Protocol):
    """Runs a model, or an ONNX file (or its bytes), on a number of threads."""

    @property
    def name(self) -> str:
        """The engine's name, as printed."""
        ...

    def missing(self) -> str:
        """Why the engine cannot be used here; empty where it can."""
        ...

    def version(self) -> str:
        """Its version."""
        ...

    def prepare(self, model: Model | bytes | File, threads: int) -> Run:
        """A function that runs one batch of inputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Torch:
    """PyTorch, eager, as the module is.

    The number of threads is global in torch: each run sets it, and whoever times several puts it back.
    """

    name: str = field(default="torch", init=False)

    def missing(self) -> str:
        """Always there."""
        return ""

    def version(self) -> str:
        """Torch's version."""
        return torch.__version__

    def prepare(self, model: Model | bytes | File, threads: int) -> Run:
        """Run the module without gradients.

        Raises:
            UsageError: an ONNX file was given.
        """
        if not isinstance(model, Model):
            raise UsageError("The torch engine cannot run an ONNX file.", "Time it in OnnxRuntime().")
        module = model.module

        def run(inputs: tuple[Any, ...]) -> Any:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                return module(*inputs)

        return run


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU, all graph optimisations on: the engine that people deploy on."""

    name: str = field(default="onnxruntime", init=False)

    def missing(self) -> str:
        """A reason where the package is not installed."""
        return "" if importlib.util.find_spec("onnxruntime") else "onnxruntime is not installed"

    def version(self) -> str:
        """The package's version."""
        return metadata.version("onnxruntime")

    def prepare(self, model: Model | bytes | File, threads: int) -> Run:
        """A session over the model's ONNX form.

        Raises:
            CaptureError: the model cannot be exported.
            UsageError: the session cannot be made, or the inputs do not fit.
        """
        session = onnx_session(onnx_form(model) if isinstance(model, Model) else model, threads)
        names = [put.name for put in session.get_inputs()]

        def run(inputs: tuple[Any, ...]) -> Any:
            arrays = [t.numpy() for t in tensors_of(inputs)]
            return session.run(None, dict(zip(names, arrays, strict=True)))

        return run


def onnx_session(data: bytes | File | Path, threads: int, *, profile: str | None = None, prepack: bool = True) -> Any:
    """An ONNX Runtime session over a file or its bytes.

    Args:
        data: the file, its bytes or its path.
        threads: number of threads.
        profile: a prefix of file names, with which it writes a profile.
        prepack: whether weights are copied in the order that kernels like: faster, and a second copy of them.

    Raises:
        UsageError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Idle workers of a session spin for a while after a run, and would slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        with tempfile.TemporaryDirectory(prefix="karui-") as folder:
            file = data if isinstance(data, Path) else Path(folder) / "model.onnx"
            # A session over bytes would hold them beside what it makes of them.
            if isinstance(data, bytes):
                file.write_bytes(data)
            elif not isinstance(data, Path):
                write(data, file)
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UsageError(*_not_opened(error)) from error


def _not_opened(error: Exception) -> tuple[str, str]:
    """Why ONNX Runtime refuses a file, and the remedy."""
    line = str(error).strip().partition("\n")[0]
    lacking = re.search(r"NOT_IMPLEMENTED.*Could not find an implementation for (\w+)\(", line)
    if lacking is None:
        return f"ONNX Runtime cannot open the model: {line}", "Export it again."
    why = f"it has no kernel for the operator {lacking[1]} in the precision that the model uses it in."
    remedy = "Use 32 bits: model.float(), and data as float32; or replace the layer that uses this operator."
    return f"ONNX Runtime cannot open the model: {why}", remedy


@dataclass(frozen=True, kw_only=True)
class OpenVino:
    """OpenVINO on the CPU; an optional extra."""

    name: str = field(default="openvino", init=False)

    def missing(self) -> str:
        """A reason where the package is not installed."""
        return (
            "" if importlib.util.find_spec("openvino") else "openvino is not installed (pip install 'karui[openvino]')"
        )

    def version(self) -> str:
        """The package's version."""
        return metadata.version("openvino")

    def prepare(self, model: Model | bytes | File, threads: int) -> Run:
        """A compiled model, in latency mode, with 32-bit arithmetic.

        Raises:
            CaptureError: the model cannot be exported.
            UsageError: OpenVINO refuses the file.
        """
        import openvino

        file = onnx_form(model) if isinstance(model, Model) else model
        data = file if isinstance(file, bytes) else file.data
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        try:
            request = core.compile_model(core.read_model(data), "CPU", settings).create_infer_request()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise UsageError(f"OpenVINO cannot open the model: {line}", "Time it in OnnxRuntime() only.") from error

        def run(inputs: tuple[Any, ...]) -> Any:
            arrays = [t.numpy() for t in tensors_of(inputs)]
            return list(request.infer(arrays).values())

        return run


def outputs_of(values: Any) -> list[torch.Tensor]:
    """What an engine's run returned, as tensors."""
    if isinstance(values, list) and values and not isinstance(values[0], torch.Tensor):
        return [torch.as_tensor(array) for array in values]
    return tensors_of(values)


def known_engine(name: str) -> Engine:
    """The engine of that name, as a command line gives it.

    Raises:
        UsageError: there is none.
    """
    engines: dict[str, Engine] = {e.name: e for e in (OnnxRuntime(), Torch(), OpenVino())}
    require(name in engines, f"Engine '{name}' is not known.", f"Known: {', '.join(engines)}.", UsageError)
    return engines[name]
