"""What came of a budget, in words: whether it was met, what stands in the way, and why a knee was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from karui.measuring import OnnxRuntime, layer_times
from karui.measuring.values import bytes_text
from karui.recipes.budget.cache import SURE
from karui.recipes.budget.deployments import counts
from karui.recipes.budget.front import cost, exceeded, latest
from karui.recipes.budget.stages import STUCK

if TYPE_CHECKING:
    from karui.model import Model
    from karui.recipes.budget.aims import Reach
    from karui.recipes.budget.front import Form, Point
    from karui.recipes.budget.stages import Plan
    from karui.recipes.budget.timing import Stopwatch
    from karui.recipes.budget.visits import Visitor

SHOWN = 3
"""Layers that are named."""
TOLD = 0.05
"""Share of the time from which what belongs to no layer is told."""


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
    return f"Neither a budget nor a floor was stated. {_knee(point, points)}"


def _knee(point: Point, points: Sequence[Point]) -> str:
    """Why the front's knee was taken, by the points that there are to either side of it: of other networks, as its own
    was timed more than once.
    """
    if len(points) == 1:
        return f"No other point was visited than the dense network: {shares(point)}, {_loss(point)}."
    mine = _first(point, points).number
    others = [p for p in points if _first(p, points).number != mine]
    lighter = any(cost(p) < cost(point) for p in others)
    heavier = any(cost(p) > cost(point) for p in others)
    sides = [text for text, there in (("lighter points lose more for each step", lighter),
                                      ("heavier ones gain little", heavier)) if there]  # fmt: skip
    why = f" {', '.join(sides).capitalize()}." if sides else ""
    return f"Of {len(points)} points visited, this one is the knee of the front: {shares(point)}, {_loss(point)}.{why}"


def deployed(forms: Sequence[Mapping[str, Any]], dense_bytes: int) -> str:
    """A sentence on the file to deploy; empty where it is the plain form, which all other sentences are about."""
    form = next(form for form in forms if form["chosen"])
    if form is forms[0]:
        return ""
    ratio, score = form["ratio"], form["test"]
    judged = ""
    if score is not None:
        value = "not finite" if score["value"] is None else f"{score['value']:.4g}"
        value = f"{score['value']:.1%}" if score["metric"] == "accuracy" else value
        judged = f", test {score['metric']} {value}"
    return (
        f"model.onnx is the form in {form['precision']} for {form['engine']}: {ratio['value']:.2f}x the speed of the "
        f"dense model in fp32 ({ratio['low']:.2f} to {ratio['high']:.2f}), {bytes_text(form['bytes'])} instead of "
        f"{bytes_text(dense_bytes)}{judged}. The sentences after this one are not about that file, but about the same "
        "network in fp32 (model.safetensors)."
    )


def _met(point: Point, plan: Plan) -> str:
    asked = " and ".join(f"{quantity} {share:.3g}" for quantity, share in plan.goal.items())
    told = f"{shares(point)}, {_loss(point)}"
    if not point.number:
        return f"The dense model already meets the budget ({asked} of its own in fp32), nothing was cut: {told}."
    above = any(point.share(quantity) > share for quantity, share in plan.goal.items())
    note = " What is above it is less than the clock can tell." if above else ""
    return f"The budget ({asked} of the dense model) is met: {told}.{note}"


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
    beyond = [p for p in latest(points) if not plan.holds(p)]
    if not beyond:
        return ""
    nearest = min(beyond, key=lambda p: p.form.lost)
    return f"The next point tried, time {nearest.form.time:.2f}, loses {nearest.form.lost:.2f}."


def _in_the_way(point: Point, plan: Plan, visitor: Visitor, light: Model) -> str:
    """Which limit is missed, which layers hold what is left, and what would have to give."""
    missed = point.beyond(plan.goal)
    gap = " and ".join(f"{q} {point.share(q):.2f} instead of {plan.goal[q]:.3g}" for q in missed)
    sentences = [f"The budget is not met: the best that was found takes {gap or 'what was asked'}, {_loss(point)}."]
    if point.unsure(plan.goal):
        sentences.append(
            f"The clock is sure of that time to {SURE * point.form.error:.2f} only, so that it may or may not be "
            "within the limit. Measure on a quieter machine, or ask for a little more time."
        )
    sentences += [_heaviest(light, missed, visitor.watch), _cause(point, plan, visitor)]
    return " ".join(filter(None, sentences))


def _cause(point: Point, plan: Plan, visitor: Visitor) -> str:
    """What stops the way to the budget, as far as the run has seen it: the floor, or the end of the menu."""
    points, missed = visitor.points, point.beyond(plan.goal)
    if floor := _floor(point, plan, visitor):
        return floor
    reach = _reach_of(point, visitor) or (_reach_to(point, visitor) if _stuck(point, points, missed) else None)
    if ends := _end_of_menu(reach, missed, plan, point):
        return f"What stops it is the menu: {ends}"
    return (
        f"Nothing lighter than point {point.number} was made in the stages of this run. Ask for less, or compress the "
        "result once more."
    )


def _floor(point: Point, plan: Plan, visitor: Visitor) -> str:
    """That lighter points, or lighter forms, broke the floor; and whether the menu would have ended above the goal
    all the same. Empty where none did.
    """
    points, missed = visitor.points, point.beyond(plan.goal)

    def short(p: Point) -> float:
        return max(p.share(q) / share for q, share in plan.goal.items())

    advice = f"Allow more, or give more epochs to recover in (they were {plan.epochs})."
    broken = [p for p in latest(points) if not plan.holds(p) and short(p) < short(point)]
    if broken:
        best = min(broken, key=short)
        reaches = (_reach_to(best, visitor), _reach_of(best, visitor))
        lacks = best.beyond(plan.goal)
        ends = next(filter(None, (_end_of_menu(reach, lacks, plan, best) for reach in reaches)), "")
        stops = (
            f"What stops it is the floor: point {best.number} ({shares(best)}) loses {best.form.lost:.2f} where "
            f"{plan.max_drop:g} is allowed. {advice}"
        )
        return f"{stops} That alone may not be enough: {ends}" if ends else stops
    if (narrow := _too_narrow(point, plan, points, missed)) is None:
        return ""
    tried, form = narrow
    return (
        f"What stops it is the floor: point {tried.number} in the form {form.told} (time {form.time:.2f} and bytes "
        f"{form.bytes:.2f} of the dense model) loses {form.lost:.2f} where {plan.max_drop:g} is allowed, and with "
        f"more bits it weighs more. {advice}"
    )


def _first(point: Point, points: Sequence[Point]) -> Point:
    """The point that its network was made as, before it was trained on."""
    known = {p.number: p for p in points}
    while point.number and not point.chosen and point.parent in known:
        point = known[point.parent]
    return point


def _reach_of(point: Point, visitor: Visitor) -> Reach | None:
    """How far the menu of a point's own network goes, if it was asked for more than it has."""
    known = {p.number: _first(p, visitor.points).number for p in visitor.points}
    mine = _first(point, visitor.points).number
    return next((reach for reach in reversed(visitor.reach) if known.get(reach.parent) == mine), None)


