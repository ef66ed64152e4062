"""The last race: when the search is over, the forms of its result are timed once more in turns with the dense model.

What it says of a point goes before what the search had measured of it, and may take the result back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from karui.measuring import Timing, known_engine, onnx_form, time_ratio
from karui.measuring.values import from_json, to_json
from karui.recipes.budget.cache import SURE
from karui.recipes.budget.deployments import score_of
from karui.recipes.budget.front import Form, Point
from karui.recipes.keeping import POINTS, digest_of, read_record, write_record

if TYPE_CHECKING:
    from karui.deployment import Deployment
    from karui.measuring import Ratio
    from karui.model import Model
    from karui.recipes.budget.stages import Plan
    from karui.recipes.budget.visits import Visitor


@dataclass(frozen=True)
class Raced:
    """A point whose forms were timed once more, each in turns with the dense model, when the search was over. Its times
    are these from then on, wherever it is spoken of; its record on disk keeps those that the search went by, so that a
    run that goes on takes the same way.

    Settings:
        point: the point, with these times.
        made: the files of its forms, and
        times: dense and light, by a form's name.
    """

    point: Point
    made: list[Deployment]
    times: Mapping[str, tuple[Timing, Timing]]


def confirmed(visitor: Visitor, point: Point, plan: Plan) -> Raced:
    """The result as the last race has it. Where that takes back a goal that the search had measured as kept, it is the
    next best of the points that were measured lighter, if the race confirms that one.
    """
    first = _race(visitor, point)
    if not plan.stated or not plan.met(point) or plan.met(first.point):
        return first
    met = [p for p in visitor.points if plan.met(p) and p.form.time < point.form.time]
    for other in sorted(met, key=plan.order):
        visitor.tell(f"point {point.number} was measured above the budget at the end; point {other.number} is tried")
        again = _race(visitor, other)
        if plan.met(again.point):
            return again
    return first


def _race(visitor: Visitor, point: Point) -> Raced:
    made = visitor.forms.made(visitor.model_of(point), point.forms)
    times = _times(visitor, point, made)
    forms = tuple(_timed(form, time_ratio(*times[form.name], across=True)) for form in point.forms)
    raced = replace(point, forms=forms)
    visitor.points[:] = [raced if p.number == raced.number else p for p in visitor.points]
    return Raced(raced, made, times)


def _times(visitor: Visitor, point: Point, made: list[Deployment]) -> dict[str, tuple[Timing, Timing]]:
    """Dense and light, by a form's name; kept, so that a run that is killed after the race has the same result."""
    mark = digest_of("race", visitor.mark, point.number, [form.name for form in made])
    file = visitor.out / POINTS / f"race-{point.number:02d}.json"
    kept = read_record(file)
    if kept is not None and kept.get("mark") == mark:
        pairs = kept["times"].items()
        return {name: (from_json(Timing, dense), from_json(Timing, light)) for name, (dense, light) in pairs}
    files = {form.name: (known_engine(form.engine), form) for form in made}
    times = visitor.watch.side_by_side(visitor.dense, onnx_form(visitor.dense), files)
    write_record(file, {"mark": mark, "times": to_json(times)})
    return times


def _timed(form: Form, ratio: Ratio) -> Form:
    """The form with its time of the last race."""
    return replace(form, time=1 / ratio.value, error=(1 / ratio.low - 1 / ratio.high) / (2 * SURE))


def forms_of(visitor: Visitor, raced: Raced, light: Model) -> list[dict[str, Any]]:
    """Every form of the result as it was raced against the dense model; the plain and the chosen one on test data."""
    test = visitor.bench.test if light.task is not None else None
    point = raced.point
    told_forms = []
    for number, form in enumerate(raced.made):
        judged = test is not None and number in (0, point.best)
        told_forms.append(
            {
                "name": form.name,
                "told": point.forms[number].told,
                "file": "model.onnx" if number == point.best else None,
                "engine": form.engine,
                "precision": form.precision,
                "fp32_layers": list(form.fp32_layers),
                "bytes": form.bytes,
                "ratio": to_json(time_ratio(*raced.times[form.name], across=True)),
                "test": score_of(form, light, test).to_json() if judged else None,
                "chosen": number == point.best,
            }
        )
    return told_forms
