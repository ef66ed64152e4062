"""The ONNX file: checked in ONNX Runtime, at several batch sizes, before it is called written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karui.artifact.files import write_file
from karui.errors import ArtifactError
from karui.measuring import onnx_form
from karui.measuring import values as json_values
from karui.measuring.engines import onnx_session, outputs_of
from karui.measuring.inference import inference, largest_difference, random_batch, tensors_of
from karui.model import Model

BATCHES = (1, 2, 5)
RELATIVE = 1e-4
"""Of the largest output. There is no absolute allowance: it would pass anything where outputs are tiny."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far ONNX Runtime's outputs are from torch's.

    Settings:
        batches: the batch sizes that were compared, on random inputs.
        difference: the largest absolute difference.
        tolerance: what rounding may explain, for outputs of this size.
        onnx: whether there was an ONNX file to compare.
    """

    batches: tuple[int, ...] = BATCHES
    difference: float = 0.0
    tolerance: float = 0.0
    onnx: bool = True

    @property
    def ok(self) -> bool:
        """Whether the outputs are equal, up to rounding."""
        return self.difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**json_values.to_json(self), "ok": self.ok}

    def __str__(self) -> str:
        if not self.onnx:
            return "there is no ONNX file to verify"
        sizes = ", ".join(map(str, self.batches))
        word = "equal" if self.ok else "NOT equal"
        return (
            f"ONNX Runtime and torch are {word} at batches {sizes}: "
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
    data, verification = checked_onnx(model)
    write_file(Path(path), data)
    return Exported(path=Path(path), bytes=len(data), verification=verification)


def checked_onnx(model: Model) -> tuple[bytes, Verification]:
    """The bytes of the ONNX file, and the comparison that they passed.

    Raises:
        CaptureError: the model cannot be exported.
        ArtifactError: ONNX Runtime computes something else than torch.
    """
    data = onnx_form(model).data
    verification = compare_onnx(model, data)
    if not verification.ok:
        raise ArtifactError(
            f"The ONNX file computes something else than the model ({verification}).",
            "Is the model random in evaluation mode? If not, please report this as a defect.",
        )
    return data, verification


def compare_onnx(model: Model, data: bytes, batches: tuple[int, ...] = BATCHES) -> Verification:
    """Run an ONNX file beside the model, on seeded random inputs of each batch size.

    Raises:
        ArtifactError: the file does not run, or takes other inputs.
    """
    session = onnx_session(data, threads=1)
    names = [put.name for put in session.get_inputs()]
    worst, allowed = 0.0, 0.0
    for size in batches:
        inputs = random_batch(model.example, size, seed=size)
        ours = tensors_of(_run(model, inputs, size))
        try:
            arrays = [t.numpy() for t in tensors_of(inputs)]
            theirs = outputs_of(session.run(None, dict(zip(names, arrays, strict=True))))
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"The ONNX file does not run on a batch of {size}: {line}", "Export the model again."
            ) from error
        difference, scale = largest_difference(ours, theirs)
        tolerance = RELATIVE * scale
        if difference > tolerance:
            tolerance = max(tolerance, 10 * rounding(model, inputs, ours))
        if difference - tolerance > worst - allowed or size == batches[0]:
            worst, allowed = difference, tolerance
    return Verification(batches=batches, difference=worst, tolerance=allowed)


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
    """What 32-bit rounding alone does to these outputs: their distance from those in 64 bits; 0 where that fails."""
    from torch.utils._pytree import tree_map

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    wide = model.copy().module.double()
    try:
        with inference(wide) as module:
            exact = tensors_of(module(*tree_map(widen, inputs)))
    except (RuntimeError, NotImplementedError):  # a kernel for 32 bits only
        return 0.0
    difference, _ = largest_difference(ours, exact)
    return difference if difference != float("inf") else 0.0
