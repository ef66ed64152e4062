"""Checks of data before anything is trained on it: each fault is one clear line with its remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Subset

from karui.data.batches import Batches, targets_of, tensors_of
from karui.data.splits import Splits
from karui.errors import DataError, KaruiError, require
from karui.model import Classification, Model, Regression, Task
from karui.model.task import NO_NUMBER, judged, labelled, split_sample

CHUNK = 1024


def check(splits: Splits, model: Model | None = None, *, progress: bool = False) -> None:
    """Read every sample once, and refuse what cannot be trained on or judged by.

    Args:
        splits: the data.
        model: the model that shall be trained on it, which then is checked too; see `check_fit`.
        progress: whether bars are shown while data that do not lie in memory are read.

    Raises:
        DataError: a split is empty; a sample cannot be read, has another shape or values that are not finite (but for
            minus infinity in targets, which is no number); there is one class only; a class number is out of range
            (-100, and what the task ignores, are none); or the model cannot take the data.

    Example:
        >>> from karui.data import load_data
        >>> check(load_data("digits"))
    """
    parts = dict(_parts(splits))
    for name, part in parts.items():
        require(
            part is not None and len(part) > 0,
            f"The {name} split of '{splits.name}' is empty.",
            "Give it some samples.",
            DataError,
        )
    task = None if model is None else model.task
    forms = {name: _check_part(name, part, splits, task, progress) for name, part in parts.items()}
    for name, form in forms.items():
        require(
            form == forms["train"],
            f"'{splits.name}': inputs of the {name} split are {_told(form)}, those of the train split "
            f"{_told(forms['train'])}.",
            "Bring all to one shape.",
            DataError,
        )
    if model is not None:
        check_fit(splits, model)


def _check_part(
    name: str, part: Any, splits: Splits, task: Task | None, progress: bool
) -> list[tuple[tuple[int, ...], str]]:
    """Check one split; the shape and type of its inputs."""
    first: list[tuple[tuple[int, ...], str]] | None = None
    seen: set[int] = set()

    def own(number: int) -> int:
        return _own_number(part, number)

    for start, inputs, targets in _read(name, part, splits.name, progress):
        form = [(tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for x in inputs]
        first = first or form
        where = f"'{splits.name}', {name} split"
        require(
            form == first,
            f"{where}: sample {own(start)} is {_told(form)}, the first one {_told(first)}.",
            "Bring all to one shape and type.",
            DataError,
        )
        for value, what in [*((x, "input") for x in inputs), *((t, "target") for t in tree_leaves(targets))]:
            # Whether a task takes minus infinity for "without label" is known where it is: in `check_fit`.
            allowed = NO_NUMBER if what == "target" else None
            told = f"{where}: the {what} of sample"
            _check_finite(value, told, lambda place, start=start: own(start + place), allowed)
        require(
            targets is not None,
            f"{where}: sample {own(start)} has no target.",
            "Give each sample as (input, target).",
            DataError,
        )
        if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
            seen |= set(targets[labelled(targets, task)].unique().tolist())
    _check_classes(name, seen, splits)
    assert first is not None  # noqa: S101  (no split is empty)
    return first


def _read(name: str, part: Any, source: str, progress: bool = False) -> Iterator[tuple[int, tuple[Tensor, ...], Any]]:
    """The number of the first sample, its inputs' tensors and targets, in pieces; one by one where not in memory.

    Inputs and targets may be dicts and the like of tensors.
    """
    if tensors_of(part) is not None:
        batches = Batches(part)
        for index in torch.arange(len(batches)).split(CHUNK):
            yield int(index[0]), *batches.fetch(index)
        return
    for number in track(range(len(part)), f"reading {name}", transient=True, disable=not progress):
        try:
            inputs, target = split_sample(part[number])
        except KaruiError:
            raise
        except Exception as error:
            raise DataError(
                f"'{source}', {name} split: sample {_own_number(part, number)} cannot be read: "
                f"{type(error).__name__}: {error}.",
                "Repair or leave out that sample.",
            ) from error
        where = f"'{source}', {name} split: the %s of sample {_own_number(part, number)}"
        leaves = tree_leaves(inputs)
        strange = next((type(x).__name__ for x in leaves if not isinstance(x, Tensor)), "")
        require(
            bool(leaves) and not strange,
            f"{where % 'input'} {_holds(inputs[0], strange)}, not a tensor.",
            "Convert it in the data set, for example with torchvision.transforms.v2.",
            DataError,
        )
        yield number, tuple(x[None] for x in leaves), None if target is None else _batched(target, where % "target")


def _holds(value: Any, strange: str) -> str:
    """How an error tells of something that is no tensor, or of a dict and the like with such a thing in it."""
    kind = type(value).__name__
    return f"is a {kind}" if kind == strange or not strange else f"is a {kind} with a {strange} in it"


def _batched(target: Any, where: str) -> Any:
    """A batch of one target: the tensor, or a dict and the like of tensors."""

    def tensor(leaf: Any) -> Tensor:
        try:
            return torch.as_tensor(leaf)[None]
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{where} {_holds(target, type(leaf).__name__)}, which holds no numbers.",
                "Give a number, a tensor, or a dict or tuple of such.",
            ) from error

    return tree_map(tensor, target)


def _own_number(part: Any, number: int) -> int:
    """A sample's number in the data set that it was given in, which a part of was taken as this split."""
    while isinstance(part, Subset):
        part, number = part.dataset, int(part.indices[number])
    return number


