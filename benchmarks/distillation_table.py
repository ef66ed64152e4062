"""Chapter 3 in one table: a student alone, taught in every way, and both at equal cost of training.

CIFAR-10 from the published ResNet-56 to a ResNet-20 of half the channels and a whole one; spoken digits, faces, words,
and a table of numbers for the papers that are about those. What an arm costs is its CPU time, passes of the teacher
included (the training of a teacher is not). The student alone and soft targets [30] are trained at several lengths,
and every other way is compared with what lies between these at its own cost.

A part (task x way x seed) that is finished is kept in `.cache/benchmarks/distillation_table`, so that a run that was
killed goes on; seeds come one after the other, so that `--report` can tell what there is at any time. `--smoke` does
everything on little and keeps nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _common import CACHE, Ledger, interval, publish
from _distill_arms import Arm, Lesson
from _distill_report import compared, lines, page
from _distill_tasks import Task, faces, next_words, pictures, rows, speech
from karui.data.splits import take

SEEDS = 3
FOLDER = CACHE / "distillation_table"


def run(task: Task, ledger: Ledger, folder: Path, seed: int) -> None:
    """All ways of a task and seed that are not finished."""
    if all(_key(task, arm, seed) in ledger.parts for arm in task.arms):
        return
    lesson = task.lesson(seed, folder)
    few = take(lesson.bench.train, torch.arange(2))
    replace(lesson.bench, train=few).fit(lesson.student, epochs=1)  # what is only done once in a process costs no way
    ledger.once(f"{task.name}, teacher, seed {seed}", lambda: _teacher(task, lesson))
    for arm in task.arms:
        ledger.once(_key(task, arm, seed), lambda a=arm: part(task, a, lesson))


def _key(task: Task, arm: Arm, seed: int) -> str:
    return f"{task.name}, {arm.name}, seed {seed}"


def _teacher(task: Task, lesson: Lesson) -> dict[str, Any]:
    return {"score": task.score(lesson.teacher, lesson), "parameters": lesson.teacher.parameters}


def part(task: Task, arm: Arm, lesson: Lesson) -> dict[str, Any]:
    """Score and cost of one way."""
    given = arm.before(lesson)
    began = time.process_time()
    model = arm.run(lesson, given)
    seconds = time.process_time() - began
    return {"score": task.score(model, lesson), "seconds": seconds, "parameters": model.parameters}


def collected(task: Task, parts: dict[str, Any]) -> dict[str, Any]:
    """What is finished of a task, each way with what the two bases reach at its cost."""
    done = {
        arm.name: {seed: parts[_key(task, arm, seed)] for seed in range(SEEDS) if _key(task, arm, seed) in parts}
        for arm in task.arms
    }
    teachers = [parts[key] for seed in range(SEEDS) if (key := f"{task.name}, teacher, seed {seed}") in parts]
    return {
        "about": task.about,
        "unit": task.unit,
        "teacher": spread([one["score"] for one in teachers]),
        "rows": [_row(name, runs, done) for name, runs in done.items() if runs],
        "missing": [arm.name for arm in task.arms if len(done[arm.name]) < SEEDS],
    }


def _row(name: str, runs: dict[int, Any], done: dict[str, dict[int, Any]]) -> dict[str, Any]:
    row = {
        "way": name,
        "seeds": len(runs),
        "score": spread([one["score"] for one in runs.values()]),
        "seconds": spread([one["seconds"] for one in runs.values()]),
        "parameters": next(iter(runs.values()))["parameters"],
    }
    for base, values in compared(name, runs, done).items():
        row[base] = spread(values)
    return row


def spread(values: Sequence[float]) -> dict[str, Any]:
    """As `interval`; of a single value only itself, as it tells nothing of its spread."""
    return interval(values) if len(values) > 1 else {"mean": values[0], "values": list(values)}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique."""
    return lines(told)


def _little(task: Task) -> Task:
    def lesson(seed: int, folder: Path) -> Lesson:
        whole = task.lesson(seed, folder)
        few = take(whole.bench.train, torch.arange(min(100, len(whole.bench.train))))
        bench = replace(whole.bench, train=few, training=replace(whole.bench.training, epochs=1))
        return replace(whole, bench=bench)

    return replace(task, lesson=lesson)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="one seed, little data; keeps nothing")
    options.add_argument("--report", action="store_true", help="tell what is finished; measure nothing")
    options.add_argument("--only", nargs="+", default=(), metavar="TASK", help="measure these tasks alone")
    options.add_argument("--ways", nargs="+", default=("",), metavar="PART", help="and of them the ways so named")
    asked = options.parse_args()
    torch.set_num_threads(1)
    quick = [rows(), faces(), speech()]
    little = {"test": 200} if asked.smoke else {}
    long = [next_words(taught=0 if asked.smoke else 3), pictures(**little), pictures(1.0, **little)]
    tasks = [*quick, *long]
    if asked.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            ledger = Ledger(Path(scratch) / "parts.json")
            for task in map(_little, tasks):
                run(task, ledger, Path(scratch), 0)
            print(page({task.name: collected(task, ledger.parts) for task in tasks}, seeds=SEEDS))
        return
    ledger = Ledger(FOLDER / "parts.json")
    for some in () if asked.report else (quick, long):
        for seed in range(SEEDS):
            for task in some:
                if not asked.only or task.name in asked.only:
                    named = tuple(arm for arm in task.arms if any(part in arm.name for part in asked.ways))
                    run(replace(task, arms=named), ledger, FOLDER, seed)
    values = {
        task.name: collected(task, ledger.parts) for task in tasks if f"{task.name}, teacher, seed 0" in ledger.parts
    }
    publish("distillation_table", {"tasks": values}, page(values, seeds=SEEDS), measured({"tasks": values}))


if __name__ == "__main__":
    main()
