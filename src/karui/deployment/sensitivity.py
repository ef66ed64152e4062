"""Which layers suffer most in 8 bits, and how many of them must stay in 32.

A layer's harm is how far the outputs move on calibration data, so that no labels are needed. A few layers usually do
most of it (the first, the last, depthwise ones): left in 32 bits they cost little time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from karui.deployment.int8 import Calibrated, Int8, Int8Form, quantise
from karui.errors import DataError, require
from karui.measuring import OnnxRuntime
from karui.measuring.bar import bar


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What 8 bits do to the outputs through one layer.

    Settings:
        path: the layer.
        change: the mean square of the change of the outputs over their variance, summed over the outputs: when this
            layer alone is quantised; or, where the layers were measured by what is left, how much of the change of a
            whole quantised model goes away with it (it may be negative).
    """

    path: str
    change: float


def layer_harms(
    calibrated: Calibrated,
    batches: Iterable[tuple[Any, ...]],
    settings: Int8 | None = None,
    *,
    alone: bool = True,
    progress: bool = False,
) -> tuple[Harm, ...]:
    """The layers that become integers, the most harmful first.

    Each costs a quantisation and a pass over the batches: some 64 samples are enough to find an order. The outputs of
    the model in 32 bits wait in a temporary file, so that memory holds one batch and one quantised model.

    Args:
        calibrated: the form and its ranges.
        batches: calibration batches that can be gone through many times (`karui.data.Calibration`, a list).
        settings: how the layers are quantised; those that it leaves are not measured.
        alone: quantise each layer alone, which is exact for it but blind to what layers do together; else all but it.
        progress: show a progress bar.

    Raises:
        DataError: the batches can be gone through only once, or are none.
        SettingError: a layer to leave is not there.
    """
    settings = settings or Int8()
    require(
        iter(batches) is not iter(batches),
        "The calibration batches can be gone through only once.",
        "Give karui.data.Calibration(dataset), or a list.",
        DataError,
    )
    layers = calibrated.layers
    paths = [path for path in layers.paths if path not in layers.covered(settings.leave)]
    found = []
    with (
        tempfile.TemporaryFile(prefix="karui-") as scratch,
        bar("harm of 8 bits", len(paths) + 1, progress) as step,
    ):
        reference = _Reference(calibrated.form.data, batches, scratch)
        whole = 0.0 if alone else reference.change(quantise(calibrated, settings).data)
        step()
        for path in paths:
            if alone:
                change = reference.change(quantise(calibrated, settings, only=(path,)).data)
            else:
                spared = replace(settings, leave=(*settings.leave, path))
                change = whole - reference.change(quantise(calibrated, spared).data)
            found.append(Harm(path=path, change=change))
            step()
    return tuple(sorted(found, key=lambda harm: -harm.change))


@dataclass(frozen=True, kw_only=True)
class Spared:
    """A form with as few layers in 32 bits as the floor takes.

    Settings:
        form: the form; None where no number of layers was enough.
        left: the layers that stay in 32 bits.
        tried: what was tried, in order: (number of layers left, whether it was acceptable).
    """

    form: Int8Form | None
    left: tuple[str, ...]
    tried: tuple[tuple[int, bool], ...]


def leave_worst(
    calibrated: Calibrated,
    order: Sequence[str],
    acceptable: Callable[[Int8Form], bool],
    settings: Int8 | None = None,
) -> Spared:
    """Leave the first k layers of an order in 32 bits, for the smallest k that is acceptable.

    k doubles from nothing until a form is acceptable, and is then found by bisection: a few layers usually are enough,
    and each trial costs a quantisation and whatever `acceptable` does. Where more layers in 32 bits are not always
    better, what is found is acceptable, but a smaller number may be too. All layers left would be no 8 bits at all; it
    is not tried.

    Args:
        calibrated: the form and its ranges.
        order: paths of layers, the most harmful first (`layer_harms`).
        acceptable: says whether a form keeps the floor.
        settings: how the other layers are quantised.
    """
    settings = settings or Int8()
    forms: dict[int, Int8Form] = {}
    tried: list[tuple[int, bool]] = []

    def fits(count: int) -> bool:
        form = quantise(calibrated, replace(settings, leave=(*settings.leave, *order[:count])))
        tried.append((count, acceptable(form)))
        if tried[-1][1]:
            forms.clear()  # a smaller one replaces it
            forms[count] = form
        return tried[-1][1]

    low, high = -1, 0
    while high < len(order) and not fits(high):
        low, high = high, max(1, 2 * high)
    high = min(high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    form = forms.get(high)
    return Spared(form=form, left=tuple(order[:high]) if form is not None else (), tried=tuple(tried))


class _Reference:
    """The outputs of a form in 32 bits on calibration batches, in a file."""

    def __init__(self, data: bytes, batches: Iterable[tuple[Any, ...]], file: IO[bytes]) -> None:
        self._batches = batches
        self._file = file
        run = OnnxRuntime().prepare(data, 1)
        sums: list[Float[np.ndarray, "3"]] = []
        for batch in batches:
            outputs = [value.astype(np.float64) for value in run(batch) if value.dtype.kind == "f"]
            for value in outputs:
                np.save(self._file, value.astype(np.float32), allow_pickle=False)
            rows = [np.array([value.size, value.sum(), (value**2).sum()]) for value in outputs]
            sums = [a + b for a, b in zip(sums, rows, strict=True)] if sums else rows
        require(len(sums) > 0, "There are no calibration batches, or no outputs that are numbers.", "", DataError)
        # An output that is constant is compared by its size, and one that is zero as it is.
        spreads = [(squares / n - (total / n) ** 2, squares / n) for n, total, squares in sums]
        self._scales = [spread if spread > 1e-12 * square else square or 1.0 for spread, square in spreads]

    def _pairs(self, data: bytes) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        run = OnnxRuntime().prepare(data, 1)
        self._file.seek(0)
        for batch in self._batches:
            outputs = [value for value in run(batch) if value.dtype.kind == "f"]
            yield [(np.load(self._file, allow_pickle=False), value) for value in outputs]

    def change(self, data: bytes) -> float:
        """The mean squared change of another form's outputs, over their variance."""
        errors, counts = np.zeros(len(self._scales)), np.zeros(len(self._scales))
        for pairs in self._pairs(data):
            errors += [((a.astype(np.float64) - b) ** 2).sum() for a, b in pairs]
            counts += [a.size for a, _ in pairs]
        return float((errors / counts / self._scales).sum())
