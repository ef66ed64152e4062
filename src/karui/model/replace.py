"""Replacing layers of a network without touching its class, as an edit that a saved model can repeat."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from karui.errors import ArtifactError, SurgeryError, require
from karui.model.copying import left_over
from karui.model.edits import edit
from karui.model.taps import layer_at, taps
from karui.model.value import Model

# Classes of torch.nn whose constructor's arguments can be read off their attributes of the same name.
_PLAIN = (
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Dropout2d",
    "ELU",
    "Embedding",
    "Flatten",
    "GELU",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "Mish",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "ZeroPad2d",
)


def describe_layer(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    """Import path and settings from which `build_layer` makes a layer of the same structure.

    A layer class of karui tells its own by `settings()`; common classes of torch.nn, and `nn.Sequential` of such, are
    read.

    Raises:
        SurgeryError: the class is neither.

    Example:
        >>> describe_layer(nn.Linear(4, 2))
        ('torch.nn:Linear', {'in_features': 4, 'out_features': 2, 'bias': True})
    """
    cls = type(layer)
    if cls is nn.Sequential:
        inner = [[name, *describe_layer(child)] for name, child in layer.named_children()]
        return "torch.nn:Sequential", {"layers": inner}
    if cls.__name__ in _PLAIN and cls is getattr(nn, cls.__name__):
        return f"torch.nn:{cls.__name__}", _jsonable(_read_settings(layer), cls)
    own: Any = getattr(layer, "settings", None)
    if cls.__module__.startswith("karui.") and callable(own):
        return f"{cls.__module__}:{cls.__qualname__}", _jsonable(own(), cls)
    raise SurgeryError(
        f"A layer of class {cls.__module__}.{cls.__qualname__} cannot be put into a model's lineage.",
        "Use a layer class of karui, a common layer of torch.nn, or an nn.Sequential of these.",
    )


def _read_settings(layer: nn.Module) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(layer).__init__).parameters if name not in _NOT_READ]
    values = {name: getattr(layer, name) for name in names}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    return values


_NOT_READ = frozenset({"self", "args", "kwargs", "device", "dtype", "_weight", "_freeze", "min_value", "max_value"})


def _jsonable(settings: Any, cls: type) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SurgeryError(
            f"The settings of a {cls.__qualname__} layer cannot be saved as JSON: {error}.",
            "Its settings() must give numbers, strings, lists and dicts only.",
        ) from error


def build_layer(path: str, settings: Mapping[str, Any]) -> nn.Module:
    """The layer that `describe_layer` told, freshly initialised.

    Only the classes that `describe_layer` writes are built, so that a saved file cannot have anything else called.

    Raises:
        ArtifactError: the class may not be named by a lineage, or does not take these settings.

    Example:
        >>> build_layer("torch.nn:Linear", {"in_features": 4, "out_features": 2, "bias": False})
        Linear(in_features=4, out_features=2, bias=False)
    """
    where, _, name = path.partition(":")
    try:
        if path == "torch.nn:Sequential":
            layers = nn.Sequential()
            for child, inner, values in settings["layers"]:
                layers.add_module(child, build_layer(inner, values))
            return layers
        as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return _layer_class(where, name)(**as_tuples)
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ArtifactError(
            f"The layer {path} cannot be built from its saved settings: {type(error).__name__}: {error}",
            "The file is damaged, or was written by another version of karui.",
        ) from error


def _layer_class(where: str, name: str) -> type[nn.Module]:
    if where == "torch.nn" and name in _PLAIN:
        return getattr(nn, name)
    cls = None
    if where.startswith("karui.") and name.isidentifier():
        try:
            cls = getattr(importlib.import_module(where), name, None)
        except ImportError as error:
            raise ArtifactError(f"The layer {where}:{name} is not known to this version of karui: {error}.") from error
    if not (
        isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == where and hasattr(cls, "settings")
    ):
        raise ArtifactError(
            f"A saved model names the layer {where}:{name}, which is no layer of karui.",
            "Only layers of karui and of torch.nn are built from a file.",
        )
    return cls


@edit
@dataclasses.dataclass(frozen=True)
class Replace:
    """Layers replaced by others: {path: (import path of the class, its settings)}."""

    kind: ClassVar[str] = "replace"
    layers: dict[str, Any]
    text: str = ""

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module | None:
        """Put freshly initialised layers of the same classes and settings at the same paths.

        Raises:
            ArtifactError: there is no such path, or the layer cannot be built.
        """
        del example
        if module is None:
            raise ArtifactError("The lineage starts with a replacement; there is no network to change.")
        for path in self.layers:
            layer_at(module, path, ArtifactError)
        return _swapped(module, {path: build_layer(*told) for path, told in self.layers.items()})

    def describe(self) -> str:
        """What was replaced, in one line."""
        if self.text:
            return self.text
        kinds = sorted({str(told[0]).rpartition(":")[2] for told in self.layers.values()})
        return f"replaced {len(self.layers)} layer{'s' * (len(self.layers) != 1)} by {', '.join(kinds)}"


def replace_layers(
    model: Model,
    layers: Mapping[str, nn.Module],
    text: str = "",
    *,
    check: bool = True,
    spent: Sequence[nn.Module] = (),
) -> Model:
    """A model in which the layers at the given paths are others; `model` stays as it is.

    The network's class is not touched: wherever the old layer is held (under several names, in a plain list) the new
    one takes its place.

    Args:
        model: the model to change.
        layers: {path: new layer}; "" replaces the whole network. New layers are copied.
        text: one line for the report: what was done.
        check: run both networks on the example and compare the shapes that the layers take and give.
        spent: the model's network, or new layers, where nobody needs them any more: their tensors go into the result as
            they are, without a copy.

    Raises:
        SurgeryError: there is no layer at a path; two paths meet in one layer or lie inside each other; a new layer's
            class cannot be saved, gives another shape, or is passed by because the network uses the old layer's
            weights without calling it.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> light = replace_layers(Model(net, example=(torch.zeros(1, 4),)), {"0": nn.Linear(4, 4, bias=False)})
        >>> light.parameters, light.lineage[-1].describe()
        (16, 'replaced 1 layer by Linear')
    """
    if not layers:
        return model
    _check_paths(model.module, layers)
    told = {path: list(describe_layer(layer)) for path, layer in layers.items()}
    new = model.evolve(_swapped(model.module, layers, spent), Replace(told, text))
    if check:
        _check_shapes(model, new, list(layers))
    return new


def _check_paths(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    seen: dict[int, str] = {}
    for path, layer in layers.items():
        require(
            isinstance(layer, nn.Module),
            f"The new layer for '{path}' is a {type(layer).__name__}, not a torch.nn.Module.",
            error=SurgeryError,
        )
        old = layer_at(module, path, SurgeryError)
        twin = seen.setdefault(id(old), path)
        require(
            twin == path, f"'{twin}' and '{path}' are one layer.", "Replace it once; both names follow.", SurgeryError
        )
    for outer in layers:
        within = {id(child) for child in layer_at(module, outer).modules()}
        inner = next((path for path in layers if path != outer and id(layer_at(module, path)) in within), None)
        message = f"'{inner}' lies inside '{outer}', which is replaced too."
        require(inner is None, message, "Replace one of them.", SurgeryError)


def _swapped(module: nn.Module, layers: Mapping[str, nn.Module], spent: Sequence[nn.Module] = ()) -> nn.Module:
    """A copy of `module` with other layers in it.

    The copy's memo is told that each old layer has been copied already, as the new one: so every reference to it is
    followed, and the old weights are not copied. New layers are copied first with the same memo, which keeps tensors
    that they share with the rest of the network shared. Tensors of what is spent count as copied, as themselves.
    """
    memo: dict[int, Any] = {id(t): t for each in spent for t in (*each.parameters(), *each.buffers())}
    memo |= left_over(module)
    old = {path: layer_at(module, path) for path in layers}
    new = {path: copy.deepcopy(layer, memo) for path, layer in layers.items()}
    for path, layer in new.items():
        memo[id(old[path])] = layer.train(old[path].training)
    return copy.deepcopy(module, memo)


def _check_shapes(before: Model, after: Model, paths: list[str]) -> None:
    given = _shapes(before, paths)
    unused = [path for path in paths if path not in given]
    require(
        not unused,
        f"The network does not call the layer '{', '.join(unused)}' on the example input, so it cannot be replaced.",
        "It may use the layer's weights directly (as attention does with its output projection); leave it out.",
        SurgeryError,
    )
    made = _shapes(after, paths)
    for path in paths:
        kind = type(layer_at(after.module, path)).__name__
        require(
            made.get(path) == given[path],
            f"The new layer at '{path}' ({kind}) gives {made.get(path)} where the old one gave {given[path]}.",
            "A replacement must keep the layer's output shape.",
            SurgeryError,
        )
    # Once more without hooks: torch's transformer layers take a short cut through the weights only when none is there.
    _shapes(after, [])


def _shapes(model: Model, paths: list[str]) -> dict[str, Any]:
    modes = [(layer, layer.training) for layer in model.module.modules()]
    with contextlib.suppress(NotImplementedError):  # a captured program refuses to be asked
        model.module.eval()
    try:
        with torch.no_grad(), taps(model.module, paths) as seen:
            model.module(*model.example)
    except Exception as error:
        where = f"with the new layer at '{', '.join(paths)}'" if paths else "as it stands"
        raise SurgeryError(
            f"The network does not run {where} on its example input: {type(error).__name__}: {error}",
            "A replacement must take what the old layer took and give what it gave.",
        ) from error
    finally:
        for layer, mode in modes:
            layer.training = mode
    return {path: _shape(value) for path, value in seen.items()}


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shape(inner) for inner in value]
    return type(value).__name__
