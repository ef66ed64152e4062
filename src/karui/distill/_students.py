"""Students that a person can read, grown and put into layers that predict, save and export."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from karui.layers.additive import Additive, Form
from karui.layers.trees import TreeSum
from karui.numerics.additive import Shapes

Table = Float[np.ndarray, "samples columns"]


def additive_layer(shapes: Shapes, form: Form) -> Additive:
    """The layer that predicts what the shapes do."""
    layer = Additive(
        bins=[len(main) for main in shapes.mains],
        outputs=len(shapes.intercept),
        pairs=shapes.pairs,
        pair_bins=[len(edges) + 1 for edges in shapes.coarse] if shapes.pairs else (),
        form=form,
    )
    with torch.no_grad():
        layer.intercept.copy_(torch.from_numpy(shapes.intercept))
        layer.tables.copy_(torch.from_numpy(np.concatenate(shapes.mains)))
        _fill(layer.edges, shapes.edges)
        if shapes.pairs:
            outputs = len(shapes.intercept)
            layer.pair_tables.copy_(torch.from_numpy(np.concatenate([t.reshape(-1, outputs) for t in shapes.tables])))
            _fill(layer.pair_edges, shapes.coarse)
    return layer.eval()


def _fill(room: Tensor, edges: tuple[np.ndarray, ...]) -> None:
    for row, values in zip(room, edges, strict=True):
        row[: len(values)] = torch.from_numpy(values)


def tree_layer(inputs: Table, targets: Table, form: Form, *, depth: int, seed: int) -> TreeSum:
    """One tree of scikit-learn for all outputs."""
    from sklearn.tree import DecisionTreeRegressor

    tree = DecisionTreeRegressor(max_depth=depth, min_samples_leaf=5, random_state=seed).fit(inputs, targets)
    return _layer([(tree.tree_, None)], np.zeros(targets.shape[1]), 1.0, form)


def forest_layer(
    inputs: Table, targets: Table, form: Form, *, trees: int, rate: float, depth: int, seed: int
) -> TreeSum:
    """Boosted trees of scikit-learn, a series of them for each output."""
    from sklearn.ensemble import GradientBoostingRegressor

    grown: list[tuple[Any, int | None]] = []
    for output, column in enumerate(targets.T):
        series = GradientBoostingRegressor(
            n_estimators=max(1, trees), learning_rate=rate, max_depth=depth, random_state=seed
        ).fit(inputs, column)
        grown += [(one[0].tree_, output) for one in series.estimators_]
    return _layer(grown, targets.mean(0), rate, form)


def _layer(trees: list[tuple[Any, int | None]], start: np.ndarray, rate: float, form: Form) -> TreeSum:
    """A layer of scikit-learn's trees, each of them for one output, or for all (None)."""
    nodes, outputs = max(tree.node_count for tree, _ in trees), len(start)
    layer = TreeSum(len(trees), nodes, max(tree.max_depth for tree, _ in trees), outputs, form)
    with torch.no_grad():
        layer.intercept.copy_(torch.from_numpy(start))
        for number, (tree, output) in enumerate(trees):
            own = torch.arange(tree.node_count)
            place = own + number * nodes
            leaf = torch.from_numpy(tree.children_left < 0)
            layer.inputs[place] = torch.from_numpy(tree.feature).clamp(min=0).long()
            layer.thresholds[place] = torch.from_numpy(_not_above(tree.threshold))
            for name, children in (("lower", tree.children_left), ("higher", tree.children_right)):
                target = torch.where(leaf, own, torch.from_numpy(children).long())
                getattr(layer, name)[place] = target + number * nodes
            values = rate * torch.from_numpy(tree.value[:, :, 0]).float()
            if output is None:
                layer.values[place] = values
            else:
                layer.values[place, output] = values[:, 0]
    return layer.eval()


def _not_above(thresholds: np.ndarray) -> np.ndarray:
    """In single precision, rounded down: a number of single precision then goes the way that it goes in double."""
    narrow = thresholds.astype(np.float32)
    return np.where(narrow > thresholds, np.nextafter(narrow, np.float32(-np.inf)), narrow)
