"""Moments of rows that arrive batch by batch."""

from __future__ import annotations

import pytest
import torch

from karui.errors import KaruiError
from karui.numerics.running import Running


@pytest.mark.paper(41)
@pytest.mark.parametrize("sizes", [[50], [1, 49], [7, 0, 20, 23]])
def test_streamed_moments_are_those_of_the_whole(sizes: list[int]) -> None:
    rows = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 7
    full, diagonal = Running.zeros(4), Running.zeros(4, full=False)
    for part in rows.split(sizes):
        full.add(part)
        diagonal.add(part)
    assert full.count == 50
    torch.testing.assert_close(full.mean, rows.mean(0))
    torch.testing.assert_close(full.covariance(), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(full.variance(), rows.var(0, correction=0))
    torch.testing.assert_close(diagonal.variance(), rows.var(0, correction=0))


def test_a_small_variance_about_a_large_mean_is_not_lost() -> None:
    rows = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e7
    running = Running.zeros(1)
    for part in rows.split(100):
        running.add(part)
    torch.testing.assert_close(running.variance(), rows.var(0, correction=0), rtol=1e-4, atol=0)


def test_what_was_not_counted_is_told() -> None:
    with pytest.raises(KaruiError, match="no samples"):
        Running.zeros(2).variance()
    running = Running.zeros(2, full=False)
    running.add(torch.zeros(1, 2))
    with pytest.raises(KaruiError, match="only variances"):
        running.covariance()
