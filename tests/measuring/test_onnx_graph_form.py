"""Export to ONNX of modules whose forward does not name its inputs."""

from __future__ import annotations

import copy

import onnxruntime
import torch
from torch import Tensor, nn

from karui.measuring import onnx_form
from karui.model import Model, coupled_groups, remove_units


class Sum(nn.Module):
    """A forward with `*inputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(inputs[0] + inputs[1])


def test_inputs_without_names_have_a_dynamic_batch():
    model = Model(Sum(), example=(torch.rand(2, 4), torch.rand(2, 4)))
    session = onnxruntime.InferenceSession(onnx_form(model).data, providers=["CPUExecutionProvider"])
    x, y = torch.rand(5, 4), torch.rand(5, 4)
    names = [put.name for put in session.get_inputs()]
    given = dict(zip(names, (x.numpy(), y.numpy()), strict=True))
    torch.testing.assert_close(torch.as_tensor(session.run(None, given)[0]), model.module(x, y))


class Frozen(nn.Module):
    """A size frozen in the forward: after a cut only the graph form can run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 6).relu())


def test_a_graph_form_is_exported_and_copied():
    model = Model(Frozen(), example=(torch.rand(2, 4),))
    light = remove_units(model, {coupled_groups(model).groups[0].name: torch.tensor([1, 4])})
    x = torch.rand(5, 4)
    session = onnxruntime.InferenceSession(onnx_form(light).data, providers=["CPUExecutionProvider"])
    told = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(told), light.module(x), rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(light.module)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), light.module(x))
