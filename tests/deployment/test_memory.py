"""Copies of a network's weights that are in memory while it gets 8 bits: those of engines and parsers, too.

Neither torch nor Python knows of them, so a process of its own reports how far its memory grows. Pages of a file that
is mapped are not counted: the system takes them back when it needs to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
CHILD = """
import gc, json, sys, threading, time
import torch
from torch import nn
from karui.deployment import calibrate, mostly_linear, quantise, quantise_dynamically
from karui.measuring import onnx_form
from karui.model import Model
from karui.recipes.budget.blocks import blocks_of, structure

def memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def network(width):
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = Model(nn.Sequential(*layers, nn.Linear(width, 4)).eval(), example=(torch.zeros(2, width),))
    return model, onnx_form(model), [(torch.randn(8, width),)]

class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = memory(), False
        self.before = self.most
        self.start()

    def run(self):
        while not self.over:
            self.most = max(self.most, memory())
            time.sleep(0.001)

def steps(model, form, batches):
    held = {}
    return {
        "calibrate": lambda: held.update(seen=calibrate(form, batches)),
        "quantise": lambda: quantise(held["seen"]),
        "dynamic": lambda: quantise_dynamically(form),
        "mostly": lambda: mostly_linear(form),
        "structure": lambda: structure(form),
        "blocks": lambda: blocks_of(model, 1),
    }

for step in steps(*network(64)).values():
    step()  # what is imported is no copy
torch.manual_seed(0)
model, form, batches = network(1280)
whole, found = sum(p.numel() * 4 for p in model.module.parameters()), {}
for name, step in steps(model, form, batches).items():
    gc.collect()
    peak = Peak()
    step()
    peak.over = True
    peak.join()
    found[name] = (peak.most - peak.before) / whole
print(json.dumps(found))
"""
MOST = {"calibrate": 1.25, "quantise": 1.8, "dynamic": 1.8, "mostly": 0.25, "structure": 0.25, "blocks": 0.25}
"""Copies that each step may hold, a quarter of one more than was measured: the engine's packed weights while ranges are
seen; the weights, their integers twice, and a layer that is worked on while they are quantised."""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists() or "RssAnon" not in STATUS.read_text(), reason="no account of memory here")
def test_no_step_holds_copies_that_it_does_not_need():
    own = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=own, check=False)
    assert done.returncode == 0, done.stderr
    copies = json.loads(done.stdout.splitlines()[-1])
    assert {name: most for name, most in copies.items() if most > MOST[name]} == {}
