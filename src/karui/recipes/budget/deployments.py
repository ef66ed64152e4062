"""The forms that a point is tried in: each engine that is installed, in 32 bits and in 8, timed and judged.

8 bits are tried at every point, so that they compose with all that was done to the network: static ones, and dynamic
ones where linear layers and embeddings weigh most. A form counts only where it is measured faster than the one in 32
bits in ONNX Runtime (where bytes were asked for: not measured slower), and where the floor holds. Where static 8 bits
alone break the floor, the layers that they harm most are given back their 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from karui.data.calibration import Calibration
from karui.deployment import (
    Calibrated,
    Deployment,
    Int8,
    Int8Form,
    as_model,
    calibrate,
    layer_harms,
    leave_worst,
    mostly_linear,
    quantise,
    quantise_dynamically,
)
from karui.deployment import deployments as forms_in
from karui.errors import KaruiError, UsageError
from karui.measuring import OnnxForm, Score, evaluate, known_engine, onnx_form
from karui.measuring.engines import OnnxRuntime
from karui.measuring.filed import shared
from karui.model import Model
from karui.recipes.budget.front import ALL, Form, Point

if TYPE_CHECKING:
    from karui.recipes.budget.timing import Stopwatch
    from karui.technique import Bench

SEEN, ORDERED = 256, 64
"""Samples that the ranges of 8 bits are seen on, and those by which the harm of single layers is ordered."""
SLOWER = 1.02
"""Times of one form against another's that the clock cannot tell apart."""
SLACK = 0.5
"""Points that 8 bits may cost where no floor says; of a network that loses many, a tenth of them, as training takes
that away with the rest."""
NARROW = "int8 in onnxruntime"
"""What a form is told as that the menu is timed in 8 bits for."""
DYNAMIC = "dynamic int8"
"""How the names of forms begin whose activations become integers at each call."""
ROUNDING = 1e-9
"""Of the arithmetic by which a loss is held against a floor."""


def named(form: OnnxForm, int8: Int8Form | None) -> list[Deployment]:
    """The deployments of a form, the one in 32 bits in ONNX Runtime first."""
    return [_renamed(each) for each in forms_in(form, int8)]


def _renamed(each: Deployment) -> Deployment:
    return Deployment(
        name=f"{each.precision}, {each.engine}",
        engine=each.engine,
        precision=each.precision,
        data=shared(each),
        fp32_layers=each.fp32_layers,
    )


def score_of(deployment: Deployment, model: Model, dataset: Any, threads: int = 1) -> Score:
    """The metric of a form on a data set, computed in its engine."""
    return evaluate(as_model(deployment, model, threads=threads), dataset)


