"""The ONNX file: checked in its engine, at several batch sizes, before it is called written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karui.artifact.files import write_file
from karui.deployment import Deployment
from karui.errors import ArtifactError
from karui.measuring import Engine, OnnxRuntime, known_engine, onnx_form
from karui.measuring import values as json_values
from karui.measuring.engines import outputs_of
from karui.measuring.filed import File, Filed
from karui.measuring.inference import inference, largest_difference, random_batch, tensors_of
from karui.model import Model, doubled
from karui.model.running import double, widened

BATCHES = (1, 2, 5)
RELATIVE = 1e-4
"""Of the largest output. There is no absolute allowance: it would pass anything where outputs are tiny."""
NEIGHBOURS = 4
"""Networks with other last digits that are looked at where rounding has to be told from a wrong result."""
LAST_DIGITS = 16
"""Units in the last place by which their numbers differ: about what the sums of a layer are off by."""
SLACK = 2.0
"""Of the difference that 8 bits made when a file was saved: another machine may round some values the other way."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far the outputs of the ONNX file in its engine are from torch's.

    Settings:
        batches: the batch sizes that were compared, on random inputs.
        difference: the largest absolute difference.
        tolerance: what rounding may explain: in 32 bits, for outputs of this size; in 8, twice what it was when the
            file was saved.
        onnx: whether there was an ONNX file to compare.
        engine: the engine that ran it.
        precision: of the file: "fp32", "int8" or "dynamic int8".
    """

    batches: tuple[int, ...] = BATCHES
    difference: float = 0.0
    tolerance: float = 0.0
    onnx: bool = True
    engine: str = "onnxruntime"
    precision: str = "fp32"

    @property
    def ok(self) -> bool:
        """Whether the outputs are equal, up to the rounding of their precision."""
        return self.difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**json_values.to_json(self), "ok": self.ok}

    def __str__(self) -> str:
        if not self.onnx:
            return "there is no ONNX file to verify"
        sizes = ", ".join(map(str, self.batches))
        word = "equal" if self.ok else "NOT equal"
        name = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}.get(self.engine, self.engine)
        bits = " up to the rounding of 8 bits" if self.precision != "fp32" else ""
        return (
            f"{name} and torch are {word}{bits} at batches {sizes}: "
            f"largest difference {self.difference:.1e}, tolerance {self.tolerance:.1e}"
        )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file that was written: where, its length, and the comparison that it passed."""

    path: Path
    bytes: int
    verification: Verification

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"path": str(self.path), "bytes": self.bytes, "verification": self.verification.to_json()}


def export_onnx(model: Model, path: Path | str) -> Exported:
    """Write the model as one ONNX file, weights inside, for any batch size.

    Raises:
        CaptureError: the model cannot be exported; the message names the operator, where there is one.
        ArtifactError: ONNX Runtime computes something else than torch; nothing is written.
    """
    file, verification = checked_onnx(model)
    write_file(Path(path), file)
    return Exported(path=Path(path), bytes=Filed.size(file), verification=verification)


def checked_onnx(model: Model, deployment: Deployment | None = None) -> tuple[File, Verification]:
    """The ONNX file, and the comparison that they passed; by default the model in 32 bits is exported.

    Raises:
        CaptureError: the model cannot be exported.
        ArtifactError: the file computes something else than the model.
    """
    file = deployment if deployment is not None else onnx_form(model)
    verification = compare_deployment(model, deployment) if deployment is not None else compare_onnx(model, file)
    if not verification.ok:
        raise ArtifactError(
            f"The ONNX file computes something else than the model ({verification}).",
            "Is the model random in evaluation mode? If not, please report this as a defect.",
        )
    return file, verification


def compare_deployment(
    model: Model, deployment: Deployment, batches: tuple[int, ...] = BATCHES, *, tolerance: float | None = None
) -> Verification:
    """Run a deployed form beside the model, in its engine, or in ONNX Runtime where that is not installed.

    Args:
        model: the model that it was made from.
        deployment: the form.
        batches: sizes of seeded random batches.
        tolerance: for 8 bits, the largest difference that passes, as noted when it was saved; None takes what is seen
            now, and only asks that the outputs lie nearer to the model's than nothing does.

    Raises:
        ArtifactError: the file does not run, or takes other inputs.
    """
    engine = known_engine(deployment.engine)
    engine = OnnxRuntime() if engine.missing() else engine
    if deployment.precision == "fp32":
        return compare_onnx(model, deployment, batches, engine=engine)
    difference = error = size = 0.0
    for _, ours, theirs in _outputs(model, deployment, batches, engine):
        difference = max(difference, largest_difference(ours, theirs)[0])
        if math.isfinite(difference):
            pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
            error += sum(((a - b) ** 2)[a.isfinite()].sum().item() for a, b in pairs)
            size += sum((a**2)[a.isfinite()].sum().item() for a, _ in pairs)
    allowed = SLACK * difference if tolerance is None and math.isfinite(difference) and error <= size else 0.0
    return Verification(
        batches=batches,
        difference=difference,
        tolerance=allowed if tolerance is None else tolerance,
        engine=engine.name,
        precision=deployment.precision,
    )


