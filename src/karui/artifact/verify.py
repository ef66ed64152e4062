"""Verify: is a saved model whole, and does its ONNX file compute the same?"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from karui.artifact import files
from karui.artifact.export import BATCHES, Verification, compare_onnx
from karui.artifact.load import load, read_artifact
from karui.model import Model


def verify(folder: Path | str, *, base: Model | nn.Module | None = None) -> Verification:
    """Check every file's digest, load the model, and run its ONNX file beside it at several batch sizes.

    Args:
        folder: where the model was saved.
        base: the original network, where the lineage does not tell how it is built.

    Raises:
        ArtifactError: a file is missing or damaged, or the model cannot be loaded.
    """
    folder = Path(folder).expanduser()
    model = load(folder, base=base)
    _, contents = read_artifact(folder)
    if files.ONNX not in contents:
        return Verification(batches=(), onnx=False)
    return compare_onnx(model, contents[files.ONNX], BATCHES)
