"""Which dimension of a layer's output holds its channels, and which are positions.

Behind convolutions it is the second one; behind linear layers, embeddings and transformers the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from karui.errors import SettingError, require, told
from karui.measuring.inference import tensors_of, watch_example
from karui.model import Model, layer_at

Channels = Literal["auto", "first", "last"]
_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.LocalResponseNorm,
)  # fmt: skip
_WITH_TIME = (nn.RNNBase, nn.MultiheadAttention)
_LAST = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
    nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, *_WITH_TIME,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Layout:
    """Where batch and channels of a layer's output are.

    Settings:
        shape: without the batch; channels and then the positions, or as it is where channels are not known.
        channels: "first" or "last" of the dimensions; "" where it cannot be known.
        batch: its dimension, 0 or, in recurrent layers that want the time first, 1.

    Example:
        >>> import torch
        >>> Layout((8, 7), "last").first(torch.zeros(2, 7, 8)).shape
        torch.Size([2, 8, 7])
    """

    shape: tuple[int, ...]
    channels: Literal["first", "last", ""] = "first"
    batch: int = 0

    @property
    def has_map(self) -> bool:
        """Whether there are several positions, each with its channels."""
        return self.channels != "" and math.prod(self.shape[1:]) > 1

    def first(self, output: Any) -> Any:
        """The output as [batch, channels, positions ...]; a recurrent layer's state is left out."""
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim < 3:
            return output
        output = output.movedim(self.batch, 0)
        return output.movedim(-1, 1) if self.channels == "last" else output


@dataclass(frozen=True)
class _Call:
    """A layer of known kind that was called."""

    path: str
    kind: Literal["first", "last"]
    shape: tuple[int, ...]
    batch: int

    @property
    def count(self) -> int:
        return self.shape[1 if self.kind == "first" else -1]


def layouts_of(model: Model, channels: Channels = "auto") -> dict[str, Layout]:
    """The layout of each layer's output for the model's example; in the order in which they end.

    A layer of a known kind tells it by itself; others, such as activations and blocks, by the layers in them or before
    them, and where the number of these layers' channels is found again. What gives neither a tensor nor, as recurrent
    layers do, a tensor and a state, is left out.

    Args:
        model: the network.
        channels: "first" or "last" take the user's word for all layers.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Dropout())
        >>> layouts_of(Model(net, example=(torch.zeros(2, 7).long(),)))["1"]
        Layout(shape=(4, 7), channels='last', batch=0)
    """
    size = next((len(x) for x in tensors_of(model.example) if x.ndim), 1)
    found: dict[str, Layout] = {}
    reader = _Reader(size, channels)

    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            del inputs
            found.pop(path, None)
            if isinstance(layer, _WITH_TIME) and isinstance(output, tuple):
                output = output[0]
            if isinstance(output, Tensor) and output.ndim >= 2:
                found[path] = reader.layout(path, layer, tuple(output.shape))

        return hook

    watch_example(model, {path: keep(path) for path, _ in model.module.named_modules() if path})
    return found


def layout_at(
    slug: str, model: Model, path: str, whose: str, channels: Channels = "auto", *, maps: bool = False
) -> Layout:
    """The layout of a named layer.

    Args:
        slug: of the technique, for errors.
        model: the network.
        path: of the layer.
        whose: "student" or "teacher", for errors.
        channels: as its setting says.
        maps: whether positions are needed.

    Raises:
        UsageError: there is no such layer.
        SettingError: it gives no tensor with channels, or nobody knows where they are.
    """
    layer_at(model.module, path)
    layout = layouts_of(model, channels).get(path)
    gives = "no tensor, or is not called" if layout is None else f"a tensor of shape {('batch', *layout.shape)}"
    wanted = "maps [batch, channels, positions ...]" + ("" if maps else " or vectors [batch, units]")
    require(
        layout is not None and len(layout.shape) >= (2 if maps else 1),
        f"'{slug}': layer '{path}' of the {whose} gives {gives.replace(chr(39), '')}.",
        f"Name a layer that gives {wanted}.",
        SettingError,
    )
    assert layout is not None  # noqa: S101  (just required)
    require(
        layout.channels != "",
        f"'{slug}': layer '{path}' of the {whose}, {told(layer_at(model.module, path))}, gives {layout.shape} for each "
        "sample, and which of these are its channels cannot be known.",
        "Set channels='first' or channels='last', or name another layer.",
        SettingError,
    )
    return layout


