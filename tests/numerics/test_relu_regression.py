"""The regression through a ReLU (survey 16): each step is the best one, and the relaxed objective never rises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karui.numerics.regression import Moments, reduced_rank_regression
from karui.numerics.relu_regression import nearest_hidden, relu_regression

pytestmark = pytest.mark.paper(16)


@given(
    fitted=st.floats(-4, 4), wanted=st.one_of(st.just(0.0), st.floats(0, 4)), penalty=st.sampled_from([0.01, 0.3, 1, 9])
)
def test_hidden_responses_are_the_global_minimum(fitted: float, wanted: float, penalty: float) -> None:
    def objective(z: torch.Tensor) -> torch.Tensor:
        return (wanted - z.clamp(min=0)).square() + penalty * (z - fitted).square()

    grid = torch.linspace(-9, 9, 40_001, dtype=torch.float64)
    one = torch.tensor(fitted, dtype=torch.float64)
    found, cost = nearest_hidden(one, torch.tensor(wanted, dtype=torch.float64), penalty)
    assert float(cost) == pytest.approx(float(objective(found)))
    assert float(objective(found)) <= float(objective(grid).min()) + 1e-12


def responses(rows: int = 3000, width: int = 12) -> torch.Tensor:
    torch.manual_seed(0)
    scales = torch.logspace(0, -1.2, width)
    return (torch.randn(rows, width) * scales) @ torch.linalg.qr(torch.randn(width, width)).Q - 0.6


def test_the_relaxed_objective_never_rises_and_the_error_falls() -> None:
    y = responses()
    fit = relu_regression(y, y, 4)
    assert len(fit.relaxed) == 2
    for trace in fit.relaxed:
        assert len(trace) == 26
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(trace))
        assert trace[-1] < trace[0]
    assert fit.error < 0.95 * fit.start
    assert torch.linalg.matrix_rank(fit.found.matrix()) == 4


def test_the_errors_told_are_those_of_the_map() -> None:
    y = responses().double()
    fit = relu_regression(y, y, 4, sweeps=3)
    linear = reduced_rank_regression(Moments.of(y, y), 4)
    wanted = y.clamp(min=0)
    for found, told in ((fit.found, fit.error), (linear, fit.start)):
        assert told == pytest.approx(float((wanted - found(y).clamp(min=0)).norm() / wanted.norm()))


def test_at_full_rank_the_identity_stays() -> None:
    y = responses()
    fit = relu_regression(y, y, 12, sweeps=3)
    torch.testing.assert_close(fit.found.matrix(), torch.eye(12).double(), rtol=0, atol=1e-6)
    assert fit.error < 1e-6


def test_a_target_of_another_network_is_met_half_way() -> None:
    """The asymmetric case: the regressor has drifted by a linear map, which the fit undoes."""
    y = responses()
    drift = torch.eye(12) + 0.3 * torch.randn(12, 12)
    fit = relu_regression(y @ drift + 0.2, y, 12, sweeps=3)
    assert fit.error < 1e-5


def test_isotropic_pairs_hold_the_map_where_rows_are_few() -> None:
    """As many rows as directions, and inputs that have drifted: the plain fit is of these rows alone."""
    y = responses(4000, 48)
    drifted = y + 0.05 * torch.randn_like(y)
    rows, others = slice(0, 50), slice(1000, 4000)
    variance = 0.01 * float(drifted[rows].var(0).mean())
    plain, held = (relu_regression(drifted[rows], y[rows], 40, sweeps=5, variance=one) for one in (0.0, variance))
    for trace in held.relaxed:
        assert all(after <= before * (1 + 1e-9) for before, after in pairwise(trace))
    wanted = y[others].double().clamp(min=0)
    lost = [
        float((wanted - fit.found(drifted[others].double()).clamp(min=0)).norm() / wanted.norm())
        for fit in (plain, held)
    ]
    assert plain.error < held.error  # on the rows themselves
    assert lost[1] < 0.5 * lost[0]
    whole = relu_regression(y, y, 48, sweeps=2, variance=variance)
    torch.testing.assert_close(whole.found.matrix(), torch.eye(48).double(), rtol=0, atol=1e-6)
