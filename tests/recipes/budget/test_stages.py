"""The way to a budget, on networks that are only numbers: what is visited, and where the epochs go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.stages import PUSH, Plan, _Way, travel


def at(number: int, time: float, lost: float, epochs: int = 0) -> Point:
    return Point(number=number, forms=(Form(name="", told="", time=time, bytes=time, lost=lost),), epochs=epochs)


@dataclass
class Law:
    """Networks that lose by a law of their time and of the epochs that they were trained for."""

    loses: Callable[[float, int], float]
    start: float = 1.0
    points: list[Point] = field(default_factory=list)
    spent: int = 0

    def dense(self) -> Point:
        self.points.append(at(0, self.start, 0.0))
        return self.points[0]

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point:
        return self._visited(parent, target["time"], epochs, {"a layer": "narrower"})

    def polish(self, parent: Point, epochs: int) -> Point:
        return self._visited(parent, parent.form.time, epochs, {})

    def _visited(self, parent: Point, time: float, epochs: int, chosen: dict[str, str]) -> Point:
        self.spent += epochs
        passes = parent.epochs + epochs
        point = at(len(self.points), time, self.loses(time, passes), passes)
        self.points.append(replace(point, parent=parent.number, chosen=chosen))
        return self.points[-1]


FAR = Plan(goal={"time": 0.2}, stated=False, max_drop=1.0, epochs=16)


def recovering(share: float) -> Callable[[float, int], float]:
    """What is lost grows with the time that is saved, and falls with the root of the passes."""
    return lambda time, epochs: share * (1 - time) / max(epochs, 1) ** 0.5


def test_points_are_judged_by_what_is_foreseen_of_them():
    """After one pass all that is worth having breaks the floor; nearly all epochs go to one point, which keeps it."""
    visits = Law(loses=recovering(5.0), start=0.6)
    point = travel(visits, visits.dense(), FAR)
    assert FAR.holds(point)
    assert point.form.time < 0.46, "a visit's loss after one pass was taken for the final one"
    assert visits.spent == FAR.epochs
    assert point.epochs >= FAR.epochs / 2


def test_a_point_that_training_does_not_save_is_given_up():
    visits = Law(loses=lambda time, _: 0.2 if time > 0.5 else 1.8)
    point = travel(visits, visits.dense(), FAR)
    assert 0.5 < point.form.time < 0.65
    assert FAR.holds(point)
    assert visits.spent == FAR.epochs


def test_a_stated_goal_is_kept_to_and_the_rest_trains_it():
    visits = Law(loses=recovering(2.0))
    plan = replace(FAR, goal={"time": 0.5}, stated=True)
    point = travel(visits, visits.dense(), plan)
    assert plan.met(point)
    assert point.form.time == pytest.approx(0.5)
    assert visits.spent == plan.epochs


def test_without_a_floor_every_stage_has_its_share():
    visits = Law(loses=recovering(9.0))
    plan = replace(FAR, goal={"time": 0.4}, stated=True, max_drop=None)
    point = travel(visits, visits.dense(), plan)
    assert point.form.time == pytest.approx(0.4)
    assert visits.spent == plan.epochs


def test_without_epochs_nothing_is_trained_on():
    visits = Law(loses=lambda time, _: 3 * (1 - time))
    plan = replace(FAR, epochs=0)
    point = travel(visits, visits.dense(), plan)
    assert visits.spent == 0
    assert point.form.lost == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_epochs_that_are_spent_leave_what_holds_without_them(epochs: int, stated: bool):
    """Training that brings nothing costs nothing: the result is no heavier than without an epoch."""
    visits = Law(loses=lambda time, _: 3 * (1 - time) if time > 0.6 else 9.0)
    plan = replace(FAR, epochs=epochs, stated=stated)
    point = travel(visits, visits.dense(), plan)
    assert plan.holds(point)
    assert 0.6 < point.form.time < 0.9
    assert visits.spent == epochs
    assert len(visits.points) <= 6


def test_the_way_goes_on_from_where_the_dense_network_stands():
    """Its form in 8 bits is at 0.6 already: no visit aims at what is reached, and bisection starts from there."""
    visits = Law(loses=lambda time, _: 0.0 if time > 0.5 else 9.0, start=0.6)
    travel(visits, visits.dense(), FAR)
    assert all(point.form.time < 0.6 for point in visits.points[1:])
    assert round(visits.points[1].form.time, 2) == 0.45
    assert 0.45 < visits.points[2].form.time < 0.55


def test_the_way_ends_at_a_point_that_needs_the_epochs():
    """Thought to lose most of the floor in the end, it gets all that is left; no visit goes to a lighter one."""
    visits = Law(loses=lambda time, epochs: 45 * (0.47 - time) ** 1.5 / max(epochs, 1) ** 0.5, start=0.47)
    plan = replace(FAR, max_drop=2.0, epochs=6)
    point = travel(visits, visits.dense(), plan)
    assert plan.holds(point)
    assert point.epochs == plan.epochs == visits.spent
    assert min(visited.form.time for visited in visits.points) == point.form.time
    stated = Law(loses=visits.loses, start=0.47)
    travel(stated, stated.dense(), replace(plan, stated=True))
    assert min(visited.form.time for visited in stated.points) < point.form.time


def test_the_way_to_a_stated_goal_is_not_given_up_by_a_hair():
    """The first step is thought to lose 0.98 of a floor of 1 in the end: the next ones show that it recovers faster."""
    visits = Law(loses=lambda time, epochs: 4.8 * (1 - time) / max(epochs, 1) ** 1.2, start=0.72)
    plan = replace(FAR, goal={"time": 0.25}, stated=True, epochs=8)
    point = travel(visits, visits.dense(), plan)
    assert plan.met(point)
    assert 0.97 < visits.points[1].form.lost / 6**0.5 < 1.0


@pytest.mark.parametrize("stated", [False, True])
def test_a_bisection_ends_at_a_point_that_needs_the_epochs(stated: bool):
    """The first step breaks the floor for good; what lies between needs all that is left, and gets it."""
    visits = Law(loses=lambda time, epochs: (1.6 if time > 0.47 else 4.0) / max(epochs, 1) ** 0.3, start=0.6)
    plan = replace(FAR, epochs=6, stated=stated)
    point = travel(visits, visits.dense(), plan)
    assert plan.holds(point)
    assert point.epochs == 5
    assert 0.47 < point.form.time < 0.55


def test_where_training_saves_nothing_the_way_goes_back_without():
    """What was thought to hold does not, and the epochs are spent: the dense network is no result where a lighter one
    keeps the floor as it is.
    """
    visits = Law(loses=lambda time, epochs: 0.5 if time > 0.55 else 1.5 / (1 + 0.01 * epochs), start=0.6)
    plan = replace(FAR, epochs=6)
    point = travel(visits, visits.dense(), plan)
    assert visits.spent == plan.epochs
    assert plan.holds(point)
    assert point.number
    assert point.form.time < 0.6


def test_room_that_is_left_is_used_as_far_as_the_next_point_tells():
    """What broke the floor says how far a point that loses nothing can go; a small fixed step would leave most."""
    visits = Law(loses=lambda time, epochs: 42 * max(0.45 - time, 0) / max(epochs, 1) ** 0.5, start=0.49)
    plan = replace(FAR, max_drop=2.0, epochs=6)
    point = travel(visits, visits.dense(), plan)
    assert plan.holds(point)
    assert visits.points[1].form.time > 0.44
    assert point.form.time < 0.85 * visits.points[1].form.time


@dataclass
class Wide(Law):
    """Networks that count in a form of twice the time where they break the floor."""

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point:
        point = replace(super().lighten(parent, target, epochs), target=dict(target))
        form = replace(point.form, time=point.form.time * (2 if point.form.lost > 1 else 1))
        self.points[-1] = replace(point, forms=(form,))
        return self.points[-1]


def test_a_broken_point_in_a_heavier_form_ends_no_bisection():
    """It was tried at its target, whatever the form that counts: what lies between is tried, too."""
    visits = Wide(loses=lambda time, _: 0.9 if time > 0.3 else 6.0, start=0.5)
    point = travel(visits, visits.dense(), replace(FAR, epochs=12))
    assert 0.3 < point.form.time < 0.36


def test_a_point_that_training_would_bring_far_below_the_floor_is_made_lighter():
    """It holds after one pass; with those that are left a lighter one does, too."""
    visits = Law(loses=lambda time, epochs: 25 * max(0.4 - time, 0) ** 1.5 / max(epochs, 1) ** 0.5, start=0.4)
    point = travel(visits, visits.dense(), replace(FAR, epochs=5))
    assert FAR.holds(visits.points[1])
    assert not FAR.holds(visits.points[2])
    assert FAR.holds(point)
    assert point.form.time < 0.8 * visits.points[1].form.time


@dataclass
class Doubtful(Law):
    """The dense network's menu ends a little above the goal, as a clock has it that knows little; the next one does
    not.
    """

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point:
        point = super().lighten(parent, target, epochs)
        time = max(target["time"], 0.7 if parent.number == 0 else 0)
        self.points[-1] = replace(point, forms=(replace(point.form, time=time, error=0.03),))
        return self.points[-1]


def test_a_point_that_is_above_the_goal_within_the_error_is_no_end_of_the_way():
    visits = Doubtful(loses=recovering(0.5))
    plan = Plan(goal={"time": 0.66}, stated=True, max_drop=3.0, epochs=6)
    point = travel(visits, visits.dense(), plan)
    assert plan.met(point)
    assert point.form.time <= 0.66


@dataclass
class Coarse(Law):
    """A menu with one choice for a parent; what is chosen once more is trained on, as visits do."""

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point | None:
        twin = next((p for p in self.points if p.chosen and p.parent == parent.number), None)
        if twin is None:
            return super().lighten(parent, {"time": 0.5}, epochs)
        return self.polish(twin, epochs) if epochs else None


def test_a_bisection_that_comes_upon_its_broken_end_again_is_over():
    """Nothing lies between: it is trained on once, not at each bisection, and once more with all that is left."""
    visits = Coarse(loses=lambda time, epochs: 0.0 if time == 1 else 40 / max(epochs, 1) ** 0.3)
    travel(visits, visits.dense(), Plan(goal={"time": 0.5}, stated=True, max_drop=1.0, epochs=40))
    assert len([point for point in visits.points if point.number and not point.chosen]) == 2
    assert visits.points[-1].epochs > 30


def after(first: Point, then: Point) -> Law:
    """A dense network, a lighter one, and what it became as it was trained on; nothing more is to be had of it."""
    visits = Law(loses=lambda _, __: 9.0)
    visits.dense()
    visits.points += [replace(first, chosen={"a layer": "narrower"}), replace(then, parent=first.number)]
    return visits


@pytest.mark.parametrize("then", [at(2, 0.5, 0.9, 40), at(2, 0.504, 0.9, 40), at(2, 0.5, 1.1, 5), at(2, 0.504, 1.1, 5)])
def test_what_is_left_goes_to_the_last_training_of_a_network(then: Point):
    """Also where the clock has the same network as a little lighter before; kept floor or not."""
    visits = after(at(1, 0.5, 0.95 if FAR.holds(then) else 1.5, 1), then)
    _Way(visits, FAR).settled()
    assert visits.points[3].parent == 2


def test_without_a_floor_the_knee_is_a_network_as_it_was_trained_last():
    """The clock has it as lighter before, by more than what it lost then seems to count."""

    @dataclass
    class Again(Law):
        def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point:
            del parent, target
            number = len(self.points)
            if number == 1:
                self.points.append(replace(at(1, 0.5, 0.3, 1), chosen={"a layer": "narrower"}))
            elif number == 2:
                self.points.append(replace(at(2, 0.52, 0.29, 2), parent=1))
            else:
                self.points.append(replace(at(number, 0.52, 9.0, epochs), chosen={"a layer": "gone"}))
            return self.points[-1]

    visits = Again(loses=lambda _, __: 0.2)
    travel(visits, visits.dense(), replace(FAR, max_drop=None))
    assert visits.points[-1].parent == 2


def test_a_network_before_it_was_trained_on_is_no_end_of_the_room_below_it():
    """It broke the floor at hardly less time, by the clock: that does not tell how far a lighter one may go."""
    visits = after(at(1, 0.4, 1.4, 1), at(2, 0.41, 0.3, 4))
    _Way(visits, FAR).settled()
    assert visits.points[3].parent == 2
    assert visits.points[3].form.time == pytest.approx(PUSH * 0.41)


def test_a_training_that_broke_the_floor_does_not_take_what_held_away():
    visits = after(at(1, 0.5, 0.9, 1), at(2, 0.5, 1.8, 40))
    assert _Way(visits, FAR).settled().number == 1


@pytest.mark.parametrize("goal", [{"bytes": 1.0}, {"time": 1 - 1e-12}, {}])
def test_a_goal_that_is_reached_already_takes_one_step(goal: dict[str, float]):
    assert Plan(goal=goal, stated=True, max_drop=None, epochs=1).stages == 1


class Costly(Law):
    """Training leaves a network that loses less, in the heavier of its forms: 8 bits break the floor now."""

    def polish(self, parent: Point, epochs: int) -> Point:
        self._visited(parent, 0.8, epochs, {})
        self.points[-1] = replace(self.points[-1], forms=(replace(self.points[-1].form, lost=0.0),))
        return self.points[-1]


@pytest.mark.parametrize("max_drop", [1.0, None])
def test_a_goal_that_is_met_is_not_trained_away(max_drop: float | None):
    visits = Costly(loses=lambda *_: 0.5)
    plan = replace(FAR, goal={"time": 0.5}, stated=True, max_drop=max_drop)
    point = travel(visits, visits.dense(), plan)
    assert visits.points[-1].form.time == 0.8
    assert plan.met(point)