def compare_onnx(
    model: Model, data: bytes | File, batches: tuple[int, ...] = BATCHES, *, engine: Engine | None = None
) -> Verification:
    """Run an ONNX file in 32 bits beside the model, on seeded random inputs of each batch size.

    Raises:
        ArtifactError: the file does not run, or takes other inputs.
    """
    engine = engine or OnnxRuntime()
    worst, allowed = 0.0, 0.0
    for number, (inputs, ours, theirs) in enumerate(_outputs(model, data, batches, engine)):
        difference, scale = largest_difference(ours, theirs)
        tolerance = RELATIVE * scale
        if difference > tolerance:
            tolerance = max(tolerance, 10 * rounding(model, inputs, ours))
        if difference - tolerance > worst - allowed or number == 0:
            worst, allowed = difference, tolerance
    return Verification(batches=batches, difference=worst, tolerance=allowed, engine=engine.name)


def _outputs(
    model: Model, data: bytes | File, batches: tuple[int, ...], engine: Engine
) -> Iterator[tuple[tuple[Any, ...], list[torch.Tensor], list[torch.Tensor]]]:
    """Random inputs of each batch size, the model's outputs, and those of the file."""
    run = engine.prepare(data, 1)
    for size in batches:
        inputs = random_batch(model.example, size, seed=size)
        ours = tensors_of(_run(model, inputs, size))
        try:
            theirs = outputs_of(run(inputs))
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"The ONNX file does not run on a batch of {size}: {line}", "Export the model again."
            ) from error
        yield inputs, ours, theirs


def _run(model: Model, inputs: tuple[Any, ...], size: int) -> Any:
    with inference(model.module) as module:
        try:
            return module(*inputs)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"The model itself does not run on a batch of {size}: {line}",
                "Use x.shape[0] or -1 for the batch dimension in its forward.",
            ) from error


def rounding(model: Model, inputs: tuple[Any, ...], ours: list[torch.Tensor]) -> float:
    """What 32-bit rounding alone does to these outputs.

    Their distance from those in 64 bits, or from those of networks whose numbers differ in their last digits, whichever
    is largest: where activations are rounded to few levels, such a digit decides now and then between two of them.
    """
    return max(_from_64_bits(model, inputs, ours), _from_neighbours(model, inputs, ours))


def _from_64_bits(model: Model, inputs: tuple[Any, ...], ours: list[torch.Tensor]) -> float:
    """Their distance from those in 64 bits; 0 where that fails.

    A network that minds of what precision its parameters are (`nn.LSTM` does) is copied, which takes twice its memory.
    """
    wide = double(inputs)
    try:
        with inference(model.module) as module, widened(module):
            exact = tensors_of(module(*wide))
    except (RuntimeError, ValueError, TypeError):
        exact = _of_a_copy(model, wide)
    difference, _ = largest_difference(ours, exact)
    return difference if difference != float("inf") else 0.0


def _of_a_copy(model: Model, wide: tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs of a copy in 64 bits; none where that fails."""
    try:
        with inference(doubled(model.module)) as module:
            return tensors_of(module(*wide))
    except (RuntimeError, NotImplementedError):  # a kernel for 32 bits only
        return []


@torch.no_grad()
def _from_neighbours(model: Model, inputs: tuple[Any, ...], ours: list[torch.Tensor]) -> float:
    """Their largest distance from those of networks with every parameter and buffer changed in its last digits."""
    worst, draw = 0.0, torch.Generator().manual_seed(0)
    for _ in range(NEIGHBOURS):
        near = model.copy().module
        for tensor in (*near.parameters(), *near.buffers()):
            if tensor.dtype == torch.float32:
                noise = torch.randn(tensor.shape, generator=draw).to(tensor.device)
                tensor.mul_(noise.mul_(LAST_DIGITS * torch.finfo(torch.float32).eps).add_(1))
        with inference(near) as module:
            difference, _ = largest_difference(ours, tensors_of(module(*inputs)))
        del near, module  # the next one takes its place
        worst = max(worst, difference if difference != float("inf") else 0.0)
    return worst
