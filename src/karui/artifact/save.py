"""Save: a folder that holds all of a model, readable without running code from it."""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import karui
from karui.artifact import files
from karui.artifact.describe import example_from_json, example_to_json, refuse_enclosed, task_to_json
from karui.artifact.export import Verification, checked_onnx, rounding
from karui.artifact.pack import Stored, pack
from karui.deployment import Deployment
from karui.errors import ArtifactError, KaruiError, require
from karui.measuring import values as json_values
from karui.measuring.filed import File, Filed, Waiting
from karui.measuring.inference import inference, tensors_of
from karui.measuring.values import bytes_text
from karui.model import Model, apart, edit_to_json

FORMAT = 1
"""Version of the folder's layout; a reader refuses a later one."""
PROBES = 32
"""Values of each output that are kept, to see on loading that the network still computes what it did."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a saved model: its form, the bytes of its data in the file, and what it takes as a plain tensor."""

    name: str
    form: str
    bytes: int
    dense_bytes: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model that was saved.

    Settings:
        folder: where.
        weights_bytes: length of `model.safetensors`.
        json_bytes: length of `model.json`: structure, task, settings, measurements.
        onnx_bytes: length of `model.onnx`; None where it was not written.
        engine: the engine that `model.onnx` is meant for.
        precision: of `model.onnx`: "fp32", "int8" or "dynamic int8".
        tensors: each tensor that is stored (one that is shared is stored once).
        verification: the comparison that the ONNX file passed.
        warnings: what could not be saved, and why.
    """

    folder: Path
    weights_bytes: int
    json_bytes: int
    onnx_bytes: int | None = None
    engine: str = "onnxruntime"
    precision: str = "fp32"
    tensors: tuple[StoredTensor, ...] = ()
    verification: Verification | None = None
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All that is needed to load the model: weights and structure."""
        return self.weights_bytes + self.json_bytes

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **json_values.to_json(dataclasses.replace(self, folder=Path())),
            "folder": str(self.folder),
            "bytes": self.bytes,
        }

    def __str__(self) -> str:
        form = "" if (self.engine, self.precision) == ("onnxruntime", "fp32") else f" ({self.precision}, {self.engine})"
        onnx = f", ONNX{form} {bytes_text(self.onnx_bytes)}" if self.onnx_bytes is not None else ""
        lines = [f"{self.folder}: weights {bytes_text(self.weights_bytes)}{onnx}"]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def save(
    model: Model,
    folder: Path | str,
    *,
    measurements: Any = None,
    settings: Mapping[str, Any] | None = None,
    onnx: bool = True,
    deployment: Deployment | None = None,
) -> Saved:
    """Save a model as a folder; one that is there is replaced in one step, and other files in it are kept.

    Args:
        model: what to save.
        folder: where.
        measurements: a measurement, a comparison, or JSON values, kept in `model.json`.
        settings: JSON values on how it was made (technique, seed, recipe), kept in `model.json`.
        onnx: also write `model.onnx`, checked against torch. Where it cannot be made, the rest is saved and the
            result's `warnings` say why.
        deployment: the form that was chosen; it becomes `model.onnx`, and `model.json` tells engine and precision.
            None exports the model in 32 bits for ONNX Runtime.

    Raises:
        ArtifactError: a tensor, a setting or an input cannot be saved, or the deployment is not this model's.
        UsageError: a folder cannot be put there.
    """
    folder = Path(folder).expanduser().resolve()
    files.check_target(folder)
    stored, tied, frozen = _tensors(model.module)
    example, beside = example_to_json(model.example)
    task, warning = task_to_json(model.task)
    warnings = [warning] if warning else []
    try:
        refuse_enclosed(model.lineage, task, folder, built=True)
    except ArtifactError as error:
        warnings.append(f"This folder loads with a base only. {error}")
    probe = _probe(model, example_from_json(example, beside))  # copies the model, so before its files are in memory
    weights = Waiting(_safetensors(stored, beside))
    contents: dict[str, File] = {files.TENSORS: weights}
    verification = None
    if deployment is not None:  # one that was chosen by measurement is there; if it is wrong, nothing is saved
        contents[files.ONNX], verification = checked_onnx(model, deployment)
    elif onnx:
        try:
            contents[files.ONNX], verification = checked_onnx(model)
        except KaruiError as error:
            warnings.append(f"{files.ONNX} is not written. {error}")
    told = {
        "format": FORMAT,
        "lineage": [edit_to_json(step) for step in model.lineage],
        "task": task,
        "example": example,
        "tensors": {
            name: {"form": s.form, "header": s.header, "parts": sorted(s.arrays)} for name, s in stored.items()
        },
        "tied": tied,
        "frozen": frozen,
        "deployment": _deployment(deployment, verification),
        "probe": probe,
        "settings": dict(settings or {}),
        "measurements": json_values.to_json(measurements),
        "versions": {"karui": karui.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": {name: {"bytes": Filed.size(file), "sha256": Filed.digest(file)} for name, file in contents.items()},
    }
    try:
        text = files.sealed(told)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"The settings, the measurements or the lineage cannot be saved as JSON: {error}.",
            "Use numbers, strings, lists and dicts.",
        ) from error
    files.write_folder(folder, {**contents, files.JSON: text})
    return Saved(
        folder=folder,
        weights_bytes=Filed.size(weights),
        json_bytes=len(text),
        onnx_bytes=Filed.size(contents[files.ONNX]) if files.ONNX in contents else None,
        engine=deployment.engine if deployment is not None else "onnxruntime",
        precision=deployment.precision if deployment is not None else "fp32",
        tensors=_report(stored, model.module),
        verification=verification,
        warnings=tuple(warnings),
    )


