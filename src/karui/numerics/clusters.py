"""k-means with three additions: clusters of equal size, points whose sign does not matter, and no more than is there.

Clusters of equal size make grouped convolutions possible (survey 18); singular vectors have no sign of their own, so
that one colour would fall into two clusters. The plain problem is scikit-learn's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from karui.errors import require

_ROUNDS = 100


@dataclass(frozen=True)
class Clusters:
    """A cluster for each point, and the clusters' centres.

    Settings:
        labels: number of each point's cluster.
        centres: means of the clusters' points, each with its sign; zero for a cluster that has none.
        signs: 1, or -1 for a point that lies with its cluster the other way round.
        error: sum of the squared distances between points and centres.
    """

    labels: Int[Tensor, "points"]
    centres: Float[Tensor, "clusters size"]
    signs: Float[Tensor, "points"]
    error: float

    def order(self) -> Int[Tensor, "points"]:
        """The points sorted by cluster, in their own order within each."""
        return self.labels.argsort(stable=True)


def kmeans(
    points: Float[Tensor, "points size"],
    clusters: int,
    *,
    even: bool = False,
    either_sign: bool = False,
    restarts: int = 10,
    seed: int = 0,
) -> Clusters:
    """The clusters of least squared distance from `restarts` starts, in float64.

    Args:
        points: one a row.
        clusters: how many, from 1 to the number of points.
        even: whether all get the same number of points. Each round is then an assignment problem, solved exactly.
        either_sign: whether a point and its negative are the same.
        restarts: random starts, of which the best result is taken.
        seed: of the starts.

    Raises:
        SettingError: there are more clusters than points, or they cannot be even.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.9]])
        >>> kmeans(points, 2, either_sign=True).labels.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
        True
    """
    flat = points.detach().double()
    require(1 <= clusters <= len(flat), f"{clusters} clusters were asked of {len(flat)} points")
    require(not even or len(flat) % clusters == 0, f"{len(flat)} points do not part into {clusters} even clusters")
    towards = _one_way(flat) if either_sign else flat
    distinct, inverse = towards.unique(dim=0, return_inverse=True)
    if len(distinct) <= clusters and not even:
        return _told(flat, inverse, clusters, either_sign=either_sign)
    if len(distinct) <= clusters:
        starts = [inverse]
    elif not even and not either_sign:
        return _told(flat, _lloyd(towards, clusters, restarts, seed), clusters, either_sign=False)
    else:
        starts = [_lloyd(towards, clusters, 1, seed * restarts + number) for number in range(restarts)]
    found = (_refined(flat, start, clusters, even=even, either_sign=either_sign) for start in starts)
    return min(found, key=lambda one: one.error)


def _lloyd(points: Tensor, clusters: int, restarts: int, seed: int) -> Int[Tensor, "points"]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Points that differ by rounding alone count as fewer: the result is right all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver = KMeans(clusters, n_init=restarts, random_state=seed)  # pyright: ignore[reportArgumentType]
        found = solver.fit(points.numpy())
    return torch.from_numpy(found.labels_).long()


def _one_way(points: Tensor) -> Tensor:
    """The points turned to the side of their leading direction."""
    _, vectors = torch.linalg.eigh(points.T @ points)
    return torch.where((points @ vectors[:, -1:]) < 0, -points, points)


def _told(points: Tensor, labels: Tensor, clusters: int, *, either_sign: bool) -> Clusters:
    """Centres and error of given clusters: with free signs a centre is the side that most of the points agree on."""
    size = points.shape[1]
    signs = torch.ones(len(points), dtype=points.dtype)
    if either_sign:
        for label in labels.unique().tolist():
            inside = labels == label
            _, vectors = torch.linalg.eigh(points[inside].T @ points[inside])
            signs[inside] = torch.where(points[inside] @ vectors[:, -1] < 0, -1.0, 1.0).double()
    counts = torch.bincount(labels, minlength=clusters).clamp(min=1)
    signed = points * signs[:, None]
    centres = points.new_zeros(clusters, size).index_add_(0, labels, signed) / counts[:, None]
    return Clusters(labels, centres, signs, float((signed - centres[labels]).square().sum()))


def _refined(points: Tensor, labels: Tensor, clusters: int, *, even: bool, either_sign: bool) -> Clusters:
    """Assignment and means in turns, from an assignment that need not be even, until the error falls no more."""
    best = _told(points, labels, clusters, either_sign=either_sign)
    fits = not even or bool((torch.bincount(labels, minlength=clusters) == len(points) // clusters).all())
    for _ in range(_ROUNDS):
        products = points @ best.centres.T
        gain = products.abs() if either_sign else products
        costs = best.centres.square().sum(1) - 2 * gain
        labels = _evenly(costs) if even else costs.argmin(1)
        found = _told(points, labels, clusters, either_sign=either_sign)
        if fits and found.error >= best.error * (1 - 1e-12):
            return best
        best, fits = found, True
    return best


def _evenly(costs: Float[Tensor, "points clusters"]) -> Int[Tensor, "points"]:
    """The cheapest assignment that gives every cluster as many points."""
    from scipy.optimize import linear_sum_assignment

    each = costs.shape[0] // costs.shape[1]
    rows, columns = linear_sum_assignment(costs.repeat_interleave(each, 1).numpy())
    labels = torch.empty(len(costs), dtype=torch.long)
    labels[torch.from_numpy(rows)] = torch.from_numpy(columns) // each
    return labels
