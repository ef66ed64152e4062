"""What an additive student says, as plots: a curve with its band for each input, a map for each pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from karui.errors import require
from karui.numerics.additive import Shapes

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = 3


def shape_figure(shapes: Shapes, names: tuple[str, ...] = (), *, output: int = 0, most: int = 12) -> go.Figure:
    """The shapes of the inputs that matter most, then those of the pairs, as one plotly figure.

    Args:
        shapes: of `TransparentDistillation.shapes`.
        names: of the inputs.
        output: whose shapes, of several.
        most: at most so many inputs, by importance.

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
