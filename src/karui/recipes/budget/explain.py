"""What came of a budget, in words: whether it was met, what stands in the way, and why a knee was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from karui.measuring import OnnxRuntime, layer_times
from karui.measuring.values import bytes_text, seconds_text

if TYPE_CHECKING:
    from karui.model import Model
    from karui.recipes.budget.front import Form, Point
    from karui.recipes.budget.stages import Plan
    from karui.recipes.budget.timing import Stopwatch
    from karui.recipes.budget.visits import Visitor

SHOWN = 3
"""Layers that are named."""


def told(point: Point, plan: Plan, visitor: Visitor, light: Model) -> str:
    """The paragraph that goes with a result.

    Args:
        point: the result, and
        light: its network.
        plan: what was asked for.
        visitor: who made the points.
    """
    points = visitor.points
    if plan.stated:
        return _met(point, plan) if plan.met(point) else _in_the_way(point, plan, visitor, light)
    if plan.max_drop is not None:
        return (
            f"No budget was stated, so the network was made lighter as far as the floor allows: {shares(point)}, "
            f"{_loss(point)} of at most {plan.max_drop:g}. {_broken(points, plan)}"
        ).strip()
    return (
        f"Neither a budget nor a floor was stated. Of {len(points)} points visited, this one is the knee of the front: "
        f"{shares(point)}, {_loss(point)}. Lighter points lose more for each step, heavier ones gain little."
    )


def deployed(forms: Sequence[Mapping[str, Any]], dense_bytes: int) -> str:
    """A sentence on the file to deploy; empty where it is the plain form, which all other sentences are about."""
    form = next(form for form in forms if form["chosen"])
    if form["chosen"] and form is forms[0]:
        return ""
    ratio, score = form["ratio"], form["test"]
    judged = ""
    if score is not None:
        value = f"{score['value']:.1%}" if score["metric"] == "accuracy" else f"{score['value']:.4g}"
        judged = f", test {score['metric']} {value}"
    return (
        f"model.onnx is the form in {form['precision']} for {form['engine']}: {ratio['value']:.2f}x the speed of the "
        f"dense model in fp32 ({ratio['low']:.2f} to {ratio['high']:.2f}), {bytes_text(form['bytes'])} instead of "
        f"{bytes_text(dense_bytes)}{judged}. All else that follows is about the network in fp32."
    )


def _met(point: Point, plan: Plan) -> str:
    asked = " and ".join(f"{quantity} {share:.3g}" for quantity, share in plan.goal.items())
    return f"The budget ({asked} of the dense model) is met: {shares(point)}, {_loss(point)}."


def shares(point: Point) -> str:
    """A point's time and bytes, and its form."""
    return f"time {point.form.time:.2f} and bytes {point.form.bytes:.2f} of the dense model ({point.form.told})"


def _loss(point: Point) -> str:
    score = point.form.score
    if score is None:
        return "accuracy not judged"
    unit = "points" if score["metric"] == "accuracy" else f"per cent of {score['metric']}"
    word = "lost" if point.form.lost >= 0 else "gained"
    return f"{abs(point.form.lost):.2f} {unit} {word} on validation data"


def _broken(points: Sequence[Point], plan: Plan) -> str:
    beyond = [p for p in points if not plan.holds(p)]
    if not beyond:
        return ""
    nearest = min(beyond, key=lambda p: p.form.lost)
    return f"The next point tried, time {nearest.form.time:.2f}, loses {nearest.form.lost:.2f}."


def _in_the_way(point: Point, plan: Plan, visitor: Visitor, light: Model) -> str:
    """Which limit is missed, which layers hold what is left, and what would have to give."""
    points, reach = visitor.points, visitor.reach
    missed = point.beyond(plan.goal)
    gap = " and ".join(f"{q} {point.share(q):.2f} instead of {plan.goal[q]:.3g}" for q in missed)
    broken = [p for p in points if not plan.holds(p)]
    sentences = [f"The budget is not met: the best that was found takes {gap or 'what was asked'}, {_loss(point)}."]
    sentences.append(_heaviest(light, missed, visitor.watch))
    if broken:
        best = min(broken, key=lambda p: max(p.share(q) / share for q, share in plan.goal.items()))
        sentences.append(
            f"What stops it is the floor: point {best.number} ({shares(best)}) loses {best.form.lost:.2f} where "
            f"{plan.max_drop:g} is allowed. Allow more, or give more epochs to recover in (they were {plan.epochs})."
        )
    elif (narrow := _too_narrow(point, plan, points, missed)) is not None:
        tried, form = narrow
        sentences.append(
            f"What stops it is the floor: point {tried.number} in the form {form.told} (time {form.time:.2f} and bytes "
            f"{form.bytes:.2f} of the dense model) loses {form.lost:.2f} where {plan.max_drop:g} is allowed, and with "
            f"more bits it weighs more. Allow more, or give more epochs to recover in (they were {plan.epochs})."
        )
    elif reach:
        ends = " and ".join(
            f"{seconds_text(v)} of time" if q == "time" else f"{bytes_text(v)} of file" for q, v in reach.items()
        )
        sentences.append(
            f"What stops it is the menu: with everything that can be done from the last point, whatever the harm, "
            f"{ends} would be left. Ask for more than that, or for a lighter architecture."
        )
    else:
        sentences.append("Nothing more on the menu makes the network lighter. Ask for less.")
    return " ".join(filter(None, sentences))


def _too_narrow(point: Point, plan: Plan, points: Sequence[Point], missed: Sequence[str]) -> tuple[Point, Form] | None:
    """Of the forms that broke the floor and were lighter in what is missed, the one that broke it least."""
    if plan.max_drop is None:
        return None

    def lighter(form: Form) -> bool:
        return all((form.time if q == "time" else form.bytes) < point.share(q) for q in missed)

    found = [(p, f) for p in points for f in p.forms if missed and f.lost > plan.max_drop and lighter(f)]
    return min(found, key=lambda pair: pair[1].lost, default=None)


def _heaviest(light: Model, missed: Sequence[str], watch: Stopwatch) -> str:
    """The layers that hold most of what is left, at the batch size and threads of the budget."""
    if "time" in missed:
        layers = layer_times(light, engine=OnnxRuntime(), batch=watch.batch, threads=watch.threads, rounds=9).layers
        parts = {layer.path: layer.seconds for layer in layers}
    else:
        parts = {}
        for name, parameter in light.module.named_parameters():
            path = name.rpartition(".")[0]
            parts[path] = parts.get(path, 0.0) + parameter.numel()
    whole = sum(parts.values())
    if not whole:
        return ""
    top = sorted(parts.items(), key=lambda pair: -pair[1])[:SHOWN]
    names = ", ".join(f"{path or 'the network itself'} ({share / whole:.0%})" for path, share in top)
    what = "time" if "time" in missed else "bytes"
    return f"Most of the {what} that is left lies in {names}."
