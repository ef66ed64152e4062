"""What the tests of couplings share: every group of a network cut, alone and with all others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from karui.model import Model, coupled_groups, edit_from_json, edit_to_json, remove_units


def tensors(value: object) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


@pytest.fixture
def cut_and_proved() -> Callable[..., None]:
    """`cut_and_proved(net, example, expected)`: its groups have the sizes expected, each is cut and proved on the spot.

    A cut of all at once is replayed from its JSON form to the same outputs.
    """

    def check(net: nn.Module, example: tuple[Tensor, ...], expected: dict[str, int]) -> None:
        dense = Model(net.eval(), example=example)
        found = coupled_groups(dense)
        assert {group.name: group.size for group in found} == expected
        for group in found:
            light = remove_units(dense, {group.name: torch.tensor([0])}, allow_normalisation=True, analysis=found)
            assert light.parameters < dense.parameters
        everything = {group.name: torch.tensor([group.size - 1]) for group in found}
        light = remove_units(dense, everything, allow_normalisation=True, analysis=found)
        again = edit_from_json(edit_to_json(light.lineage[0])).replay(copy.deepcopy(net), example)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in light.module.state_dict().items()
        }
        again.load_state_dict(light.module.state_dict())
        for one, other in zip(tensors(again.eval()(*example)), tensors(light.module.eval()(*example)), strict=True):
            torch.testing.assert_close(one, other)

    return check
