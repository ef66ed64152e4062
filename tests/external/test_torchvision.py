from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import karui
from karui.cli.app import app

why = "torchvision is not installed, or not for this torch (pip install 'karui[vision]')"
pytest.importorskip("torchvision", reason=why, exc_type=ImportError)
pytestmark = pytest.mark.external


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_a_network_is_planned_pruned_factorised_saved_loaded_and_exported(name, public, all_the_way) -> None:
    dense = public(f"torchvision:{name}", (torch.rand(2, 3, 64, 64),))
    light = all_the_way(dense)
    assert light.parameters < 0.75 * dense.parameters


def test_the_command_line_plans_it() -> None:
    done = CliRunner().invoke(app, ["plan", "torchvision:mobilenet_v2", "--input", "3x64x64", "--json"])
    assert done.exit_code == 0, done.output
    assert "features" in json.dumps(json.loads(done.stdout))


DATA = """
import torch
from torch.utils.data import TensorDataset


def data():
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(24) % 4
    pictures = torch.randn(24, 3, 32, 32, generator=draw) + targets[:, None, None, None]
    return TensorDataset(pictures[:16], targets[:16]), TensorDataset(pictures[16:], targets[16:])
"""

RECIPE = """
[training]
epochs = 1
batch_size = 8

[clock]
batches = [1]
threads = [1]
rounds = 5
seconds = 0.2
engines = [{ kind = "OnnxRuntime" }]

[[step]]
technique = "l1_filter_pruning"
ratio = 0.5
epochs = 1
"""


@pytest.mark.slow
def test_the_command_line_compresses_trained_weights(tmp_path: Path, public) -> None:
    trained = public("torchvision:resnet18", (torch.rand(2, 3, 32, 32),))
    torch.save(trained.module.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "pictures.py").write_text(DATA)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    out = tmp_path / "light"
    words = ["compress", "torchvision:resnet18", "--weights", str(tmp_path / "weights.pth")]
    words += [
        "--data",
        f"{tmp_path / 'pictures.py'}:data",
        "--recipe",
        str(tmp_path / "recipe.toml"),
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert {"model.safetensors", "model.json", "model.onnx"} <= {path.name for path in out.iterdir()}
    light = karui.load(out)
    assert light.parameters < 0.75 * trained.parameters
    assert np.isfinite(light.module(torch.rand(3, 3, 32, 32)).detach().numpy()).all()
