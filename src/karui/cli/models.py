"""What MODEL, `--weights`, `--input` and `--task` mean: from words on the command line to a model."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.cli.weights import put_weights, read_weights
from karui.errors import KaruiError, UsageError, did_you_mean, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from karui.data import Splits
    from karui.model import Edit, Model, Task

FORMS = (
    "package.module:factory, file.py:factory, timm:NAME, torchvision:NAME, a karui directory, or the slug of an "
    "architecture"
)
SAMPLES = 2
"""Samples of an example input: with one, batch normalisation in training mode may have nothing to average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model, and whether it still has to be trained (an architecture without weights)."""

    model: Model
    untrained: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
    """What a specification leads to, before it is known what input it works on."""

    module: nn.Module
    lineage: tuple[Edit, ...]
    example: tuple[Any, ...] | None = None
    task: Task | None = None
    untrained: bool = False


def _of(model: Model, lineage: tuple[Edit, ...]) -> _Found:
    return _Found(module=model.module, lineage=lineage, example=model.example, task=model.task)


def open_model(
    spec: str,
    *,
    weights: Path | None = None,
    shape: str | None = None,
    task: str | None = None,
    data: Splits | None = None,
    seed: int = 0,
) -> Opened:
    """The model that the command line names, checked on its example input.

    Args:
        spec: see `FORMS`.
        weights: file of its trained weights.
        shape: of its input, such as "3x224x224", where neither data nor the model tell.
        task: "classification", "regression" or `module:object`; None takes the model's own, or else classification.
        data: what it works on, if known.
        seed: draws the weights of an architecture without any.

    Raises:
        UsageError: the model cannot be found, its weights do not fit, or it does not take the input.
    """
    import torch

    from karui.model import Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = _find(spec, weights, data)
    if weights is not None:
        put_weights(found.module, read_weights(weights), weights.name)
    example = found.example
    if shape is not None:
        example = from_shape(shape)
    elif data is not None:
        example = _from_data(data)
    require(
        example is not None,
        f"The shape of the input of '{spec}' is not known.",
        "Give --data, or --input with the shape of one sample, for example --input 3x224x224.",
        UsageError,
    )
    told = read_task(task) if task is not None else found.task or read_task("classification")
    model = Model(found.module, example=example or (), task=told, lineage=found.lineage)
    check_input(model, data)
    return Opened(model=model, untrained=found.untrained and weights is None)


def _find(spec: str, weights: Path | None, data: Splits | None) -> _Found:
    if (Path(spec) / "model.json").is_file():
        return _saved(spec, weights)
    name, settings = _architecture(spec)
    return _named(name, settings, data) if name else _built(spec)


def _saved(folder: str, weights: Path | None) -> _Found:
    from karui.artifact import load

    require(weights is None, f"{folder} has its own weights.", "Leave --weights out.", UsageError)
    model = load(folder)
    return _of(model, model.lineage)


def _architecture(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of an architecture such as `resnet20` or `wide_resnet:depth=10,width=2`; "" for other forms."""
    from karui.architectures import factories
    from karui.recipes.recipe import read_step

    name, colon, rest = spec.partition(":")
    if name in factories() and (not colon or "=" in rest):
        given = read_step(spec)
        return given.pop("technique"), given
    if not colon:
        folder = Path(spec)
        require(
            not folder.exists(), f"{spec} is no karui directory: it holds no model.json.", f"Give {FORMS}.", UsageError
        )
        did_you_mean(spec, list(factories()), "Model", listing=f"Give {FORMS}.")
    return "", {}


def _named(name: str, settings: dict[str, Any], data: Splits | None) -> _Found:
    """An architecture, sized for the data."""
    from karui.architectures import factories
    from karui.model import Model, resolve

    path = factories()[name]
    module, _, attribute = path.partition(":")
    takes = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    told = _sizes(data) if data is not None else {}
    settings = {**{key: value for key, value in told.items() if key in takes}, **settings}
    origin = resolve(path, settings)
    built = origin.build()
    if isinstance(built, Model):
        return dataclasses.replace(_of(built, (origin,)), untrained=True)
    sizes = {key: settings.get(key, part.default) for key, part in takes.items()}
    side, channels = sizes.get("input_size", 32), sizes.get("in_channels", 3)
    example = from_shape(f"{channels}x{side}x{side}")
    return _Found(module=built, lineage=(origin,), example=example, untrained=True)


def _sizes(data: Splits) -> dict[str, Any]:
    """What the data tells of the network that suits it, under the names that the factories use."""
    from torch import Tensor

    from karui.model.task import split_sample

    inputs, target = split_sample(data.train[0])
    told: dict[str, Any] = {}
    if isinstance(inputs[0], Tensor) and inputs[0].ndim == 3:
        told = {"in_channels": inputs[0].shape[0], "input_size": inputs[0].shape[-1]}
    if data.classes:
        told["num_classes"] = len(data.classes)
    elif isinstance(target, Tensor) and target.is_floating_point():
        told["num_classes"] = target.numel()
    return told


