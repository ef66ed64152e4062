"""Engine and precision, chosen by measurement: the forms to try, timed in turns, and the one that pays.

Nothing is believed of a form: 8 bits can be slower than 32 (few channels, no fast kernels), and OpenVINO slower than
ONNX Runtime (small batches, thin networks). A form measured slower than the dense one is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from karui.deployment.int8 import Int8Form, Precision
from karui.errors import UsageError, require
from karui.measuring import Clock, OnnxForm, Ratio, Timings, known_engine, time_ratio
from karui.measuring.filed import Filed, shared

ENGINES = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model as it is deployed: a file, and the engine that runs it.

    Settings:
        name: what tables call it.
        engine: "onnxruntime" or "openvino".
        precision: "fp32", "int8" or "dynamic int8".
        data: the bytes of the ONNX file; those of a large one wait on disk, and are read each time.
        fp32_layers: paths of layers with weights that stay in 32 bits though the form is in 8.

    Raises:
        SettingError: the engine or the precision is not known.

    Example:
        >>> Deployment(name="dense", engine="onnxruntime", precision="fp32", data=b"...").bytes
        3
    """

    name: str
    engine: str
    precision: Precision
    data: bytes = Filed()  # pyright: ignore[reportAssignmentType]  (reads and takes bytes)
    fp32_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.engine in ENGINES, f"engine is '{self.engine}'; give one of {', '.join(ENGINES)}")
        known = get_args(Precision)
        require(self.precision in known, f"precision is '{self.precision}'; give one of: {', '.join(known)}")

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return Filed.size(self)


def deployments(
    form: OnnxForm, int8: Int8Form | None = None, *, name: str = "model", engines: Sequence[str] = ENGINES
) -> tuple[Deployment, ...]:
    """The ways to deploy a model: each engine that is installed, in 32 bits and, where there is such a form, in 8.

    Args:
        form: the model in 32 bits.
        int8: the same in 8.
        name: the model's name; a deployment is called, for example, "model, int8, openvino".
        engines: names of the engines; one that is not installed is left out.
    """
    usable = [engine for engine in engines if not known_engine(engine).missing()]
    made = [Deployment(name=f"{name}, fp32, {e}", engine=e, precision="fp32", data=shared(form)) for e in usable]
    if int8 is not None and (int8.quantised or int8.stored):
        made += [
            Deployment(
                name=f"{name}, {int8.precision}, {e}",
                engine=e,
                precision=int8.precision,
                data=shared(int8.form),
                fp32_layers=tuple(int8.fp32),
            )
            for e in usable
        ]
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Raced:
    """Forms that were timed in turns with one that they are compared with.

    Settings:
        against: the form that all are compared with: the dense model, or this one in 32 bits.
        forms: the forms.
        timings: the times of all, `against` included, and what could not be measured.
    """

    against: Deployment
    forms: tuple[Deployment, ...]
    timings: Timings

    def ratio(self, form: Deployment, batch: int, threads: int = 1) -> Ratio | None:
        """How many times faster a form is than `against`, with its interval; None where it was not measured."""
        pair = [
            next((t for t in self.timings.of(d.name) if (t.batch, t.threads) == (batch, threads)), None)
            for d in (self.against, form)
        ]
        if pair[0] is None or pair[1] is None:
            return None
        return time_ratio(pair[0], pair[1], across=True)


def race(
    forms: Sequence[Deployment],
    example: tuple[Any, ...],
    *,
    against: Deployment | None = None,
    clock: Clock | None = None,
    progress: bool = False,
) -> Raced:
    """Time forms in turns, in one run, each in its own engine.

    Args:
        forms: what is timed.
        example: inputs of the model.
        against: what they are compared with; by default the first of them.
        clock: batch sizes, threads and rounds; its engines are not asked.
        progress: show a progress bar.

    Raises:
        UsageError: there are no forms, or two of one name.
    """
    require(len(forms) > 0, "There is no form to time.", "Give those of deployments(...).", UsageError)
    reference = against if against is not None else forms[0]
    entrants = {form.name: form for form in (reference, *forms)}
    clash = [form.name for form in forms if entrants[form.name] is not form]
    require(not clash, f"Two forms are called '{(clash or [''])[0]}'.", "Give each a name of its own.", UsageError)
    runs = {name: (known_engine(form.engine), form.data) for name, form in entrants.items()}
    timings = (clock or Clock(threads=(1,))).race(runs, example, progress=progress)
    return Raced(against=reference, forms=tuple(forms), timings=timings)


def choose(
    raced: Raced,
    acceptable: Callable[[Deployment], bool] | None = None,
    *,
    batch: int = 1,
    threads: int = 1,
    prefer: Literal["time", "bytes"] = "time",
) -> Deployment | None:
    """The form that pays most, of those that are not slower than what they were compared with.

    A form counts as faster where the whole 95 % interval of its ratio lies above 1, as slower where it lies below.

    Args:
        raced: the forms, timed.
        acceptable: says whether a form keeps the floor; asked of the best form first, and no further than needed. None
            takes every form.
        batch: which of the times decides: the batch size,
        threads: and the number of threads.
        prefer: "time": the fastest of those that are faster, else the smallest that is not slower; "bytes": the
            smallest that is not slower, the faster of two equals.

    Returns:
        The form; None where none is acceptable.
    """
    measured = [(form, raced.ratio(form, batch, threads)) for form in raced.forms]
    standing = [(form, ratio) for form, ratio in measured if ratio is not None and not ratio.high < 1]

    def key(pair: tuple[Deployment, Ratio]) -> tuple[float, ...]:
        form, ratio = pair
        if prefer == "bytes":
            return (form.bytes, -ratio.value)
        return (-ratio.value, form.bytes) if ratio.low > 1 else (0.0, form.bytes, -ratio.value)

    best = (form for form, _ in sorted(standing, key=key))
    return next((form for form in best if acceptable is None or acceptable(form)), None)
