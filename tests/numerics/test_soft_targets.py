"""The loss of distillation: its gradient, its limits, and what it does not see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karui.numerics.soft_targets import arithmetic, distillation_loss, geometric, soft_cross_entropy, soften

pytestmark = pytest.mark.paper(30)


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(z: Tensor, v: Tensor, y: Tensor, temperature: float, weight: float) -> Tensor:
    z = z.clone().requires_grad_()
    hard = functional.cross_entropy(z, y)
    distillation_loss(z, soften(v, temperature), hard, temperature=temperature, weight=weight).backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5, 20.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
def test_gradient_is_the_formula(temperature: float, weight: float) -> None:
    z, v, y = draw(6, 5), draw(6, 5, seed=1), torch.arange(6) % 5
    q, p, q1 = soften(z, temperature), soften(v, temperature), soften(z, 1.0)
    formula = weight * temperature * (q - p) + (1 - weight) * (q1 - functional.one_hot(y, 5))
    torch.testing.assert_close(gradient(z, v, y, temperature, weight), formula / 6)


def test_at_high_temperature_it_is_regression_on_centred_logits() -> None:
    z, v, y = draw(8, 10), draw(8, 10, seed=1), torch.zeros(8, dtype=torch.long)
    centred = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    limit = centred / 10 / 8
    errors = {}
    for temperature in (50.0, 100.0, 200.0):
        got = gradient(z, v, y, temperature, 1.0)
        errors[temperature] = float((got - limit).norm() / limit.norm())
    assert errors[50.0] < 0.2
    assert errors[100.0] == pytest.approx(errors[50.0] / 2, rel=0.15)
    assert errors[200.0] == pytest.approx(errors[100.0] / 2, rel=0.15)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_equal_up_to_a_constant_give_no_gradient(temperature: float) -> None:
    z = draw(4, 6)
    constants = draw(4, 1, seed=2)
    assert gradient(z, z + constants, torch.zeros(4, dtype=torch.long), temperature, 1.0).abs().max() < 1e-12


def test_a_constant_added_to_either_changes_nothing() -> None:
    z, v = draw(4, 6), draw(4, 6, seed=1)
    loss = soft_cross_entropy(z, soften(v, 3.0), 3.0)
    for shifted in (
        soft_cross_entropy(z + draw(4, 1, seed=2), soften(v, 3.0), 3.0),
        soft_cross_entropy(z, soften(v + draw(4, 1, seed=3), 3.0), 3.0),
    ):
        torch.testing.assert_close(shifted, loss)


def test_without_weight_it_is_the_hard_loss_and_with_all_of_it_no_label_counts() -> None:
    z, v = draw(4, 6), draw(4, 6, seed=1)
    hard = functional.cross_entropy(z, torch.zeros(4, dtype=torch.long))
    assert distillation_loss(z, soften(v, 2.0), hard, temperature=2.0, weight=0.0) is hard
    lost = torch.tensor(float("nan"))
    soft = distillation_loss(z, soften(v, 2.0), lost, temperature=2.0, weight=1.0)
    torch.testing.assert_close(soft, soft_cross_entropy(z, soften(v, 2.0), 2.0))


def test_an_ensemble_of_one_is_that_teacher() -> None:
    v = draw(4, 6)
    for rule in (arithmetic, geometric):
        torch.testing.assert_close(rule(v[None], 2.0), soften(v, 2.0))


def test_ensemble_rules_are_the_means_they_say() -> None:
    v = draw(3, 4, 6)
    p = (v / 2.0).softmax(2)
    torch.testing.assert_close(arithmetic(v, 2.0), p.mean(0))
    mean = p.log().mean(0).exp()
    torch.testing.assert_close(geometric(v, 2.0), mean / mean.sum(1, keepdim=True))
    assert not torch.allclose(arithmetic(v, 2.0), geometric(v, 2.0))


def test_positions_count_as_samples() -> None:
    z, v = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    rows = [t.movedim(1, -1).reshape(-1, 5) for t in (z, v)]
    torch.testing.assert_close(
        soft_cross_entropy(z, soften(v, 2.0), 2.0), soft_cross_entropy(rows[0], soften(rows[1], 2.0), 2.0)
    )


def test_half_precision_costs_no_more_than_the_rounding_of_logits() -> None:
    """Under bf16 probabilities and their differences were rounded on the way."""
    z, v = draw(32, 100, seed=0).bfloat16(), draw(32, 100, seed=1).bfloat16()
    for rule in (soften, lambda z, t: arithmetic(z[None], t), lambda z, t: geometric(z[None], t)):
        torch.testing.assert_close(rule(v, 3.0), rule(v.float(), 3.0), rtol=0, atol=0)
    half = soft_cross_entropy(z, soften(v, 3.0), 3.0)
    torch.testing.assert_close(half, soft_cross_entropy(z.float(), soften(v.float(), 3.0), 3.0), rtol=0, atol=0)
