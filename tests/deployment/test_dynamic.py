"""Dynamic quantisation: what is in 8 bits, what it computes, where it is offered, and that it is saved and verified."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from karui.artifact import load, save, verify
from karui.deployment import Deployment, as_model, deployments, mostly_linear, quantise_dynamically
from karui.errors import UsageError
from karui.measuring import OnnxForm, onnx_form
from karui.model import Model


class Words(nn.Module):
    """Every kind of layer that a network of words may have."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cells = nn.Embedding(300, 64), nn.LSTM(64, 24, batch_first=True)
        self.conv, self.head = nn.Conv1d(24, 16, 3, padding=1), nn.Linear(16, 300)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next word."""
        return self.head(self.conv(self.cells(self.table(tokens))[0].transpose(1, 2)).relu().mean(2))


@pytest.fixture
def words() -> Model:
    torch.manual_seed(0)
    return Model(Words().eval(), example=(torch.zeros(2, 7, dtype=torch.long),))


def test_linear_layers_and_embeddings_become_integers_and_the_rest_is_named(words: Model):
    form = onnx_form(words)
    light = quantise_dynamically(form)
    assert (set(light.quantised), set(light.fp32), light.stored) == ({"table", "head"}, {"cells", "conv"}, ())
    assert light.precision == "dynamic int8"
    kinds = {node.op_type for node in onnx.load_model_from_string(light.data).graph.node}
    assert "MatMulInteger" in kinds
    assert not {"Gemm", "QuantizeLinear"} & kinds
    assert len(light.data) < 0.5 * len(form.data)
    assert set(light.form.layers.values()) <= set(form.layers.values())
    assert "head" in light.form.layers.values()


def test_it_computes_what_the_network_does_up_to_8_bits(words: Model):
    light = quantise_dynamically(onnx_form(words))
    made = next(d for d in deployments(onnx_form(words), light) if d.precision == "dynamic int8")
    tokens = torch.randint(300, (33, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = words.module(tokens), as_model(made, words).module(tokens)
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.02 * ours.norm()


def test_where_it_is_worth_a_try(words: Model):
    assert mostly_linear(onnx_form(words))
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    assert not mostly_linear(onnx_form(Model(net.eval(), example=(torch.zeros(1, 3, 8, 8),))))


def test_it_is_saved_read_and_verified(words: Model, tmp_path: Path):
    light = quantise_dynamically(onnx_form(words))
    made = Deployment(name="light", engine="onnxruntime", precision=light.precision, data=light.data)
    saved = save(words, tmp_path / "light", deployment=made)
    assert saved.verification is not None
    assert saved.verification.precision == "dynamic int8"
    assert "up to the rounding of 8 bits" in str(saved.verification)
    assert (tmp_path / "light" / "model.onnx").read_bytes() == light.data
    assert verify(tmp_path / "light", base=words.module).ok
    assert load(tmp_path / "light", base=words.module).parameters == words.parameters


def test_a_damaged_form_is_refused():
    with pytest.raises(UsageError, match="no whole ONNX file"):
        quantise_dynamically(OnnxForm(data=b"nothing", layers={}))


def test_products_with_constants_of_three_dimensions_stay_as_they_are():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 64, 64) * 0.1), nn.Linear(64, 512)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x[:, None, None] @ self.weight).relu().mean((1, 2)))

    torch.manual_seed(0)
    model = Model(Experts().eval(), example=(torch.zeros(1, 64),))
    light = quantise_dynamically(onnx_form(model))
    assert light.quantised == ("head",)
    made = Deployment(name="light", engine="onnxruntime", precision=light.precision, data=light.data)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.module(x)
        assert (ours - as_model(made, model).module(x)).norm() < 0.02 * ours.norm()
