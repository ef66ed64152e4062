"""What the tests of teachers share: small networks, a student, and teachers of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.distill._teachers import teachers_of
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train.teaching import Teachers


def mlp(*widths: int, seed: int = 0, classes: int = 10) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, classes)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def table_of(data: TensorDataset) -> tuple[np.ndarray, np.ndarray]:
    return data.tensors[0].flatten(1).double().numpy(), data.tensors[1].numpy()


def written(
    model: Model, path: Path, *, batch: int | str = "batch", shape: tuple[int, ...] = (1, 8, 8), soft: bool = False
) -> Path:
    """A perceptron of one hidden layer as an ONNX file, written by hand: an export takes seconds."""
    hidden, last = (layer for layer in model.module.modules() if isinstance(layer, nn.Linear))
    weights = {"w1": hidden.weight, "b1": hidden.bias, "w2": last.weight, "b2": last.bias}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1", "b1"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["kept"]),
        helper.make_node("Gemm", ["kept", "w2", "b2"], ["logits"], transB=1),
        helper.make_node("Softmax" if soft else "Identity", ["logits"], ["said"]),
        helper.make_node("Identity", ["said"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, last.out_features])],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def plain(x: torch.Tensor) -> torch.Tensor:
    return 3 * x.flatten(1)[:, 10:20]


def answers(teacher: Any, x: torch.Tensor, bench: Bench) -> torch.Tensor:
    return Teachers(teachers_of("knowledge_distillation", teacher, mlp(8), bench))((x,))


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Watched(nn.Module):
    """A network with statistics and dropout that notes, at each call, in what state it was asked."""

    def __init__(self, seen: list[tuple[bool, bool]]) -> None:
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 12)
        self.drop, self.last, self.seen = nn.Dropout(0.5), nn.Linear(12, 10), seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        self.seen.append((self.training, trained))
        maps = torch.relu(self.norm(self.conv(x)))
        return self.last(self.drop(torch.relu(self.hidden(maps.flatten(1)))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        copied = Watched(self.seen)  # one list for all copies
        copied.load_state_dict(self.state_dict())
        return copied.train(self.training)


def student() -> Model:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10))
    return Model(nn.Sequential(*layers), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("karui.technique.bench.fit", train)