def _deployment(deployment: Deployment | None, verification: Verification | None) -> dict[str, Any] | None:
    """What `model.json` tells of `model.onnx`; None where there is no such file."""
    if verification is None:
        return None
    given = deployment or Deployment(name="", engine="onnxruntime", precision="fp32", data=b"")
    told = {"name": given.name, "engine": given.engine, "precision": given.precision, "fp32_layers": given.fp32_layers}
    return json_values.to_json({**told, "tolerance": verification.tolerance if given.precision != "fp32" else None})


def stored_bytes(model: Model) -> int:
    """Length of the `model.safetensors` that `save` would write, with nothing written; inputs that it keeps are in it.

    Raises:
        ArtifactError: a tensor cannot be saved.
    """
    try:
        beside = example_to_json(model.example)[1]
    except ArtifactError:
        beside = {}  # an input that cannot be saved is no reason not to measure
    return len(_safetensors(_tensors(model.module)[0], beside))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has; buffers that a state dict would leave out included."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def same_memory(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common. An empty tensor shares with none but itself."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _tensors(module: nn.Module) -> tuple[dict[str, Stored], dict[str, str], list[str]]:
    """The tensors in their stored forms, further names of those ({name: first name}), and names without gradient."""
    _refuse_hidden_state(module)
    stored: dict[str, Stored] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    named = named_tensors(module)
    for name, tensor in named.items():
        known = first.setdefault(same_memory(tensor), name)
        if known != name:
            tied[name] = known
            continue
        try:
            stored[name] = pack(tensor)
        except KaruiError as error:
            raise ArtifactError(f"The tensor '{name}' cannot be saved. {error.message}", error.hint) from error
    return stored, tied, [name for name, t in named.items() if isinstance(t, nn.Parameter) and not t.requires_grad]


def _refuse_hidden_state(module: nn.Module) -> None:
    for path, part in module.named_modules():
        require(
            type(part).get_extra_state is nn.Module.get_extra_state,
            f"The layer '{path}' ({type(part).__name__}) keeps state that is no tensor; that takes pickle.",
            "Keep it in buffers.",
            ArtifactError,
        )


def _safetensors(stored: Mapping[str, Stored], beside: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save_file

    flat = dict(beside)
    for name, item in stored.items():
        if item.dense is not None:
            flat[name] = item.dense
        for part, array in item.arrays.items():
            flat[f"{name}/{part}"] = torch.from_numpy(array)
    # As a file, since what makes bytes of them holds all three times.
    with tempfile.TemporaryDirectory(prefix="karui-") as scratch:
        file = Path(scratch) / files.TENSORS
        save_file(apart(flat), file, metadata={"format": "pt"})
        return file.read_bytes()


def _probe(model: Model, example: tuple[Any, ...]) -> list[dict[str, Any]] | None:
    """Some values of each output on the example as it will be reloaded; None for a model that is random."""
    with inference(model.module) as module:
        try:
            first, second = (tensors_of(module(*example)) for _ in range(2))
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"The model does not run on its example input: {line}", "Give an example that it accepts."
            ) from error
    if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return None
    noise = rounding(model, example, first)
    return [{**probe_of(t), "noise": noise} for t in first]


def probe_of(output: Tensor) -> dict[str, Any]:
    """Shape, largest size, and evenly spread values of an output."""
    flat = output.detach().cpu().double().flatten()
    picks = torch.linspace(0, max(len(flat) - 1, 0), min(PROBES, len(flat))).long()
    return json_values.to_json(
        {
            "shape": list(output.shape),
            "scale": flat.abs().max().item() if len(flat) else 0.0,
            "values": flat[picks].tolist(),
        }
    )


def _report(stored: Mapping[str, Stored], module: nn.Module) -> tuple[StoredTensor, ...]:
    named = named_tensors(module)
    return tuple(
        StoredTensor(
            name=name, form=item.form, bytes=item.bytes, dense_bytes=named[name].numel() * named[name].element_size()
        )
        for name, item in stored.items()
    )
