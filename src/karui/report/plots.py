"""The interactive plots of a run's page, as plotly figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from karui.measuring import Comparison, Measurement

if TYPE_CHECKING:
    import plotly.graph_objects as go

DENSE, LIGHT = "#8795a3", "#0b7a75"
MAX_LAYERS = 60


@dataclass(frozen=True)
class Plot:
    """A figure with its title, what to read off it, and the figure as JSON.

    `choices` are the entries of a menu, and `traces` how many traces of the figure, in a row, each of them shows.
    """

    title: str
    caption: str
    figure: str
    choices: tuple[str, ...] = ()
    traces: int = 0


def plots(both: Comparison, layers: Mapping[str, Any]) -> list[Plot]:
    """Every plot that the record has the numbers for."""
    made = [accuracy_against_time(both), bytes_per_layer(layers), time_per_layer(layers)]
    return [plot for plot in made if plot is not None]


def accuracy_against_time(both: Comparison) -> Plot | None:
    """Both networks in the plane of time and accuracy, with their spread; a menu chooses engine, batch and threads."""
    import plotly.graph_objects as go

    if both.dense.score is None or both.light.score is None:
        return None
    shared = [where for where in _settings(both.dense) if where in _settings(both.light)]
    if not shared:
        return None
    figure = go.Figure()
    for number, where in enumerate(shared):
        ends = _label_ends(both, where)
        for name, color, measured in (("dense", DENSE, both.dense), ("compressed", LIGHT, both.light)):
            figure.add_trace(_point(name, color, measured, where, label=ends[name], visible=number == 0))
    choices = [
        f"{engine}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}" for engine, batch, threads in shared
    ]
    metric = both.light.score.metric
    unit = ", %" if metric == "accuracy" else ""
    figure.update_layout(
        xaxis={"title": "milliseconds of one call", "rangemode": "tozero"},
        yaxis={"title": f"{metric} on test data{unit}"},
    )
    better = "up" if both.light.score.higher_is_better else "down"
    return Plot(
        f"{metric.capitalize()} against time",
        f"Left and {better} is better. Bars: spread of the times, 95 % interval of the {metric}.",
        as_json(figure),
        choices=tuple(choices) if len(choices) > 1 else (),
        traces=2,
    )


def _settings(measured: Measurement) -> list[tuple[str, int, int]]:
    return [(t.engine, t.batch, t.threads) for t in measured.times]


def _label_ends(both: Comparison, where: tuple[str, int, int]) -> dict[str, str]:
    """Where each label lies: towards the middle of the plot, so that its edge does not cut it, and off the other's."""
    dense, light = both.dense.time(*where), both.light.time(*where)
    assert dense and light and both.dense.score and both.light.score  # noqa: S101, PT018  (only such come here)
    lower = both.light.score.value <= both.dense.score.value
    rows = ("top", "bottom") if lower else ("bottom", "top")
    widest = max(dense.high, light.high)
    sides = ("right" if time.median < widest / 2 else "left" for time in (dense, light))
    return {name: f"{row} {side}" for name, row, side in zip(("dense", "compressed"), rows, sides, strict=True)}


def _point(
    name: str, color: str, measured: Measurement, where: tuple[str, int, int], *, label: str, visible: bool
) -> go.Scatter:
    import plotly.graph_objects as go

    time, score = measured.time(*where), measured.score
    assert time is not None and score is not None  # noqa: S101, PT018  (only settings that both have come here)
    unit = 100 if score.metric == "accuracy" else 1
    return go.Scatter(
        x=[time.median * 1e3],
        y=[score.value * unit],
        error_x=_bar(time.median * 1e3, time.low * 1e3, time.high * 1e3),
        error_y=_bar(score.value * unit, score.low * unit, score.high * unit),
        mode="markers+text",
        text=[name],
        textposition=label,
        marker={"size": 14, "color": color},
        name=name,
        visible=visible,
        showlegend=False,
    )


def _bar(value: float, low: float, high: float) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low], "thickness": 1.2}


def bytes_per_layer(layers: Mapping[str, Any]) -> Plot | None:
    """Bytes of each layer's parameters before and after."""
    caption = "Parameters and buffers, as they lie in memory."
    return _per_layer(layers, key="bytes", scale=1e-3, unit="kB", title="Bytes of each layer", caption=caption)


def time_per_layer(layers: Mapping[str, Any]) -> Plot | None:
    """Milliseconds of each layer before and after, in the engine that the record names; torch where it names none."""
    threads = layers.get("threads")
    where = f"at batch {layers.get('batch', 1)} in {layers.get('engine', 'torch')}"
    where += "" if threads is None else f" on {threads} thread{'s' if threads > 1 else ''}"
    caption = f"Median of one call {where}, layer by layer; the whole network's time is in the table above."
    if "engine" in layers:
        caption += " Both networks are in fp32. What the engine melts into another layer counts as that layer's."
    return _per_layer(layers, key="seconds", scale=1e3, unit="ms", title="Time of each layer", caption=caption)


def _per_layer(
    layers: Mapping[str, Any], *, key: str, scale: float, unit: str, title: str, caption: str
) -> Plot | None:
    import plotly.graph_objects as go

    values = {which: {row["path"]: row.get(key) or 0 for row in layers.get(which, ())} for which in ("dense", "light")}
    paths = list(dict.fromkeys([*values["dense"], *values["light"]]))
    paths = [path for path in paths if any(side.get(path) for side in values.values())]
    if not paths:
        return None
    if len(paths) > MAX_LAYERS:
        shown = sorted(paths, key=lambda path: -max(side.get(path, 0) for side in values.values()))[:MAX_LAYERS]
        caption += f" The {MAX_LAYERS} largest of {len(paths)} layers."
        paths = [path for path in paths if path in set(shown)]
    figure = go.Figure()
    for which, name, color in (("dense", "dense", DENSE), ("light", "compressed", LIGHT)):
        sizes = [values[which].get(path, 0) * scale for path in paths]
        figure.add_trace(go.Bar(y=paths, x=sizes, name=name, orientation="h", marker={"color": color}))
    figure.update_layout(
        barmode="group",
        xaxis={"title": unit},
        yaxis={"autorange": "reversed", "automargin": True, "tickfont": {"size": 11}},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        height=max(350, 26 * len(paths) + 120),
    )
    return Plot(title, caption, as_json(figure))


def as_json(figure: go.Figure) -> str:
    """The figure in the page's dress, as JSON that may stand inside a script."""
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
    )
    # "</" inside a script would end it.
    return (figure.to_json() or "").replace("</", "<\\/")
