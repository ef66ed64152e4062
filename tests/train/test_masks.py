"""Pruned weights stay exactly zero, whatever the optimiser does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SettingError
from karui.train.influence import Moment, Together
from karui.train.masks import SUFFIX, MaskKeeper, connections, density, zero_masks

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8)
    )


def half(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in connections(module).items()}


def step(module: nn.Module, keeper: MaskKeeper | Together, optimizer: torch.optim.Optimizer) -> None:
    x, y = torch.randn(16, 1, 4, 4), torch.randint(0, 8, (16,))
    optimizer.zero_grad()
    outputs = module(x)
    functional.cross_entropy(outputs, y).backward()
    optimizer.step()
    keeper.constraints(module, Moment(module, (x,), y, outputs))


def plus_zero(values: Tensor) -> bool:
    """All +0.0 to the bit: -0.0 would not pack."""
    return bool((values.view(torch.int32) == 0).all())


@pytest.mark.paper(63)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_exactly_zero(name: str) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    optimizer = OPTIMIZERS[name](module.parameters())
    step(module, Together(), optimizer)  # momentum of the dense network, which would carry pruned weights on
    keeper = MaskKeeper(half(module))
    keeper.attach(module)
    for _ in range(20):
        step(module, keeper, optimizer)
        for path, mask in keeper.masks.items():
            weight = module.get_parameter(path).detach()
            assert plus_zero(weight[~mask])
            assert not module.get_parameter(path).grad[~mask].any()  # pyright: ignore
    keeper.finish(module)
    assert module.state_dict().keys() == before.keys()
    for path, mask in keeper.masks.items():
        weight = module.get_parameter(path).detach()
        assert plus_zero(weight[~mask])
        assert not torch.equal(weight[mask], before[path][mask]), "survivors train"


def test_survivors_are_untouched_by_attach_and_hooks_are_gone_after_finish() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    keeper = MaskKeeper(half(module))
    keeper.attach(module)
    keeper.finish(module)
    for path, mask in keeper.masks.items():
        assert torch.equal(module.get_parameter(path)[mask], before[path][mask])
    functional.mse_loss(module(torch.ones(2, 1, 4, 4)), torch.zeros(2, 8)).backward()
    path, mask = next(iter(keeper.masks.items()))
    assert module.get_parameter(path).grad[~mask].any()  # pyright: ignore


def test_masks_are_buffers_that_a_checkpoint_holds() -> None:
    module, other = network(), network()
    MaskKeeper(half(module, seed=1)).attach(module)
    keeper = MaskKeeper(half(other, seed=2))
    keeper.attach(other)
    assert f"0.weight{SUFFIX}" in module.state_dict()
    other.load_state_dict(module.state_dict())
    keeper.constraints(other, Moment(other, (), None, None))
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), "the masks of the checkpoint are the ones kept"


def test_two_keepers_keep_what_both_let_live() -> None:
    module = network()
    one, two = MaskKeeper(half(module, seed=1)), MaskKeeper(half(module, seed=2))
    both = Together(one, two)
    both.attach(module)
    step(module, both, OPTIMIZERS["adam"](module.parameters()))
    names = both.finish(module).state_dict().keys()
    assert names == network().state_dict().keys()
    for path in one.masks:
        alive = one.masks[path] & two.masks[path]
        weight = module.get_parameter(path).detach()
        assert plus_zero(weight[~alive])
        assert (weight[alive] != 0).all()


def test_one_value_serves_two_trainings_at_once() -> None:
    first, second = network(0), network(1)
    keeper = MaskKeeper(half(first))
    for module in (first, second):
        keeper.attach(module)
    keeper.finish(first)
    optimizer = OPTIMIZERS["adamw"](second.parameters())
    step(second, keeper, optimizer)
    assert plus_zero(second.get_parameter("0.weight").detach()[~keeper.masks["0.weight"]])


def test_connections_are_matrices_and_kernels_only() -> None:
    module = network()
    assert list(connections(module)) == ["0.weight", "4.weight"]
    assert list(connections(module, skip=["0"])) == ["4.weight"]
    assert list(connections(module, skip=["4.weight"])) == ["0.weight"]
    assert list(connections(nn.LayerNorm([3, 4]))) == []
    assert sorted(connections(nn.LSTM(3, 4))) == ["weight_hh_l0", "weight_ih_l0"]
    with pytest.raises(SettingError, match="'5.wight' is not known"):
        connections(module, skip=["5.wight"])


def test_tied_weights_count_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert list(connections(module)) == ["0.weight"]
    keeper = MaskKeeper(half(module))
    keeper.attach(module)
    assert plus_zero(module[1].weight.detach()[~keeper.masks["0.weight"]])


def test_zero_masks_read_a_pruned_model_and_leave_zero_layers_free() -> None:
    module = network()
    assert zero_masks(module) == {}
    nn.init.zeros_(module[0].weight)
    with torch.no_grad():
        module[4].weight[3, 2:5] = 0.0
    masks = zero_masks(module)
    assert list(masks) == ["4.weight"]
    assert int((~masks["4.weight"]).sum()) == 3
    assert math.isclose(density(masks), 1 - 3 / 512)
    assert density({}) == 1.0


def test_masks_that_do_not_fit_are_told() -> None:
    with pytest.raises(SettingError, match=r"for '0.weight', which the model has in shape \(4, 1, 3, 3\)"):
        MaskKeeper({"0.weight": torch.ones(2, dtype=torch.bool)}).attach(network())
    with pytest.raises(SettingError, match="which the model has not"):
        MaskKeeper({"nowhere": torch.ones(2, dtype=torch.bool)}).attach(network())
