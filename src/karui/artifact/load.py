"""Load: replay the lineage, put the weights in, and see that the network computes what it did."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karui.artifact import files
from karui.artifact.describe import example_from_json, refuse_enclosed, task_from_json
from karui.artifact.pack import Stored, unpack
from karui.artifact.save import FORMAT, named_tensors, probe_of
from karui.errors import ArtifactError, KaruiError, require
from karui.measuring.inference import inference, tensors_of
from karui.model import Model, Origin, Task, copied, edit_from_json

PROBE_TOLERANCE = 1e-3
"""Of the largest output: rounding differs between machines by less, another network differs by more."""


def load(folder: Path | str, *, base: Model | nn.Module | None = None) -> Model:
    """The model that was saved in `folder`, with the same weights, exact to the bit.

    Args:
        folder: where it was saved.
        base: the original network, where the lineage does not tell how it is built (it was given as an object); copied.

    Raises:
        ArtifactError: a file is missing, damaged or of a later version; the original network cannot be had; or what was
            built computes something else than what was saved.
    """
    folder = Path(folder).expanduser()
    told, contents = read_artifact(folder)
    file, path = contents[files.TENSORS], folder / files.TENSORS
    where = folder / files.JSON
    with _named(where):
        example = example_from_json(told["example"], _tensor_file(file, path))
        steps = tuple(edit_from_json(step) for step in told["lineage"])
        refuse_enclosed(steps, told["task"], folder, built=base is None)
        module, built_task = _original(steps, base, folder)
        for step in steps[1:] if steps and isinstance(steps[0], Origin) else steps:
            changed = step.replay(module, example)
            require(changed is not None, f"The edit '{step.kind}' left no network.", error=ArtifactError)
            assert changed is not None  # noqa: S101  (refused above)
            module = changed
        task = task_from_json(told["task"]) or built_task
    with _named(path):
        _put_in(module, told, lambda: _tensor_file(file, path))
    with contextlib.suppress(NotImplementedError):
        module.eval()
    model = Model(module, example=example, task=task, lineage=steps)
    if told["probe"] is not None:
        with _named(where):
            _check_probe(model, told["probe"], folder)
    return model


_FIELDS: dict[str, Any] = {
    "files": dict,
    "lineage": list,
    "task": dict | None,
    "example": dict,
    "tensors": dict,
    "tied": dict,
    "frozen": list,
    "probe": list | None,
}


def read_artifact(folder: Path) -> tuple[dict[str, Any], dict[str, files.Opened]]:
    """The content of `model.json`, and every other file that it names, all of them checked.

    Raises:
        ArtifactError: a file is missing, damaged, or of a later version.
    """
    files.recover(folder)
    path = folder / files.JSON
    data = files.read(path)
    told = files.unsealed(data, path)
    version = told.get("format")
    require(
        version == FORMAT,
        f"{path} is of format {version}; this version of karui reads format {FORMAT}.",
        "Update karui: pip install -U karui",
        ArtifactError,
    )
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(told.get(name, ...), kind)]
    strange = [name for name in told["files"] if name not in files.OURS] if not wrong else []
    for names, what in ((wrong, "field"), (strange, "file")):
        require(not names, f"{path} has a wrong {what}: {', '.join(names)}.", "Save the model again.", ArtifactError)
    contents = {}
    for name, entry in told["files"].items():
        contents[name] = file = files.Opened(folder / name)
        require(
            entry == {"bytes": file.bytes, "sha256": file.digest},
            f"{folder / name} is damaged: its {file.bytes} bytes are not those that were written.",
            "The file was changed or cut off after it was written; copy the folder again, or save the model again.",
            ArtifactError,
        )
    require(files.TENSORS in contents, f"{path} names no {files.TENSORS}.", "Save the model again.", ArtifactError)
    return told, contents


@contextlib.contextmanager
def _named(path: Path) -> Any:
    """Errors about a file's content name the file."""
    try:
        yield
    except KaruiError as error:
        if path.name in error.message:
            raise
        raise ArtifactError(f"{path}: {error.message}", error.hint) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"{path} does not fit this version of karui: {error!r}.", "Save the model again."
        ) from error


