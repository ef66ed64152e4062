"""What public models are put through: plan, prune, factorise, save, load in a fresh process, run in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import karui
from karui.lowrank import SvdRestructuring, Tucker2
from karui.measuring.inference import inference, random_batch, tensors_of
from karui.model import Model, coupled_groups, resolve
from karui.sparsify import L1Filters

FRESH = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file
import karui
from karui.measuring.inference import inference, tensors_of

torch.set_num_threads(1)
model, held = karui.load(sys.argv[1]), load_file(sys.argv[2])
with inference(model.module) as module:
    made = tensors_of(module(*(held[name] for name in sorted(held) if name.startswith("in"))))
want = [held[name] for name in sorted(held) if name.startswith("out")]
assert len(made) == len(want) and all(map(torch.equal, made, want)), "the loaded model computes something else"
"""


def built(spec: str, example: tuple[Any, ...], **settings: Any) -> Model:
    """A public model with random weights, whose normalisations have statistics of their own, as trained ones have."""
    origin = resolve(spec, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = origin.build()
        assert isinstance(module, nn.Module)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    return Model(module.eval(), example=example, lineage=(origin,))


def factorised(model: Model) -> Model:
    """Linear layers by SVD at rank 4, and one convolution by Tucker-2, where there are such."""
    bench = karui.Bench()
    model = SvdRestructuring(rank=4, epochs=0).apply(model, bench)
    wide = (nn.Conv2d, nn.Conv3d)
    for path, layer in model.module.named_modules():
        plain = type(layer) in wide and layer.groups == 1 and min(layer.kernel_size) > 1
        if plain and min(layer.in_channels, layer.out_channels) >= 16:
            ranks = ((path, layer.in_channels // 4, layer.out_channels // 4),)
            others = tuple(p for p, other in model.module.named_modules() if type(other) in wide and p != path)
            return Tucker2(ranks=ranks, skip=others, epochs=0).apply(model, bench)
    return model


@pytest.fixture
def all_the_way(tmp_path: Path) -> Callable[[Model], Model]:
    """Everything that must work on a public model; returns the light one."""

    def run(dense: Model) -> Model:
        found = coupled_groups(dense)
        assert found.groups
        assert all(lock.reason for lock in found.locked)
        pruned = L1Filters(ratio=0.3, epochs=0).apply(dense, karui.Bench())
        assert pruned.parameters < dense.parameters
        light = factorised(pruned)
        assert light.parameters < pruned.parameters
        saved = karui.save(light, tmp_path / "light")
        assert not saved.warnings
        assert saved.verification is not None
        assert saved.verification.ok
        assert len(saved.verification.batches) > 1
        inputs = random_batch(light.example, 3, seed=1)
        with inference(light.module) as module:
            outputs = tensors_of(module(*inputs))
        held = {f"in{k}": t for k, t in enumerate(inputs)} | {f"out{k}": t for k, t in enumerate(outputs)}
        save_file({name: t.clone() for name, t in held.items()}, tmp_path / "held.safetensors")
        script = [sys.executable, "-c", FRESH, str(saved.folder), str(tmp_path / "held.safetensors")]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return light

    return run


@pytest.fixture
def public() -> Callable[..., Model]:
    """`public(spec, example, **settings)`: a public model with random weights."""
    return built