@dataclass(kw_only=True)
class Forms:
    """Makes, times and judges the forms of models on the way to a budget.

    Settings:
        dense: what all are compared with.
        bench: calibration and validation data.
        watch: times files.
        int8: whether 8 bits are tried.
        max_drop: the floor; None where there is none.
        wanted: the quantities that were asked for: "time", "bytes".
        goal: the limits of a budget that was stated, shares of the dense model: a form within them goes before others.
        notes: what could not be done, and why.
    """

    dense: Model
    bench: Bench
    watch: Stopwatch
    int8: bool = True
    max_drop: float | None = None
    wanted: Sequence[str] = ("time",)
    goal: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, model: Model, first: Score | Mapping[str, Any] | None) -> tuple[tuple[Form, ...], int]:
        """All forms of a model, the one in 32 bits in ONNX Runtime first, and which of them is the best.

        Args:
            model: the point.
            first: the dense model's score; None where the model is the dense one.
        """
        form = onnx_form(model)
        plain = self._score(model)
        found = [self._timed(d, plain, first or plain) for d in self._open(named(form, None))]
        calibrated = self._calibrated(form) if self.int8 else None
        if calibrated is not None:
            found += self._narrow(model, calibrated, found[0], first or plain)
        if self.int8 and mostly_linear(form):
            found += self._dynamic(model, form, first or plain)
        return tuple(found), self.best(found)

    def best(self, forms: Sequence[Form]) -> int:
        """The lightest of the forms that count against the first and keep the floor, and of the first itself; without a
        floor, of those that lose little more.
        """
        plain, allowed = forms[0], self._bearable(forms[0])
        within = [k for k, form in enumerate(forms) if form.lost <= allowed and (k == 0 or self._counts(form, plain))]
        fit = [k for k in within if not Point(number=0, forms=tuple(forms), best=k).beyond(self.goal)]
        within = fit or within
        return min(within, key=lambda k: (_weight(forms[k], self.wanted), k))

    def _counts(self, form: Form, plain: Form) -> bool:
        return counts(form, plain, self.wanted)

    def passed_over(self, point: Point) -> str:
        """A note on the smallest form that keeps the floor, where it was left because it is slower; else empty.

        Only for those who asked for bytes: to them it may be worth its time.
        """
        plain, allowed = point.fp32, self._bearable(point.fp32)
        slow = [form for form in point.forms[1:] if form.lost <= allowed and not self._counts(form, plain)]
        small = min(slow, key=lambda form: form.bytes, default=point.form)
        if "bytes" not in self.wanted or small.bytes >= point.form.bytes:
            return ""
        return (
            f"{small.told} was left, as it is measured slower than {plain.told}: "
            f"it would weigh {small.bytes:.2f} of the dense model instead of {point.form.bytes:.2f}, "
            f"and takes {small.time / plain.time:.2f} times as long"
        )

    def made(self, model: Model, forms: Sequence[Form]) -> list[Deployment]:
        """The files of a point's forms, made anew."""
        form = onnx_form(model)
        files = {d.name: d for d in named(form, None)}
        narrow = [f for f in forms if f.name not in files]
        if any(f.name.startswith(DYNAMIC) for f in narrow):
            files |= {d.name: d for d in named(form, quantise_dynamically(form))}
        narrow = [f for f in narrow if f.name not in files]
        if narrow:
            int8 = quantise(calibrate(form, self._batches(SEEN)), Int8(leave=narrow[0].left))
            files |= {d.name: d for d in named(form, int8)}
        return [files[f.name] for f in forms]

    def file(self, model: Model, form: Form) -> OnnxForm:
        """The file of a model in the precision of another's form; in 32 bits where it has no other."""
        plain = onnx_form(model)
        if form.told != NARROW:
            return plain
        calibrated = self._calibrated(plain)
        if calibrated is None:
            return plain
        left = tuple(path for path in form.left if path in calibrated.layers.paths)
        try:
            return quantise(calibrated, Int8(leave=left)).form
        except KaruiError as error:
            self._note(f"8 bits were not tried: {error.message}")
            return plain

    def _allowed(self, plain: Form) -> float:
        return ROUNDING + (self.max_drop if self.max_drop is not None else plain.lost + SLACK)

    def _bearable(self, plain: Form) -> float:
        """What a form may lose. Where the floor is broken in 32 bits too, a lower precision is not at fault: the point
        may yet be trained on.
        """
        allowed = self._allowed(plain)
        return allowed if plain.lost <= allowed else plain.lost + max(SLACK, plain.lost / 10)

    def _score(self, model: Model) -> Score | None:
        judged = self.bench.validation is not None and model.task is not None
        return self.bench.evaluate(model) if judged else None

    def _timed(
        self,
        deployment: Deployment,
        score: Score | None,
        first: Score | Mapping[str, Any] | None,
        left: Sequence[str] = (),
    ) -> Form:
        time = self.watch.ratio(self.dense, deployment, onnx_form(self.dense), known_engine(deployment.engine))
        return Form(
            name=deployment.name,
            told=f"{deployment.precision} in {deployment.engine}",
            time=time.value,
            error=time.error,
            bytes=deployment.bytes / onnx_form(self.dense).bytes,
            score=None if score is None else score.to_json(),
            lost=0.0 if score is None or first is None else lost(first, score),
            left=tuple(left),
        )

    def _open(self, made: Sequence[Deployment]) -> list[Deployment]:
        """Those that run: OpenVINO takes fewer operators than ONNX Runtime, which has to take all in 32 bits."""
        found = []
        for each in made:
            try:
                known_engine(each.engine).prepare(each, self.watch.threads)(self.dense.example)
            except Exception as error:  # engines raise classes of their own, without a common one
                if each.engine == OnnxRuntime().name and each.precision == "fp32":
                    raise
                told = error.message if isinstance(error, UsageError) else str(error).strip().partition("\n")[0]
                reason, _, _ = told.partition(":")  # the rest names nodes, which differ from point to point
                self._note(f"{each.precision} in {each.engine} was not tried: {reason}")
            else:
                found.append(each)
        return found

    def _batches(self, samples: int) -> Calibration:
        return Calibration(self.bench.train, samples, 64, self.bench.seed)

    def _calibrated(self, form: OnnxForm) -> Calibrated | None:
        try:
            return calibrate(form, self._batches(SEEN))
        except KaruiError as error:
            self._note(f"8 bits were not tried: {error.message}")
            return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _narrow(
        self, model: Model, calibrated: Calibrated, plain: Form, first: Score | Mapping[str, Any] | None
    ) -> list[Form]:
        """The forms in 8 bits; with the most harmful layers in 32 where that saves the floor."""
        try:
            int8 = quantise(calibrated)
        except KaruiError as error:
            self._note(f"8 bits were not tried: {error.message}")
            return []
        found = self._judged(model, calibrated.form, int8, first)
        allowed = self._allowed(plain)
        broken = [f for f in found if f.lost > allowed and self._counts(f, plain)]
        if not broken or plain.lost > allowed:
            return found
        narrow = next(d for d in named(calibrated.form, int8) if d.name == broken[0].name)
        fits = self._keeps(model, calibrated.form, narrow, first, allowed)
        order = [harm.path for harm in layer_harms(calibrated, self._batches(ORDERED), progress=self.bench.progress)]
        spared = leave_worst(calibrated, order, fits)
        if spared.form is None:
            return found
        return self._judged(model, calibrated.form, spared.form, first, spared.left)

    def _dynamic(self, model: Model, form: OnnxForm, first: Score | Mapping[str, Any] | None) -> list[Form]:
        """The form in 8 bits whose activations become integers at each call."""
        try:
            return self._judged(model, form, quantise_dynamically(form), first)
        except KaruiError as error:
            self._note(f"dynamic 8 bits were not tried: {error.message}")
            return []

    def _keeps(
        self, model: Model, form: OnnxForm, like: Deployment, first: Any, allowed: float
    ) -> Callable[[Int8Form], bool]:
        def keeps(int8: Int8Form) -> bool:
            made = next(d for d in named(form, int8) if d.name == like.name)
            return lost(first, score_of(made, model, self.bench.validation)) <= allowed

        return keeps

    def _judged(
        self,
        model: Model,
        form: OnnxForm,
        int8: Int8Form,
        first: Score | Mapping[str, Any] | None,
        left: Sequence[str] = (),
    ) -> list[Form]:
        made = self._open([d for d in named(form, int8) if d.precision == int8.precision])
        judge = self.bench.validation is not None and model.task is not None
        scores = [score_of(d, model, self.bench.validation) if judge else None for d in made]
        return [self._timed(d, score, first, left) for d, score in zip(made, scores, strict=True)]