def _reach_to(point: Point, visitor: Visitor) -> Reach | None:
    """How far the menu went that a point was made from, if the point is what came of its end."""
    first = _first(point, visitor.points)
    step = (first.parent, first.target)
    return next((reach for reach in visitor.reach if first.number and (reach.parent, reach.target) == step), None)


def _stuck(point: Point, points: Sequence[Point], missed: Sequence[str]) -> bool:
    """Whether the step to it made hardly anything of what is missed lighter, so that one more would not, either."""
    first = _first(point, points)
    parent = next((p for p in points if p.number == first.parent), first)
    return all(first.share(q) > STUCK * parent.share(q) for q in missed)


def _end_of_menu(reach: Reach | None, missed: Sequence[str], plan: Plan, point: Point) -> str:
    """What a menu would leave, whatever the harm; empty where that is no reason for what is missed.

    No more than a point has: the last race may have timed it faster than the menu was thought to lead.
    """
    if reach is None or not missed:
        return ""
    left = {q: min(share, point.share(q)) for q, share in reach.shares.items()}
    above = exceeded(left, {q: plan.goal[q] for q in missed})
    if not above and len(left) == 1:
        return ""
    ends = " and ".join(f"{q} {left[q]:.2f}" for q in above or left)
    told = f"with everything that can be done from point {reach.parent}, whatever the harm, {ends} would be left"
    told = told if above else f"{told}, each by itself, and no choice leaves all at once"
    return f"{told}. Ask for more than that, or for a lighter architecture."


def _too_narrow(point: Point, plan: Plan, points: Sequence[Point], missed: Sequence[str]) -> tuple[Point, Form] | None:
    """Of the forms that broke the floor alone and were lighter in what is missed, the one that broke it least."""
    if plan.max_drop is None:
        return None

    def lighter(form: Form) -> bool:
        return all((form.time if q == "time" else form.bytes) < point.share(q) for q in missed)

    found = [
        (p, f)
        for p in latest(points)
        for f in p.forms
        if missed and f.lost > plan.max_drop and lighter(f) and counts(f, p.fp32, plan.goal)
    ]
    return min(found, key=lambda pair: pair[1].lost, default=None)


def _heaviest(light: Model, missed: Sequence[str], watch: Stopwatch) -> str:
    """The layers that hold most of what is left, at the batch size and threads of the budget; and what the engine
    spends on work of its own, which counts as part of the whole.
    """
    rest = 0.0
    if "time" in missed:
        found = layer_times(light, engine=OnnxRuntime(), batch=watch.batch, threads=watch.threads, rounds=9)
        parts, rest = {layer.path: layer.seconds for layer in found.layers}, found.rest
    else:
        parts = {}
        for name, parameter in light.module.named_parameters():
            path = name.rpartition(".")[0]
            parts[path] = parts.get(path, 0.0) + parameter.numel()
    whole = sum(parts.values()) + rest
    if not whole:
        return ""
    nobodys = "belongs to no layer, but to what the engine adds."
    if 2 * rest > whole:
        return f"{rest / whole:.0%} of the time that is left {nobodys}"
    own = f" {rest / whole:.0%} {nobodys}" if rest >= TOLD * whole else ""
    top = sorted(parts.items(), key=lambda pair: -pair[1])[:SHOWN]
    names = ", ".join(f"{path or 'the network itself'} ({share / whole:.0%})" for path, share in top)
    what = "time" if "time" in missed else "bytes"
    return f"Most of the {what} that is left lies in {names}.{own}"
