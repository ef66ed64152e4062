"""Blocks of a real graph: what is fused is in them, resized ones are those of the cut network, and keys tell costs."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from karui.measuring import onnx_form
from karui.measuring.engines import onnx_session
from karui.model import Model, coupled_groups, remove_units
from karui.recipes.budget.blocks import Block, blocks_of, resized, structure
from karui.recipes.budget.exchange import INPUT, OUTPUT, chain, exchanged


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.wise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))
        return self.head(nn.functional.relu6(self.wise(x)).mean((2, 3)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Residual().eval(), example=(torch.randn(2, 3, 8, 8),))


def test_a_block_holds_what_the_engine_fuses(model: Model):
    blocks = blocks_of(model, batch=4).blocks
    kinds = {path: [node.op_type for node in made[0].nodes] for path, made in blocks.items()}
    assert kinds["inner"] == ["Conv", "Relu"]  # the normalisation was folded in by the exporter
    assert kinds["outer"] == ["Conv", "Add", "Relu"]
    assert kinds["wise"] == ["Conv", "Clip"]
    assert kinds["head"] == ["Gemm"]
    assert blocks["outer"][0].inputs[blocks["outer"][0].nodes[0].input[0]][0] == (4, 24, 8, 8)


def test_resized_blocks_are_those_of_the_network_after_the_cut(model: Model):
    """The keys, which decide the time, are equal for the block that was resized and the one that was cut."""
    analysis = coupled_groups(model)
    removed = {"inner": torch.arange(8), "stem": torch.arange(4)}
    cut = blocks_of(remove_units(model, removed, analysis=analysis), 1).blocks
    whole = blocks_of(model, 1).blocks
    lost = {"stem": {0: 4}, "inner": {0: 8, 1: 4}, "outer": {0: 4, 1: 8}, "wise": {0: 4}, "head": {1: 4}}
    for path, dims in lost.items():
        made = resized(whole[path][0], model.module.get_submodule(path), dims)
        assert made is not None
        assert made.key == cut[path][0].key, path
        assert made.bytes == cut[path][0].bytes
        session = onnx_session(made.data(), 1)
        assert session.run(None, made.feed())[0].shape[0] == 1


def test_nothing_left_is_no_block(model: Model):
    block = blocks_of(model, 1).blocks["inner"][0]
    assert resized(block, model.module.get_submodule("inner"), {0: 24}) is None


def test_a_new_layer_keeps_what_followed_the_old_one(model: Model):
    block = blocks_of(model, batch=3).blocks["outer"][0]
    new = nn.Sequential(nn.Conv2d(24, 4, 1, bias=False), nn.Conv2d(4, 16, 3, padding=1))
    made = exchanged(block, new, (1, 24, 8, 8), batch=3)
    assert [node.op_type for node in made.nodes] == ["Conv", "Conv", "Add", "Relu"]
    assert onnx_session(made.data(), 1).run(None, made.feed())[0].shape == (3, 16, 8, 8)


class Own(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x).abs()


@pytest.mark.parametrize("bias", [True, False])
def test_chains_written_down_compute_what_the_layer_does(bias: bool):
    torch.manual_seed(0)
    layers = [
        (nn.Sequential(nn.Conv2d(4, 2, 1, bias=False), nn.Conv2d(2, 6, 3, 2, 1, groups=2, bias=bias)), (1, 4, 8, 8)),
        (nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=bias)), (1, 4)),
        (nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=bias)), (1, 5, 4)),
    ]
    for layer, shape in layers:
        part, x = chain(layer, len(shape)), torch.randn(shape)
        assert part is not None
        block = Block(part.nodes, part.weights, {INPUT: (shape, onnx.TensorProto.FLOAT)}, OUTPUT, 18)
        [found] = onnx_session(block.data(), 1).run(None, {INPUT: x.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), layer(x).detach(), rtol=1e-4, atol=1e-5)
    assert chain(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), 2) is None
    assert chain(Own(nn.Linear(4, 2)), 2) is None


def test_a_layer_that_is_no_chain_is_exported(model: Model):
    block = blocks_of(model, batch=1).blocks["outer"][0]
    made = exchanged(block, Own(nn.Conv2d(24, 16, 3, padding=1)), (1, 24, 8, 8), batch=1)
    assert [node.op_type for node in made.nodes] == ["Conv", "Abs", "Add", "Relu"]
    assert onnx_session(made.data(), 1).run(None, made.feed())[0].shape == (1, 16, 8, 8)


def test_files_of_one_structure_have_one_digest(model: Model):
    one = onnx_form(model).data
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.5)
    two = onnx_form(model).data
    assert one != two
    assert structure(one) == structure(two)
    cut = remove_units(model, {"inner": torch.arange(8)})
    assert structure(onnx_form(cut).data) != structure(two)
    assert onnx.load_model_from_string(two).graph.node