def counts(form: Form, plain: Form, wanted: Collection[str]) -> bool:
    """Whether a form may be taken instead of the one in 32 bits in ONNX Runtime: where it is measured faster, beyond
    what the clock cannot tell; where bytes were asked for, also where the clock cannot tell the two apart. Else the
    same network would weigh a third at one time, and at another not.

    Args:
        form: another form of a network.
        plain: the network's form in 32 bits in ONNX Runtime.
        wanted: what was asked for: "time", "bytes".
    """
    return form.time < plain.time * (SLOWER if "bytes" in wanted else 1 / SLOWER)


def _weight(form: Form, wanted: Sequence[str]) -> float:
    product = 1.0
    for quantity in wanted:
        product *= form.time if quantity == "time" else form.bytes
    return product


def lost(dense: Score | Mapping[str, Any], light: Score | Mapping[str, Any]) -> float:
    """How much worse a score is: points of accuracy, or per cent of any other metric's value. Negative: better.

    A score that is not finite, as of a network that overflows, has lost `ALL`: a number that records can hold. Two such
    scores are alike.

    Example:
        >>> def score(value, metric="accuracy", up=True):
        ...     return Score(value=value, low=0, high=1, count=9, metric=metric, higher_is_better=up)
        >>> round(lost(score(0.9), score(0.88)), 9), lost(score(2.0, "error", False), score(3.0, "error", False))
        (2.0, 50.0)
    """
    one, two = (s if isinstance(s, Mapping) else s.to_json() for s in (dense, light))
    if None in (one["value"], two["value"]):
        return ALL * ((two["value"] is None) - (one["value"] is None))
    gap = one["value"] - two["value"] if one["higher_is_better"] else two["value"] - one["value"]
    return 100 * gap if one["metric"] == "accuracy" else 100 * gap / max(abs(one["value"]), 1e-12)
