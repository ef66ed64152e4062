from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from karui.cli.app import app

why = "timm is not installed, or does not import with this torchvision (pip install 'karui[vision]')"
pytest.importorskip("timm", reason=why, exc_type=ImportError)
pytestmark = pytest.mark.external

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "settings"),
    [
        ("resnet10t", 64, {}),
        ("mobilenetv3_small_050", 64, {}),
        ("vit_tiny_patch16_224", 32, SMALL_VIT),
        ("convnext_atto", 64, {}),
        ("densenet121", 64, {"growth_rate": 16, "block_config": (2, 2, 2, 2)}),
        ("ghostnet_050", 64, {}),
    ],
)
def test_a_network_is_planned_pruned_factorised_saved_loaded_and_exported(
    name, side, settings, public, all_the_way
) -> None:
    dense = public(f"timm:{name}", (torch.rand(2, 3, side, side),), num_classes=100, **settings)
    all_the_way(dense)


def test_the_command_line_profiles_it() -> None:
    done = CliRunner().invoke(app, ["profile", "timm:resnet10t", "--input", "3x32x32", "--json"])
    assert done.exit_code == 0, done.output
    assert "layer1.0.conv1" in json.dumps(json.loads(done.stdout))
