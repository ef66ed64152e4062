"""The SVD-Softmax head: exact where it says so, bounded elsewhere, always a distribution."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from karui.errors import SettingError
from karui.layers.svd_softmax import SvdSoftmaxHead, operations, rotate
from karui.measuring import count
from karui.model import Model
from karui.numerics import full_view as numerics

pytestmark = pytest.mark.paper(25)
VOCABULARY, WIDTH = 400, 32


def trained(bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Linear:
    """A linear layer with a decaying spectrum, as trained output layers have."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        spectrum = torch.arange(1, WIDTH + 1) ** -0.7
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        layer.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator) * spectrum @ basis)
        if bias:
            layer.bias.copy_(2 * torch.randn(VOCABULARY, generator=generator))
    return layer


def vectors(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(9))


def head_of(layer: nn.Linear, window: int, full_view: int) -> SvdSoftmaxHead:
    return SvdSoftmaxHead.from_linear(layer, window, full_view).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("window", "full_view"), [(WIDTH, 0), (WIDTH, 7), (1, VOCABULARY), (5, VOCABULARY)])
def test_full_window_or_full_view_is_the_exact_softmax(
    bias: bool, dtype: torch.dtype, window: int, full_view: int
) -> None:
    layer, x = trained(bias, dtype), vectors(10, dtype=dtype)
    head = head_of(layer, window, full_view)
    torch.testing.assert_close(head(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.softmax(x), layer(x).softmax(-1), rtol=1e-5, atol=1e-7)


def test_the_rotation_is_exact_and_sorts_the_energy() -> None:
    weight = trained().weight.detach()
    turned, rotation = rotate(weight)
    torch.testing.assert_close(turned @ rotation, weight)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(turned.norm(dim=0), torch.linalg.svdvals(weight))


@settings(max_examples=30, deadline=None)
@given(window=st.integers(1, WIDTH), full_view=st.integers(0, VOCABULARY), bias=st.booleans())
def test_exact_logits_bound_and_distribution(window: int, full_view: int, bias: bool) -> None:
    layer, x = trained(bias), vectors(6)
    head = head_of(layer, window, full_view)
    with torch.no_grad():
        logits, exact, turned = head(x), layer(x), x @ head.rotation.T
        previews = turned[:, :window] @ head.preview.T + (layer.bias if bias else 0)
        bound = head.rest.norm(dim=1) * turned[:, window:].norm(dim=1, keepdim=True)
        assert bool(((exact - previews).abs() <= bound + 1e-9).all())
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, previews.topk(full_view).indices, True)
        torch.testing.assert_close(logits[chosen], exact[chosen])
        if window < WIDTH and full_view < VOCABULARY:
            torch.testing.assert_close(logits[~chosen], previews[~chosen])
        torch.testing.assert_close(head.softmax(x).sum(1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(head.log_prob(x).exp(), head.softmax(x))


def test_bias_counts_before_words_are_chosen() -> None:
    layer = trained()
    with torch.no_grad():
        layer.bias[123] = 100.0
    x = vectors(4)
    head = head_of(layer, 2, 1)
    assert head(x).argmax(1).tolist() == [123] * 4
    torch.testing.assert_close(head(x)[:, 123], layer(x)[:, 123])


def test_deviation_falls_with_the_full_view_on_average() -> None:
    layer, x = trained(), vectors(200)
    exact = layer(x).log_softmax(-1).detach()
    deviations = [float((head_of(layer, 6, n).log_prob(x) - exact).abs().mean()) for n in (0, 5, 20, 80, 200, 400)]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < 1e-9


def test_batched_is_single_and_sequences_are_rows() -> None:
    head, x = head_of(trained(), 6, 20), vectors(3, 5)
    whole = head(x)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(head(x[i, j]), whole[i, j])


def test_long_batches_are_gathered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = head_of(trained(), 6, 20), vectors(3, 7)
    whole = head(x)
    monkeypatch.setattr(numerics, "_GATHERED", 4 * 20 * (WIDTH - 6))
    torch.testing.assert_close(head(x), whole)


def test_topk_gives_the_best_exact_logits() -> None:
    head, x = head_of(trained(), 8, 40), vectors(50)
    values, words = head.topk(x, 5)
    torch.testing.assert_close(values, trained()(x).gather(1, words))
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    assert float((words[:, 0] == trained()(x).argmax(1)).double().mean()) > 0.9
    everything = head_of(trained(), WIDTH, 1).topk(x, 60)
    assert torch.equal(everything[1], trained()(x).topk(60).indices)
    with pytest.raises(SettingError, match="k is 41"):
        head.topk(x, 41)


def test_multiply_adds_follow_the_formula() -> None:
    head = SvdSoftmaxHead.from_linear(trained(dtype=torch.float32), 8, 12).eval()
    expected = WIDTH**2 + VOCABULARY * 8 + 12 * (WIDTH - 8)
    assert operations(VOCABULARY, WIDTH, 8, 12) == expected
    assert count(Model(head, example=(torch.randn(1, WIDTH),))).macs == expected
    wide, words = 1000, 10**6
    ratio = operations(words, wide, wide // 8, 3 * words // 100) / (words * wide)
    assert ratio == pytest.approx(0.125 + 0.03 * 0.875 + wide / words)


def test_rebuilding_follows_a_changed_weight() -> None:
    layer, x = trained(), vectors(5)
    head = head_of(layer, WIDTH, 1)
    with torch.no_grad():
        layer.weight.mul_(1.7)
        layer.bias.add_(1.0)
    assert not torch.allclose(head(x), layer(x))
    head.rebuild(layer.weight, layer.bias)
    torch.testing.assert_close(head(x), layer(x))


def test_while_training_all_logits_are_exact_and_the_head_is_frozen() -> None:
    layer, x = trained(), vectors(5).requires_grad_()
    head = head_of(layer, 4, 3).train()
    torch.testing.assert_close(head(x), layer(x))
    head(x).square().sum().backward()
    assert x.grad is not None
    assert not any(p.requires_grad for p in head.parameters())


def test_window_and_rest_are_contiguous_and_settings_rebuild() -> None:
    head: Any = head_of(trained(), 4, 3)
    assert head.preview.is_contiguous()
    assert head.rest.is_contiguous()
    again = SvdSoftmaxHead(**json.loads(json.dumps(head.settings()))).double().eval()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(vectors(4)), head(vectors(4)))


@pytest.mark.parametrize(("window", "full_view", "name"), [(0, 3, "window"), (33, 3, "window"), (4, 401, "full_view")])
def test_impossible_sizes_are_refused(window: int, full_view: int, name: str) -> None:
    with pytest.raises(SettingError, match=name):
        SvdSoftmaxHead(WIDTH, VOCABULARY, window, full_view)