def may_come(model: Model, path: str) -> bool:
    """Whether a layer that is not there may be made by a step before: in the place of one that is.

    Example:
        >>> import torch
        >>> model = Model(nn.Sequential(nn.Linear(2, 2)), example=(torch.zeros(1, 2),))
        >>> may_come(model, "0.1"), may_come(model, "0"), may_come(model, "nope")
        (True, False, False)
    """
    known = dict(model.module.named_modules())
    parts = path.split(".")
    above = (known.get(".".join(parts[:number])) for number in range(1, len(parts)))
    return path not in known and any(one is not None and next(one.children(), None) is None for one in above)


def _kind(layer: nn.Module) -> Literal["first", "last", ""]:
    """By the layer's class; of layers of other libraries, by how they call their sizes."""
    if isinstance(layer, _FIRST):
        return "first"
    if isinstance(layer, _LAST) or type(layer) in _NORMS:  # some that inherit from these have channels first
        return "last"
    if next(layer.children(), None) is None:
        if isinstance(getattr(layer, "out_channels", None), int):
            return "first"
        if isinstance(getattr(layer, "out_features", None), int):
            return "last"
    return ""


@dataclass
class _Reader:
    """Reads the layouts of one forward pass, layer by layer as they end.

    Settings:
        size: of the batch.
        channels: as the user says.
        calls: the layers of known kind so far.
    """

    size: int
    channels: Channels
    calls: list[_Call] = field(default_factory=list)

    def layout(self, path: str, layer: nn.Module, shape: tuple[int, ...]) -> Layout:
        """The layout of one output; a layer of known kind is added to the calls."""
        batch = self._batch(layer, shape) if len(shape) > 2 else 0
        if batch is None:
            return Layout(shape[1:], "")
        own = (shape[batch], *(length for place, length in enumerate(shape) if place != batch))
        kind = _kind(layer)
        if kind:
            self.calls.append(_Call(path, kind, own, batch))
        if len(shape) == 2:
            return Layout(shape[1:])
        if self.channels != "auto":
            kind = self.channels
        kind = kind or _by_others(path, own, self.calls)
        return Layout((own[-1], *own[1:-1]) if kind == "last" else own[1:], kind, batch)

    def _batch(self, layer: nn.Module, shape: tuple[int, ...]) -> int | None:
        """Which dimension holds the samples; None where neither of the first two does."""
        timed = [part.batch_first for part in layer.modules() if isinstance(part, _WITH_TIME)]
        places = [place for place in (0, 1) if shape[place] == self.size]
        if len(places) < 2:
            return places[0] if places else None
        if timed:
            return 0 if timed[0] else 1
        return self.calls[-1].batch if self.calls and len(self.calls[-1].shape) == len(shape) else 0


def _by_others(path: str, shape: tuple[int, ...], calls: list[_Call]) -> Literal["first", "last", ""]:
    """By the layers of known kind in a layer, or by the last one before it."""
    inside = [call for call in calls if call.path.startswith(f"{path}.")]
    near = inside or calls[-1:]
    if not near:
        return ""
    last, agree = near[-1], len({call.kind for call in near}) == 1
    alike = len(shape) == len(last.shape)
    space = slice(2, None) if last.kind == "first" else slice(1, -1)
    if alike and shape[space] == last.shape[space] and (agree or shape[1] != shape[-1]):
        return last.kind
    first, at_end = shape[1] == last.count, shape[-1] == last.count
    if first != at_end:
        return "first" if first else "last"
    return last.kind if alike and agree else ""
