"""What a layer sees and gives in two networks, position by position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from karui.errors import SurgeryError
from karui.layers.factored import CONVOLUTIONS
from karui.model.responses import draw_positions, patches_at, responses, rows_at, watch_outputs


class Branches(nn.Module):
    """A layer called twice, dropout that training would heed, and a last layer that must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 2)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu_(self.first(x)), 0.5, self.training)
        x = torch.relu_(self.twice(torch.relu_(self.twice(x))))
        self.runs += 1
        return self.last(x.mean((2, 3)))


def test_inputs_are_those_of_the_one_and_targets_those_of_the_other() -> None:
    torch.manual_seed(0)
    original = Branches().train()
    compressed = copy.deepcopy(original)
    with torch.no_grad():
        compressed.first.weight.mul_(0.5)
    batches = [(torch.randn(2, 3, 5, 5),) for _ in range(3)]
    found = list(responses(original, compressed, "twice", batches, calls=2))
    assert len(found) == 6
    with torch.no_grad():
        for number, (x,) in enumerate(batches):
            seen = torch.relu(compressed.first(x))
            torch.testing.assert_close(found[2 * number].given, seen)
            torch.testing.assert_close(found[2 * number].made, original.twice(seen))
            inner = torch.relu(original.twice(torch.relu(original.first(x))))
            torch.testing.assert_close(found[2 * number + 1].wanted, original.twice(inner))
    assert original.runs == compressed.runs == 0
    assert original.training
    assert not original.twice._forward_hooks


def test_outputs_are_watched_before_they_are_written_over() -> None:
    torch.manual_seed(0)
    net, x = Branches().train(), torch.randn(2, 3, 5, 5)
    seen: dict[str, list[Tensor]] = {"first": [], "twice": []}
    watch_outputs(net, {path: lambda y, path=path: seen[path].append(y.clone()) for path in seen}, [(x,), (x,)])
    assert [len(found) for found in seen.values()] == [2, 4]
    with torch.no_grad():
        torch.testing.assert_close(seen["first"][1], net.first(x))
        torch.testing.assert_close(seen["twice"][0], net.twice(torch.relu(net.first(x))))
    assert net.training
    assert not net.first._forward_hooks


def test_one_network_runs_once_and_counts_that_are_wrong_are_told() -> None:
    net = Branches()
    (one,) = responses(net, net, "first", [(torch.randn(1, 3, 4, 4),)])
    assert one.made is one.wanted
    with pytest.raises(SurgeryError, match="'first' 1 times on this input, not 2"):
        list(responses(net, net, "first", [(torch.randn(1, 3, 4, 4),)], calls=2))


@settings(max_examples=60, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    groups=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    named=st.sampled_from([None, "same", "valid"]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_response_is_the_kernel_on_its_window(  # noqa: PLR0917
    dimensions: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, mode: Any, named: str | None, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    told: dict[str, Any] = {"stride": tuple(stride[:dimensions]), "padding": tuple(padding[:dimensions])}
    if named is not None:
        told = {"padding": named} if named == "same" else {**told, "padding": named}
    conv: Any = CONVOLUTIONS[dimensions](
        2 * groups, 3 * groups, tuple(kernel[:dimensions]), dilation=tuple(dilation[:dimensions]), groups=groups,
        padding_mode=mode, bias=False, **told,
    )  # fmt: skip
    x = torch.randn(2, 2 * groups, *(8, 9, 7)[:dimensions])
    with torch.no_grad():
        output = conv(x)
        index = draw_positions(output, conv, 5, torch.Generator().manual_seed(seed))
        windows = patches_at(x, conv, index).unflatten(1, (groups, 2))
        made = torch.einsum("bgc...,gnc...->bgn", windows, conv.weight.unflatten(0, (groups, 3))).flatten(1)
        torch.testing.assert_close(made, rows_at(output, conv, index), rtol=1e-4, atol=1e-5)


def test_linear_layers_have_positions_too() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 7, 5)
    with torch.no_grad():
        index = draw_positions(layer(x), layer, 4, torch.Generator().manual_seed(0))
        assert index.shape == (2, 4)
        assert all(len(set(row.tolist())) == 4 for row in index)
        torch.testing.assert_close(layer(patches_at(x, layer, index)), rows_at(layer(x), layer, index))
        assert draw_positions(layer(x), layer, 9, torch.Generator()).tolist() == [list(range(7))] * 2
