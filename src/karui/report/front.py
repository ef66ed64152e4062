"""The front of a budget's run: every point that was visited, by time, accuracy and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from karui.report.plots import DENSE, LIGHT, Plot, as_json

ABOVE, BELOW = 0.25, 0.12
"""Air over and under what is drawn, as shares of its height: discs have a size, and a number stands over each. Of that
plotly's own range knows nothing, and cuts it off.
"""


def front_plot(budget: Mapping[str, Any] | None) -> Plot | None:
    """The points of a run under a budget; None where there are none, or nothing was judged."""
    import plotly.graph_objects as go

    points = [] if budget is None else budget["points"]
    rows = [(point, point["forms"][point["best"]]) for point in points]
    if budget is None or not rows or any(form["score"] is None for _, form in rows):
        return None
    first = rows[0][1]["score"]
    unit = 100 if first["metric"] == "accuracy" else 1
    on_front = set(budget["front"])
    figure = go.Figure()
    for name, color, held in (("on the front", LIGHT, True), ("beaten by another", DENSE, False)):
        those = [row for row in rows if (row[0]["number"] in on_front) is held]
        figure.add_trace(
            go.Scatter(
                x=[form["time"] for _, form in those],
                y=[form["score"]["value"] * unit for _, form in those],
                mode="markers+text",
                text=[str(point["number"]) for point, _ in those],
                textposition="top center",
                hovertext=[_told(point, form) for point, form in those],
                hoverinfo="text",
                marker={"color": color, "size": [10 + 26 * form["bytes"] ** 0.5 for _, form in those], "opacity": 0.8},
                name=name,
            )
        )
    levels = [form["score"]["value"] * unit for _, form in rows] + _lines(figure, budget, first, unit)
    figure.update_layout(
        xaxis={"title": "time (dense: 1)", "rangemode": "tozero"},
        yaxis={
            "title": f"{first['metric']} on validation data{', %' if unit == 100 else ''}",
            "range": _with_air(levels),
        },
        legend={"orientation": "h", "y": 1.1},
    )
    caption = (
        f"Point 0 is the dense model, point {budget['point']} the result, whose times were "
        "measured once more at the end; those of others are from the way. The area of a disc is the size of its ONNX "
        "file. Each point is kept: its folder (shown when you point at it) loads with karui.load, and its model.onnx "
        "is the form that is told."
    )
    return Plot("The points visited", caption, as_json(figure))


def _told(point: Mapping[str, Any], form: Mapping[str, Any]) -> str:
    """What is shown when the pointer is over a point."""
    lines = [
        f"point {point['number']}{'' if point['number'] else ', the dense model'}: {form['told']}",
        f"time {form['time']:.2f}, bytes {form['bytes']:.2f} of dense, lost {form['lost']:.2f}",
        f"{point['epochs']} epochs of recovery",
        f"{point['folder']}, {point['folder']}/model.onnx",
    ]
    return "<br>".join(lines)


def point_rows(budget: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The points, the dense model first, each with the folder that its model lies in, relative to the page."""
    rows = []
    for point in [] if budget is None else budget["points"]:
        form = point["forms"][point["best"]]
        rows.append(
            {
                "number": str(point["number"]) if point["number"] else "0 (dense)",
                "folder": point["folder"],
                "form": form["told"],
                "time": f"{form['time']:.2f}",
                "bytes": f"{form['bytes']:.2f}",
                "lost": "not judged" if form["score"] is None else f"{form['lost']:.2f}",
                "epochs": str(point["epochs"]),
            }
        )
    return rows


def _with_air(levels: Iterable[float]) -> list[float]:
    """The range of an axis on which discs at these levels are whole, and the numbers over them.

    Example:
        >>> _with_air([90.0, 100.0])
        [88.8, 102.5]
    """
    finite = [level for level in levels if math.isfinite(level)] or [0.0]
    low, high = min(finite), max(finite)
    height = high - low or abs(high) / 10 or 1.0
    return [low - BELOW * height, high + ABOVE * height]


def _lines(figure: Any, budget: Mapping[str, Any], first: Mapping[str, Any], unit: int) -> list[float]:
    """Draw the limits that were asked for; the level of the floor, where there is one."""
    dash = {"dash": "dot", "color": DENSE}
    if budget["stated"] and "time" in budget["goal"]:
        figure.add_vline(x=budget["goal"]["time"], line=dash, annotation_text="time asked for")
    floor = budget["asked"]["max_drop"]
    if floor is None:
        return []
    value = first["value"] * unit
    change = floor if first["metric"] == "accuracy" else value * floor / 100
    level = value - change if first["higher_is_better"] else value + change
    figure.add_hline(y=level, line=dash, annotation_text="floor")
    return [level]
