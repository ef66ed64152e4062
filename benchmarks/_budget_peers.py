"""Torch-Pruning as a peer of a budget: group norms, widths in multiples of 8, and the same fine-tuning as karui's."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import torch_pruning
from torch import nn

from karui.architectures.cifar_resnet import BasicBlock
from karui.model import Model
from karui.recipes.budget.recover import recover
from karui.technique import Bench


def outer(net: nn.Module) -> list[str]:
    """Layers of a CIFAR ResNet that are not the first of a block.

    Torch-Pruning's result does not run where the shortcut pads with zeros, as it does in these networks, and the
    stream between the blocks goes through it: only the inner widths of blocks can be cut.
    """
    inner = {id(block.conv1) for block in net.modules() if isinstance(block, BasicBlock)}
    layers = ((path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    return [path for path, layer in layers if id(layer) not in inner]


def group_norm_pruned(dense: Model, bench: Bench, ratio: float, epochs: int, kept: Collection[str]) -> Model:
    """The network with its weakest groups cut, over all layers at once, and trained with the dense one as teacher.

    Args:
        dense: the network.
        bench: data and training.
        ratio: share of the channels.
        epochs: passes of the training.
        kept: layers whose outputs are not cut, by path.
    """
    net = copy.deepcopy(dense.module)
    pruner = torch_pruning.pruner.BasePruner(
        net,
        torch.zeros(2, *dense.example[0].shape[1:]),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=True,
        round_to=8,
        ignored_layers=[net.get_submodule(path) for path in kept],
    )
    pruner.step()
    light = Model(net.eval(), example=dense.example, task=dense.task)
    # With the bench's folder of checkpoints, where what the teacher said for one ratio serves the other.
    return recover(light, dense, bench, epochs, f"Torch-Pruning {ratio:g}")
