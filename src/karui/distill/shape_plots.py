"""What an additive student says, as plots: a curve with its band for each input, a map for each pair.

Beside the student's curves others can be laid: those of the same student taught by labels, which tell what the network
has learned that the labels alone do not say, and the network's own partial dependence, as a check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from karui.distill.transparent import lesson_of, scores_of
from karui.errors import require
from karui.measuring.inference import inference
from karui.model import Classification, Model
from karui.numerics.additive import Shapes, binned

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = 3
DASHED = ("firebrick", "steelblue", "darkgreen")


def partial_dependence(
    model: Model, dataset: Any, shapes: Shapes, *, samples: int = 200, seed: int = 0
) -> tuple[Float[np.ndarray, "bins outputs"], ...]:
    """A network's mean scores where one input is set and the others stay as samples have them (Friedman 2001).

    For each input a table like that of a student's shape, with the weighted mean zero. Where inputs go together it also
    asks about samples that there are none of, which a student's shapes do not.

    Args:
        model: the network.
        dataset: its inputs.
        shapes: of a student, for the bins; an input is set to the median of each.
        samples: how many are looked at, drawn at random.
        seed: draws them.
    """
    lesson, _ = lesson_of(model, dataset)
    picked = np.random.default_rng(seed).permutation(len(lesson.inputs))[:samples]
    classes, tables = isinstance(model.task, Classification), []
    with inference(model.module) as module:
        for number, (edges, weights) in enumerate(zip(shapes.edges, shapes.weights, strict=True)):
            column, table = lesson.inputs[:, number], []
            for place in range(len(edges) + 1):
                changed = lesson.inputs[picked].copy()
                changed[:, number] = np.median(column[binned(column, edges) == place])
                given = torch.from_numpy(changed).reshape(-1, *model.example[0].shape[1:]).to(model.example[0])
                table.append(scores_of(module(given), classes=classes)[0].double().mean(0).numpy())
            made = np.stack(table)
            tables.append(made - (weights[:, None] * made).sum(0) / weights.sum())
    return tuple(tables)


def shape_figure(
    shapes: Shapes,
    names: tuple[str, ...] = (),
    *,
    output: int = 0,
    most: int = 12,
    beside: Mapping[str, Sequence[Float[np.ndarray, "bins outputs"]]] | None = None,
) -> go.Figure:
    """The shapes of the inputs that matter most, then those of the pairs, as one plotly figure.

    Args:
        shapes: of `TransparentDistillation.shapes`.
        names: of the inputs.
        output: whose shapes, of several.
        most: at most so many inputs, by importance.
        beside: by name, further tables over the same bins, one for each input, drawn dashed: the `mains` of a student
            taught by labels, or a `partial_dependence`.

    Raises:
        SettingError: there is no such output.

    Example:
        >>> from karui.numerics.additive import Boosting, fit_additive
        >>> x = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
        >>> figure = shape_figure(fit_additive(x, x.astype(float), Boosting(rounds=5)), ("age",))
        >>> figure.layout.annotations[0].text
        'age'
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    outputs = len(shapes.intercept)
    require(0 <= output < outputs, f"output is {output}; give a number from 0 to {outputs - 1}")
    titles = names or tuple(f"x{number}" for number in range(len(shapes.mains)))
    inputs = np.argsort(-shapes.importance()[:, output], kind="stable")[:most]
    shown = [*(titles[i] for i in inputs), *(f"{titles[i]} and {titles[j]}" for i, j in shapes.pairs)]
    columns = min(COLUMNS, len(shown))
    figure = make_subplots(rows=-(-len(shown) // columns), cols=columns, subplot_titles=shown)
    for place, number in enumerate(inputs):
        x, height, band = _steps(shapes, int(number), output)
        row, column = place // columns + 1, place % columns + 1
        for sign in (-1.96, 1.96):
            fill = "tonexty" if sign > 0 else None
            edge = go.Scatter(x=x, y=height + sign * band, fill=fill, line={"width": 0}, showlegend=False)
            figure.add_trace(edge, row=row, col=column)
        curve = go.Scatter(x=x, y=height, line={"color": "black"}, showlegend=False)
        figure.add_trace(curve, row=row, col=column)
        for which, (name, tables) in enumerate((beside or {}).items()):
            other = go.Scatter(
                x=x, y=np.repeat(tables[number][:, output], 2), name=name, legendgroup=name, showlegend=place == 0,
                line={"dash": "dash", "color": DASHED[which % len(DASHED)]},
            )  # fmt: skip
            figure.add_trace(other, row=row, col=column)
    for place, ((i, j), table) in enumerate(zip(shapes.pairs, shapes.tables, strict=True), start=len(inputs)):
        x, y = (_middles(shapes.coarse[number]) for number in (i, j))
        cells = go.Heatmap(x=x, y=y, z=table[:, :, output].T, colorscale="RdBu", zmid=0, showscale=False)
        figure.add_trace(cells, row=place // columns + 1, col=place % columns + 1)
    return figure


def _steps(shapes: Shapes, number: int, output: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The corners of a step function, its height there, and the band's half width in standard errors."""
    borders = _borders(shapes.edges[number])
    x = np.repeat(borders, 2)[1:-1]
    height, band = (np.repeat(table[number][:, output], 2) for table in (shapes.mains, shapes.bands))
    return x, height, band


def _borders(edges: np.ndarray) -> np.ndarray:
    """Edges, and an end on either side for the outer bins, which have none: as wide as their neighbours."""
    if len(edges) == 0:
        return np.array([-0.5, 0.5])
    first, last = (edges[1] - edges[0], edges[-1] - edges[-2]) if len(edges) > 1 else (1.0, 1.0)
    return np.concatenate([[edges[0] - first], edges, [edges[-1] + last]])


def _middles(edges: np.ndarray) -> np.ndarray:
    borders = _borders(edges)
    return (borders[:-1] + borders[1:]) / 2
