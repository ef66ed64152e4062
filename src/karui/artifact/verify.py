"""Verify: is a saved model whole, and does its ONNX file compute the same? And the deployed form of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from karui.artifact import files
from karui.artifact.export import BATCHES, Verification, compare_deployment
from karui.artifact.load import load, read_artifact
from karui.deployment import Deployment
from karui.errors import ArtifactError, KaruiError
from karui.model import Model


def verify(folder: Path | str, *, base: Model | nn.Module | None = None) -> Verification:
    """Check every file's digest, load the model, and run its ONNX file beside it at several batch sizes.

    A file in 8 bits may differ by twice what it did when it was saved.

    Args:
        folder: where the model was saved.
        base: the original network, where the lineage does not tell how it is built.

    Raises:
        ArtifactError: a file is missing or damaged, or the model cannot be loaded.
    """
    folder = Path(folder).expanduser()
    model = load(folder, base=base)
    told, contents = read_artifact(folder)
    deployment = _deployment(folder, told, contents)
    if deployment is None:
        return Verification(batches=(), onnx=False)
    noted = told.get("deployment") or {}
    return compare_deployment(model, deployment, BATCHES, tolerance=noted.get("tolerance"))


def load_deployment(folder: Path | str) -> Deployment:
    """The form of a saved model that is deployed: `model.onnx`, and the engine that it was chosen for.

    Needs neither the network's code nor torch weights; every file's digest is checked.

    Raises:
        ArtifactError: a file is missing or damaged, or there is no ONNX file.
    """
    folder = Path(folder).expanduser()
    deployment = _deployment(folder, *read_artifact(folder))
    if deployment is None:
        raise ArtifactError(f"{folder} holds no {files.ONNX}.", "Save the model with onnx=True.")
    return deployment


def _deployment(folder: Path, told: dict[str, Any], contents: dict[str, files.Opened]) -> Deployment | None:
    if files.ONNX not in contents:
        return None
    # Folders of before there was a choice do not tell: their file is in 32 bits.
    noted = told.get("deployment") or {"name": "", "engine": "onnxruntime", "precision": "fp32", "fp32_layers": []}
    try:
        return Deployment(
            name=noted["name"],
            engine=noted["engine"],
            precision=noted["precision"],
            data=contents[files.ONNX].data,
            fp32_layers=tuple(noted["fp32_layers"]),
        )
    except (KaruiError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder / files.JSON} tells of a deployment that this version of karui does not know: {error}.",
            "Update karui: pip install -U karui",
        ) from error
