"""Where networks look, as pictures: attention maps of several networks on the same samples, in a page or as numbers.

    maps = {"student": attention_maps(light, data), "teacher": attention_maps(heavy, data)}
    write_maps(Path("maps.html"), maps, pictures_of(data))

On the command line `attention_transfer:maps=maps.html` writes those of the student before and after its training and of
its teacher.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from karui.artifact.files import write_file
from karui.data import Batches
from karui.distill._layouts import Channels, layout_at
from karui.distill._maps import last_of_each_size
from karui.distill.attention import Pool, attention_map, normalised
from karui.errors import SettingError, require
from karui.model import Model
from karui.train.guide import Guide

if TYPE_CHECKING:
    import plotly.graph_objects as go

Maps = Mapping[str, Float[Tensor, "samples *space"]]
KINDS = (".html", ".npz")
SAMPLES = 6


def attention_maps(
    model: Model,
    data: Any,
    layers: tuple[str, ...] = (),
    *,
    samples: int = SAMPLES,
    pool: Pool = "sum",
    power: float = 2.0,
    channels: Channels = "auto",
) -> dict[str, Float[Tensor, "samples *space"]]:
    """By path, the map of each of the first samples, of unit length: what attention transfer compares.

    Args:
        model: the network; left as it is.
        data: a data set.
        layers: paths; none takes the last layer of each size in space.
        samples: how many.
        pool: how channels become one map, as in `AttentionTransfer`.
        power: of the activations before, as there.
        channels: where they are, as there.

    Raises:
        UsageError: there is no such layer.
        SettingError: it gives no map.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
        >>> data = torch.utils.data.TensorDataset(torch.rand(9, 1, 8, 8))
        >>> maps = attention_maps(Model(net, (torch.zeros(1, 1, 8, 8),)), data)
        >>> {path: tuple(one.shape) for path, one in maps.items()}
        {'1': (6, 6, 6)}
    """
    paths = layers or last_of_each_size(model, channels)
    layouts = {path: layout_at("attention_maps", model, path, "model", channels, maps=True) for path in paths}
    with torch.no_grad():
        _, shown = Guide(model, paths)(_first(data, samples))
    made = {path: attention_map(layout.first(shown[path]), pool, power) for path, layout in layouts.items()}
    return {path: normalised(maps).reshape(maps.shape) for path, maps in made.items()}


def pictures_of(data: Any, samples: int = SAMPLES) -> Float[Tensor, "samples height width"] | None:
    """The first inputs of a data set, as the mean of their channels; None where they are no pictures."""
    x = _first(data, samples)[0]
    is_picture = isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()
    return x.mean(1) if is_picture else None


def _first(data: Any, samples: int) -> tuple[Any, ...]:
    batches = Batches(data)
    return batches.fetch(torch.arange(min(samples, len(batches))))[0]


def map_figure(
    networks: Mapping[str, Maps], pictures: Float[Tensor, "samples height width"] | None = None
) -> go.Figure:
    """A row for each sample, a column for its picture and for each layer of each network; bright is where it looks.

    Maps over time are a line of cells; of those over volumes the sum over the depth is shown.

    Args:
        networks: by name, what `attention_maps` gives; of the same samples.
        pictures: beside them.

    Example:
        >>> map_figure({"student": {"0": torch.rand(2, 3, 3)}}).layout.annotations[0].text
        'student, 0'
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    columns = {f"{name}, {path}": maps for name, each in networks.items() for path, maps in each.items()}
    if pictures is not None:
        columns = {"picture": pictures, **columns}
    rows = len(next(iter(columns.values()))) if columns else 0
    require(rows > 0, "There is no map to show.", "Give at least one network's maps of one sample.", SettingError)
    figure = make_subplots(rows=rows, cols=len(columns), column_titles=list(columns), vertical_spacing=0.2 / rows)
    for column, (name, maps) in enumerate(columns.items(), 1):
        for row, one in enumerate(maps.cpu().double(), 1):
            cells = one[None] if one.ndim == 1 else one.flatten(0, -3).sum(0) if one.ndim > 2 else one
            scale = "gray" if pictures is not None and name == "picture" else "viridis"
            figure.add_trace(go.Heatmap(z=cells.numpy(), colorscale=scale, showscale=False), row=row, col=column)
    figure.update_yaxes(autorange="reversed", showticklabels=False)
    figure.update_xaxes(showticklabels=False)
    return figure.update_layout(height=40 + 150 * rows, width=40 + 150 * len(columns), font={"size": 10})


def write_maps(
    file: Path, networks: Mapping[str, Maps], pictures: Float[Tensor, "samples height width"] | None = None
) -> None:
    """Write maps to one file: ".html" is a page by itself, without network, ".npz" the numbers, "network/path" each.

    Raises:
        SettingError: the file's name ends otherwise.
    """
    require(file.suffix in KINDS, f"'{file}' ends in '{file.suffix}'; give one of {', '.join(KINDS)}", "", SettingError)
    if file.suffix == ".html":
        page = map_figure(networks, pictures).to_html(include_plotlyjs=True, full_html=True)
        write_file(file, page.encode())
        return
    held = {f"{name}/{path}": maps.cpu().numpy() for name, each in networks.items() for path, maps in each.items()}
    if pictures is not None:
        held["pictures"] = pictures.cpu().numpy()
    stream = io.BytesIO()
    np.savez_compressed(stream, **held)  # pyright: ignore[reportArgumentType]
    write_file(file, stream.getvalue())
