"""What the README tells people to type works, in an empty folder, with a network and pictures of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).resolve().parents[1] / "README.md"

NET = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )
"""
TRAINED = """
from safetensors.torch import save_file
import net
save_file(net.build().state_dict(), "trained.safetensors")
"""
BEFORE = """
import karui, net, torch
net, x = net.build(), torch.zeros(1, 3, 8, 8)
splits = karui.load_data("folder:pictures")
train, test = splits.train, splits.test
"""
AFTER = """
again = karui.load("light/", base=net)
assert torch.equal(again.module(x), light.module(x))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def run(folder: Path, *command: str, ends: tuple[int, ...] = (0,)) -> str:
    programs = folder / "programs"
    if not programs.is_dir():
        programs.mkdir()
        (programs / "karui").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m karui "$@"\n')
        (programs / "karui").chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in ends, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 160, (8, 8, 3), dtype=np.uint8)
            pixels[..., channel] += 60
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run_as_written(folder: Path) -> None:
    run(folder, sys.executable, "-c", TRAINED)
    (recipe,) = blocks("toml")
    (folder / "recipe.toml").write_text(recipe)
    (commands,) = [block for block in blocks("sh") if "karui plan" in block]
    told = ""
    for command in re.sub(r"\\\n", " ", commands).splitlines():
        # A budget of time hangs on the machine: 1 says that it was not met, and the best found is written all the same.
        told += run(folder, "bash", "-ec", command, ends=(0, 1) if "--budget" in command else (0,))
    files = re.search(r"# light/: (.*)", commands)
    assert files is not None
    for name in files[1].split(", "):
        assert (folder / "light" / name).is_file()
    assert "62. l1_filter_pruning" in told
    run(folder, sys.executable, "-c", "import karui; karui.load('light/')")


@pytest.mark.slow
def test_the_python_runs_as_written(folder: Path) -> None:
    told = run(folder, sys.executable, "-c", "\n".join((BEFORE, *blocks("python"), AFTER)))
    assert "against the dense model: bytes as saved" in told


def test_make_knows_the_targets_that_are_named() -> None:
    makefile = README.with_name("Makefile").read_text("utf-8")
    named = set(re.findall(r"`?make ([a-z]+)", README.read_text("utf-8")))
    assert named >= {"demo", "test", "check", "bench", "help"}
    for target in named:
        assert re.search(rf"(?m)^{target}:", makefile), target


def test_every_link_into_the_checkout_leads_somewhere() -> None:
    text = README.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        page = README.parent / path if path else README
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)", page.read_text("utf-8"))
            assert anchor in [title.lower().replace(" ", "-") for title in titles], target
