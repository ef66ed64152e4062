"""What Tucker-2 offers to a budget: smaller layers only, at any width, also of one channel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from karui.lowrank import Tucker2
from karui.model import Model
from karui.technique import Bench


@pytest.mark.paper(12)
@pytest.mark.parametrize("widths", [(3, 1, 16), (3, 16, 1), (3, 2, 1), (8, 32, 64)])
def test_every_candidate_is_smaller_and_runs(widths: tuple[int, ...]):
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    model = Model(nn.Sequential(*layers).eval(), example=(torch.zeros(1, widths[0], 8, 8),))
    offered = list(Tucker2().candidates(model, Bench(), multiple=8))
    for candidate in offered:
        assert candidate.layers is not None
        for path, layer in candidate.layers().items():
            old = model.module.get_submodule(path)
            assert isinstance(old, nn.Conv2d)
            x = torch.zeros(1, old.in_channels, 8, 8)
            assert layer(x).shape == old(x).shape
            assert sum(p.numel() for p in layer.parameters()) < sum(p.numel() for p in old.parameters())
    if widths == (8, 32, 64):
        assert len(offered) >= 5