def _built(spec: str) -> _Found:
    from karui.model import Model, resolve

    origin = resolve(spec)
    built = origin.build()
    if isinstance(built, Model):
        return _of(built, (origin,))
    return _Found(module=built, lineage=(origin,), example=_zoo_input(spec, built))


def _zoo_input(spec: str, module: nn.Module) -> tuple[Tensor, ...] | None:
    """The input that a public model is made for."""
    if spec.startswith("timm:"):
        config = getattr(module, "default_cfg", None) or {}
        return from_shape("x".join(map(str, config.get("input_size", (3, 224, 224)))))
    return from_shape("3x224x224") if spec.startswith("torchvision:") else None


def _from_data(data: Splits) -> tuple[Any, ...]:
    import torch

    from karui.data.batches import Batches

    inputs, _ = Batches(data.train).fetch(torch.arange(min(SAMPLES, len(data.train))))
    return inputs


def from_shape(text: str) -> tuple[Tensor, ...]:
    """Random inputs of shapes such as "3x32x32", "128:int" (token numbers), or several, joined with commas.

    Raises:
        UsageError: the text is no shape.

    Example:
        >>> [tuple(x.shape) for x in from_shape("3x8x8,4")]
        [(2, 3, 8, 8), (2, 4)]
    """
    import torch

    inputs: list[Tensor] = []
    draw = torch.Generator().manual_seed(0)
    for part in text.split(","):
        found = re.fullmatch(r"(\d+(?:x\d+)*)(:int)?", part.strip())
        sizes = [int(size) for size in found[1].split("x")] if found else [0]
        require(
            min(sizes) > 0,
            f"'{part}' is no shape of an input.",
            "Give the sizes of one sample joined with x, without the batch: 3x224x224, or 128:int for token numbers.",
            UsageError,
        )
        whole = found is not None and found[2] is not None
        size = (SAMPLES, *sizes)
        try:
            inputs.append(torch.zeros(size, dtype=torch.long) if whole else torch.rand(size, generator=draw))
        except (RuntimeError, OverflowError, ValueError) as error:  # how torch says that there is no such memory
            raise UsageError(f"An input of {part.strip()} does not fit into memory.", "Give a smaller one.") from error
    return tuple(inputs)


def read_task(text: str) -> Task:
    """The task that `--task` names: `classification`, `regression`, `package.module:object` or `file.py:object`.

    Raises:
        UsageError: it is not known or cannot be imported.
    """
    from karui.model import Classification, Regression, Task
    from karui.model.importing import load_object

    known: Mapping[str, Callable[[], Task]] = {"classification": Classification, "regression": Regression}
    if text in known:
        return known[text]()
    if ":" not in text:
        did_you_mean(text, list(known), "Task", listing="Give classification, regression or module:object.")
    found = load_object(text)
    found = found() if isinstance(found, type) else found
    require(
        isinstance(found, Task),
        f"'{text}' is a {type(found).__name__}, not a task.",
        "Give an object with loss(outputs, targets) and scores(outputs, targets), such as karui.CustomTask(...).",
        UsageError,
    )
    return found


def check_input(model: Model, data: Splits | None) -> None:
    """Run the model once on its example, so that what does not fit is told before any work.

    Raises:
        UsageError: the model does not take the input, or gives fewer classes than the data has.
    """
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    from karui.data import misfit

    parts = tree_leaves(model.example)
    shape = " and ".join("x".join(map(str, x.shape[1:])) if isinstance(x, Tensor) else str(x) for x in parts)
    whose = f"the data's inputs ({data.name}: {shape})" if data is not None else f"an input of {shape}"
    modes = {layer: layer.training for layer in model.module.modules()}
    model.module.eval()
    try:
        with torch.no_grad():
            outputs = model.module(*model.example)
    except KaruiError:
        raise
    except Exception as error:  # the network is foreign code and may raise anything
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = misfit(model.module, model.example)
        hint = hint or "Give data of the shape that the network was made for, or a network for this data."
        if data is None:
            hint = "Give --input the shape that the network was made for: 3x224x224, or 128:int for token numbers."
        raise UsageError(f"The model does not take {whose}: {told}", hint) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode
    classes = len(data.classes) if data is not None else 0
    if classes and isinstance(outputs, Tensor) and outputs.ndim >= 2 and model.task is not None:
        wanted = model.task.metric != "accuracy" or outputs.shape[1] >= classes
        hint = "Build the network with as many outputs as there are classes."
        told = f"The model tells {outputs.shape[1]} classes apart, and the data has {classes}."
        require(wanted, told, hint, UsageError)