def _tensor_file(file: files.Opened, path: Path) -> dict[str, Tensor]:
    """Tensors by name; they lie in the file, which is mapped, until they are copied."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.name, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}.", "Save the model again.") from error


def _original(steps: tuple[Any, ...], base: Model | nn.Module | None, folder: Path) -> tuple[nn.Module, Task | None]:
    """The network that the lineage starts from, and the task that its factory gave it."""
    if base is not None:
        module = base.module if isinstance(base, Model) else base
        require(
            isinstance(module, nn.Module), f"base is a {type(base).__name__}, no network.", "Give a torch.nn.Module.",
            ArtifactError,
        )  # fmt: skip
        return copied(module), base.task if isinstance(base, Model) else None
    first = steps[0] if steps else None
    if not isinstance(first, Origin):
        raise ArtifactError(
            f"{folder / files.JSON} does not tell how the original network is built: it was given as an object.",
            "Build that network and give it, karui.load(folder, base=net); or name its factory when you make a model, "
            "karui.Model(..., lineage=(karui.model.resolve('package.module:factory'),)).",
        )
    built = first.build(ArtifactError)
    return (built.module, built.task) if isinstance(built, Model) else (built, None)


def _put_in(module: nn.Module, told: Mapping[str, Any], read: Callable[[], dict[str, Tensor]]) -> None:
    """Every tensor into its place, and shared ones shared as they were. What was there makes room for what is read."""
    stored, tied = told["tensors"], told["tied"]
    places = named_tensors(module)
    missing, extra = sorted({*stored, *tied} - set(places)), sorted(set(places) - {*stored, *tied})
    if missing or extra:
        what = f"has no '{missing[0]}'" if missing else f"has a '{extra[0]}' that was not saved"
        raise ArtifactError(
            f"The saved weights do not fit the network ({len(missing) + len(extra)} names differ): it {what}.",
            "Was its code changed, or another network given as base?",
        )
    fresh: set[int] = set()
    shapes = {name: tuple(place.shape) for name, place in places.items()}
    for place in places.values():
        place.data = place.data.new_empty(0)
    flat = read()
    for name, entry in stored.items():
        value = _value(name, entry, flat)
        place = places[name]
        require(
            tuple(value.shape) == shapes[name],
            f"The saved tensor '{name}' has shape {tuple(value.shape)}, and the network's {shapes[name]}.",
            "Was its code changed, or another network given as base?",
            ArtifactError,
        )
        if id(place) in fresh:  # the network shares what the saved model did not
            place = _set(module, name, nn.Parameter(value) if isinstance(place, nn.Parameter) else value)
        else:
            place.data = value.to(place.device)
        places[name] = place
        fresh.add(id(place))
    for name, first in tied.items():
        if places[name] is not places[first]:
            _set(module, name, places[first])
    frozen = set(told["frozen"])
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)


def _value(name: str, entry: Mapping[str, Any], flat: dict[str, Tensor]) -> Tensor:
    if entry["form"] == "dense":
        return flat.pop(name).clone()  # in memory of its own, aligned as torch does it
    arrays = {part: flat[f"{name}/{part}"].numpy() for part in entry["parts"]}
    try:
        return unpack(Stored(form=entry["form"], arrays=arrays, header=entry["header"]))
    except KaruiError as error:
        raise ArtifactError(f"The tensor '{name}' is damaged. {error.message}", error.hint) from error


def _set(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, tensor)
    return tensor


def _check_probe(model: Model, expected: list[dict[str, Any]], folder: Path) -> None:
    """The outputs on the example must be those that were noted when the model was saved."""
    remedy = "Its code, or the base that was given, is not what it was. Restore it, or compress the model again."
    with inference(model.module) as module:
        try:
            outputs = tensors_of(module(*model.example))
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"The network loaded from {folder} does not run on its example: {line}", remedy
            ) from error
    found = [probe_of(t) for t in outputs]
    message = f"The network loaded from {folder} computes something else than what was saved there."
    require([p["shape"] for p in found] == [p["shape"] for p in expected], message, remedy, ArtifactError)
    for ours, theirs in zip(found, expected, strict=True):
        a, b = (torch.tensor([float("nan") if v is None else v for v in p["values"]]) for p in (ours, theirs))
        allowed = max(PROBE_TOLERANCE * (theirs["scale"] or 0.0), 100 * theirs["noise"])
        close = torch.allclose(a, b, rtol=0, atol=allowed, equal_nan=True)
        require(close, message, remedy, ArtifactError)