def _check_finite(value: Any, what: str, own: Callable[[int], int], allowed: float | None = None) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    fine = value.isfinite() if allowed is None else value.isfinite() | (value == allowed)
    bad = (~fine).flatten(1).any(1) if value.ndim > 1 else ~fine
    require(
        not bool(bad.any()),
        f"{what} {own(int(bad.nonzero()[0]) if bool(bad.any()) else 0)} holds values that are not finite.",
        "Repair or leave out such samples.",
        DataError,
    )


def _check_classes(name: str, seen: set[int], splits: Splits) -> None:
    told = {"train": "training", "test": "test"}
    if name in told and len(seen) == 1:
        raise DataError(
            f"All {told[name]} samples of '{splits.name}' are of one class ({min(seen)}).",
            "Give samples of at least two classes.",
        )
    if splits.classes and seen:
        outside = sorted(number for number in seen if not 0 <= number < len(splits.classes))
        require(
            not outside,
            f"'{splits.name}', {name} split: class {outside[:1]} is out of range for {len(splits.classes)} classes.",
            "Number the classes from 0.",
            DataError,
        )


def check_fit(splits: Splits, model: Model) -> None:
    """Run the model on two samples, and hold its outputs against the targets that its task judges them by.

    Args:
        splits: the data, which `check` has passed.
        model: the model that shall be trained on it, or judged by it; its task decides what targets may be.

    Raises:
        DataError: the model does not take the inputs or computes no numbers from them; the task cannot compare its
            outputs with the targets, or does not leave out those that are minus infinity; or a split has no label.
    """
    inputs, targets = Batches(splits.train).fetch(torch.arange(min(2, len(splits.train))))
    outputs = _outputs(splits, model, inputs)
    require(
        not (isinstance(outputs, Tensor) and outputs.is_floating_point() and bool(outputs.isnan().any())),
        f"The model computes values that are not numbers (NaN) from the first samples of '{splits.name}'.",
        "Check its weights, and the range of the inputs that it was trained on.",
        DataError,
    )
    if isinstance(model.task, Classification):
        _check_labels(splits, model.task, outputs)
    elif model.task is not None:
        _check_comparable(splits, model.task, outputs, targets, len(tree_leaves(inputs)[0]))
    if model.task is not None:
        labelled_at = _check_labelled(splits, model.task)
        if not isinstance(model.task, Classification | Regression):
            _check_holes(splits, model, model.task, labelled_at)


