"""What of a model is neither structure nor weights: its task and its example inputs, as JSON values and back."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karui.artifact.pack import dtype_of
from karui.errors import ArtifactError
from karui.model import Classification, CustomTask, Detection, Origin, Regression, Task
from karui.model.importing import file_of, importable, load_callable
from karui.model.trust import require_apart

PREFIX = "karui/example/"
SMALL = 4096
"""Bytes up to which an example tensor is stored as it is."""
_TASKS: dict[str, type] = {"classification": Classification, "regression": Regression, "detection": Detection}
_DAMAGED = "The file is damaged, or was written by another version of karui."


def task_to_json(task: Task | None) -> tuple[dict[str, Any] | None, str]:
    """The task as JSON values, and a warning where it cannot be (its functions have no import path)."""
    if task is None:
        return None, ""
    for kind, cls in _TASKS.items():
        if type(task) is cls:
            fields = [f.name for f in dataclasses.fields(task) if f.init]  # pyright: ignore[reportArgumentType]
            return {"kind": kind, "settings": {name: getattr(task, name) for name in fields}}, ""
    if type(task) is CustomTask:
        paths = {name: _import_path(getattr(task, name)) for name in ("loss", "scores")}
        if all(paths.values()):
            settings = {"metric": task.metric, "higher_is_better": task.higher_is_better}
            return {"kind": "custom", "settings": settings, **paths}, ""
    return None, (
        "The task is not saved: its loss and scores are no functions of an importable module. "
        "Give it again after loading: dataclasses.replace(model, task=...)."
    )


def task_from_json(values: Mapping[str, Any] | None) -> Task | None:
    """The task that `task_to_json` wrote.

    Raises:
        ArtifactError: it does not fit this version, or a function cannot be imported.
    """
    if values is None:
        return None
    kind, settings = values.get("kind"), values.get("settings", {})
    try:
        if kind == "custom":
            return CustomTask(loss=_imported(values["loss"]), scores=_imported(values["scores"]), **settings)
        return _TASKS[str(kind)](**settings)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"The saved task '{kind}' does not fit this version of karui: {error}.", _DAMAGED
        ) from error


def _import_path(function: Callable[..., Any]) -> str:
    """`module:name` or `/absolute/file.py:name`, where a fresh process finds the function; empty if it cannot."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    home = sys.modules.get(module or "")
    if getattr(home, name, None) is not function or module == "__main__":
        return ""
    return f"{file_of(module) or module}:{name}"


def _imported(path: str) -> Callable[..., Any]:
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        return load_callable(path, ArtifactError)
    remedy = "Make the module importable, or the task will have to be given again after loading."
    odd = not name.isidentifier() or any(part.startswith("__") for part in where.split("."))
    if odd or where.partition(".")[0] in sys.stdlib_module_names:
        raise ArtifactError(f"The saved task names '{path}', which is no function of a task.", _DAMAGED)
    try:
        with importable(Path.cwd()):
            function = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError) as error:
        raise ArtifactError(f"The saved task's function '{path}' cannot be imported: {error}.", remedy) from error
    if not callable(function):
        raise ArtifactError(f"The saved task's '{path}' is no function.", remedy)
    return function


def refuse_enclosed(steps: tuple[Any, ...], task: Any, folder: Path, *, built: bool) -> None:
    """Refuse a factory, or functions of a task, that lie in the model's own folder: they may have come with it.

    Args:
        steps: the lineage.
        task: the task as JSON values.
        folder: where the model is saved.
        built: whether the factory is to be called, as no network is given.

    Raises:
        ArtifactError: one lies there.
    """
    first = steps[0] if steps else None
    if built and isinstance(first, Origin):
        require_apart(first.factory, folder, first.settings, first.sha256)
    if isinstance(task, Mapping) and task.get("kind") == "custom":
        for name in ("loss", "scores"):
            require_apart(str(task.get(name)), folder, {})


def example_to_json(example: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    """The example inputs as JSON values, and the tensors that are stored beside them.

    A tensor of up to 4096 bytes is stored as it is, and a constant one as its value; of a larger one, shape, dtype and
    range are kept, and values are drawn anew by a fixed seed.

    Raises:
        ArtifactError: an input is of a kind that JSON does not know.
    """
    tensors: dict[str, Tensor] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": _tensor_to_json(value.detach().cpu(), tensors)}
        if type(value) in (tuple, list):
            return {type(value).__name__: [told(item) for item in value]}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: told(item) for key, item in value.items()}}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        raise ArtifactError(
            f"An example input is a {type(value).__name__}, which cannot be saved.",
            "Use tensors, numbers, and tuples, lists or dicts of them.",
        )

    return told(example), tensors


def _tensor_to_json(tensor: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    wide = tensor.double() if tensor.is_floating_point() else tensor
    finite = not tensor.is_floating_point() or bool(wide.isfinite().all())
    if finite and tensor.numel() and not tensor.is_complex() and bool((wide == wide.flatten()[0]).all()):
        return {**values, "constant": wide.flatten()[0].item()}
    if tensor.numel() * tensor.element_size() <= SMALL or not finite or tensor.is_complex():
        name = f"{PREFIX}{len(tensors)}"
        tensors[name] = tensor.contiguous()
        return {**values, "stored": name}
    if tensor.is_floating_point():
        return {**values, "mean": wide.mean().item(), "spread": wide.std(correction=0).item(), "seed": len(tensors)}
    return {**values, "low": int(tensor.min()), "high": int(tensor.max()), "seed": len(tensors)}


def example_from_json(values: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The example inputs that `example_to_json` wrote.

    Raises:
        ArtifactError: the values are no example.
    """

    def made(told: Any) -> Any:
        ((kind, value),) = told.items()
        if kind == "tensor":
            return _tensor_from_json(value, tensors)
        if kind in ("tuple", "list"):
            items = [made(item) for item in value]
            return tuple(items) if kind == "tuple" else items
        return {key: made(item) for key, item in value.items()} if kind == "dict" else value

    try:
        example = made(values)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"The saved example inputs are damaged: {error}.", _DAMAGED) from error
    if not isinstance(example, tuple):
        raise ArtifactError("The saved example inputs are damaged: they are no tuple.", _DAMAGED)
    return example


def _tensor_from_json(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    shape, dtype = tuple(values["shape"]), dtype_of(values["dtype"])
    if "constant" in values:
        return torch.full(shape, values["constant"], dtype=dtype)
    if "stored" in values:
        return tensors[values["stored"]].clone()  # in memory of its own: the file may go
    generator = torch.Generator().manual_seed(values["seed"])
    if "mean" in values:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * values["spread"] + values["mean"]).to(dtype)
    return torch.randint(values["low"], values["high"] + 1, shape, generator=generator).to(dtype)