def _outputs(splits: Splits, model: Model, inputs: tuple[Any, ...]) -> Any:
    """The model's outputs in evaluation mode; every layer then is in the mode that it was in."""
    need, got = (
        ", ".join(str(tuple(x.shape[1:])) for x in tree_leaves(values) if isinstance(x, Tensor))
        for values in (model.example, inputs)
    )
    modes = {layer: layer.training for layer in model.module.modules()}
    try:
        with torch.no_grad():
            return model.module.eval()(*inputs)
    except Exception as error:  # the network is foreign code and may raise anything
        raise DataError(
            f"The model cannot take the data '{splits.name}': its example input is {need}, a sample is {got}.",
            misfit(model.module, inputs)
            or f"Give data of the model's shape, or a model for this data ({_first_line(error)}).",
        ) from error
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def misfit(module: nn.Module, inputs: Sequence[Any]) -> str:
    """What to do about inputs that a network does not take, where the mistake is a known one; else ""."""
    given = next((x for x in inputs if isinstance(x, Tensor)), None)
    layers = list(module.modules())
    if given is None:
        return ""
    if not given.is_floating_point() and not any(isinstance(layer, nn.Embedding) for layer in layers):
        return f"The inputs are whole numbers ({str(given.dtype).removeprefix('torch.')}): save them as float32."
    first = next((layer for layer in layers if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is not None and given.ndim == len(first.kernel_size) + 1:
        shape = "x".join(map(str, given.shape[1:]))
        return f"A sample is {shape}, without channels: give it as 1x{shape}, in NumPy x[:, None]."
    return ""


def _check_comparable(splits: Splits, task: Task, outputs: Any, targets: Any, samples: int) -> None:
    try:
        with warnings.catch_warnings():
            # torch only warns where it spreads targets over outputs of another shape
            warnings.simplefilter("error")
            task.loss(outputs, targets)
            scores = task.scores(outputs, targets)
    except Exception as error:  # the task may be foreign code and raise anything
        raise DataError(
            f"The task's loss cannot compare the model's outputs with the targets of '{splits.name}': "
            f"{_first_line(error)}.",
            "Give targets of the form that the loss takes.",
        ) from error
    require(
        isinstance(scores, Tensor) and tuple(scores.shape) == (samples,),
        f"The task's scores are {_shape_told(scores)} for {samples} samples.",
        "Return one number for each sample, shape [batch].",
        DataError,
    )


def _shape_told(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_labels(splits: Splits, task: Classification, outputs: Any) -> None:
    require(
        isinstance(outputs, Tensor) and outputs.ndim >= 2,
        f"The model gives {_shape_told(outputs)}, and classification needs a tensor [batch, classes].",
        "Wrap the network so that it returns its logits, or give a task of your own (--task module:object).",
        DataError,
    )
    classes, positions = outputs.shape[1], tuple(outputs.shape[2:])
    for name, part in _parts(splits):
        for start, targets in _targets(name, part, splits.name):
            where = f"'{splits.name}', {name} split"
            require(
                isinstance(targets, Tensor),
                f"{where}: a target is a {type(targets).__name__}, and classification needs class numbers.",
                "Give one whole number for each sample, or the model another task (--task module:object).",
                DataError,
            )
            require(
                not targets.is_floating_point(),
                f"{where}: targets are {targets.dtype}, and classification needs class numbers.",
                "Give whole numbers from 0, or the model another task.",
                DataError,
            )
            require(
                tuple(targets.shape[1:]) == positions,
                f"{where}: the target of a sample has shape {tuple(targets.shape[1:])}; the model's output takes "
                f"{positions or 'one class number'}.",
                "Have the network return [batch, classes, positions]: its classes come last (transpose(1, 2))."
                if targets.shape[1:] == outputs.shape[1:-1]
                else "Give one class number for each sample, or for each position of the output.",
                DataError,
            )
            counted = targets[labelled(targets, task)]
            bad = counted[(counted < 0) | (counted >= classes)]
            require(
                len(bad) == 0,
                f"{where}: a target from sample {start} on is class {int(bad[0]) if len(bad) else 0}; the model has "
                f"{classes} classes.",
                f"Number the classes from 0 to {classes - 1}, or give a model with more outputs.",
                DataError,
            )


def _parts(splits: Splits) -> list[tuple[str, Any]]:
    return [("train", splits.train), ("validation", splits.validation), ("test", splits.test)]


def _check_labelled(splits: Splits, task: Task) -> dict[str, int]:
    """Refuse a split without any label; the number of the first sample with one, for each split."""
    found: dict[str, int] = {}
    for name, part in _parts(splits):
        for start, targets in _targets(name, part, splits.name):
            known = judged(targets, _count(targets), task)
            if bool(known.any()):
                found[name] = start + int(known.nonzero()[0])
                break
        require(
            name in found,
            f"'{splits.name}', {name} split: no sample has a label; all targets are values that stand for none.",
            "Give it some samples with labels.",
            DataError,
        )
    return found


def _check_holes(splits: Splits, model: Model, task: Task, labelled_at: dict[str, int]) -> None:
    """Refuse minus infinity among targets where the task does not leave it out: its loss then is no number."""
    for name, part in _parts(splits):
        number = _first_hole(name, part, splits.name)
        if number is None:
            continue
        # Beside a sample with a label, as the mean over none is no number in any task.
        batch = sorted({number, labelled_at[name]})
        inputs, targets = Batches(part).fetch(torch.tensor(batch))
        with torch.no_grad():
            loss = torch.as_tensor(task.loss(_outputs(splits, model, inputs), targets))
        require(
            bool(loss.isfinite().all()),
            f"'{splits.name}', {name} split: the target of sample {_own_number(part, number)} holds minus infinity, "
            "and the task's loss does not leave it out.",
            "Repair or leave out such samples, or have the loss skip what is minus infinity.",
            DataError,
        )


def _first_hole(name: str, part: Any, source: str) -> int | None:
    """The number of the first sample with minus infinity in its target."""
    if not any(x.is_floating_point() for x in tree_leaves(next(_targets(name, part, source))[1])):
        return None  # so that data which do not lie in memory are not read again for nothing
    for start, targets in _targets(name, part, source):
        for leaf in tree_leaves(targets):
            holes = (leaf == NO_NUMBER).reshape(len(leaf), -1).any(1) if leaf.numel() else leaf.new_zeros(0)
            if bool(holes.any()):
                return start + int(holes.nonzero()[0])
    return None


def _count(targets: Any) -> int:
    return len(tree_leaves(targets)[0])


def _targets(name: str, part: Any, source: str) -> Iterator[tuple[int, Any]]:
    """The number of the first sample and targets, in pieces; without reading any input where that can be."""
    known = targets_of(part)
    if known is not None:
        for start in range(0, len(known), CHUNK):
            yield start, known[start : start + CHUNK]
        return
    for start, _, targets in _read(name, part, source):
        yield start, targets


def _told(form: list[tuple[tuple[int, ...], str]]) -> str:
    return " and ".join(f"{shape} {kind}" for shape, kind in form)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
