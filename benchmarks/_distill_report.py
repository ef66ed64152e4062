"""The page of `distillation_table`: each way beside the student alone and [30] at the same cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from _common import ROOT, shown, table
from _distill_arms import ALONE, SOFT

SLUGS = {
    "[30]": "knowledge_distillation",
    "[31]": "logit_regression",
    "[32]": "neuron_selection_distillation",
    "[33]": "fitnets_hint",
    "[34]": "attention_transfer",
    "[36]": "munge_compression",
    "[37]": "born_again_network",
    "[39]": "deep_mutual_learning",
    "[40]": "transparent_distillation",
    "[41]": "data_free_distillation",
}
ELSEWHERE_ALONE = {"[35]": "detection_distillation", "[38]": "guided_low_bit_training"}
TITLES = {
    "pictures": "CIFAR-10, ResNet-56 to a ResNet-20 of half the channels",
    "pictures, whole student": "CIFAR-10, ResNet-56 to a ResNet-20",
    "spoken digits": "spoken digits, a fifth of the labels",
    "rows of numbers": "8x8 digits, 200 samples",
    "faces": "ORL faces, pairs of people not taught",
    "words": "WikiText-2, a small LSTM",
}
WITHIN = 1.1
"""A cost above the longest length by no more than this is taken as equal: seconds differ that much by themselves."""
BASES = {"alone at equal cost": ALONE, "[30] at equal cost": SOFT}
OVER = {"alone at equal cost": "over alone", "[30] at equal cost": "over [30]"}


def lengths_of(base: str, names: Iterable[str]) -> list[str]:
    """The base itself and the ones that are trained longer."""
    return [name for name in names if name == base or name.startswith(f"{base}, ")]


def compared(name: str, runs: dict[int, Any], done: dict[str, dict[int, Any]]) -> dict[str, list[float]]:
    """Seed by seed, what the bases reach at the way's own cost, and what the way is over that.

    A base's score at a cost lies on the line between the two lengths beside it, over the logarithm of the seconds;
    outside of all lengths it is that of the nearest, as nothing is known beyond.
    """
    found: dict[str, list[float]] = {}
    for told, base in BASES.items():
        if name.startswith((base, ALONE)):
            continue
        for seed, one in runs.items():
            rungs = [done[length][seed] for length in lengths_of(base, done) if seed in done[length]]
            if len(rungs) > 1:
                reached = _between(one["seconds"], rungs)
                found.setdefault(told, []).append(reached)
                found.setdefault(OVER[told], []).append(one["score"] - reached)
    return found


def _between(seconds: float, rungs: list[dict[str, float]]) -> float:
    known = sorted((math.log(rung["seconds"]), rung["score"]) for rung in rungs)
    return float(np.interp(math.log(seconds), *zip(*known, strict=True)))


INTRODUCTION = """Every way trains the same untrained student. Seconds are those of the CPU for the whole training, one
thread: the student's steps, all that the technique does beside them, and each pass of the teacher ([30] and [31] ask it
once for each sample and keep what it says, as do [33] and [37] for their soft targets). The training of a teacher
counts for none of the ways; [37] counts the network that its first generation learns from, [39] its peer. The student
alone and [30] are trained at several lengths; "at equal cost" is what lies between these, on a logarithmic scale of
seconds, at the cost of the way in that line, seed by seed. Nothing is known beyond the longest: there its own score is
told, with how much dearer the way was, and the comparison is not one at equal cost.
Mean and 95 % interval over the seeds, differences in pairs of seeds. All ways of a task have one learning rate, which
suits none of them best."""
ELSEWHERE = """## What is measured where, and what the teacher cost

CIFAR-10, half the channels, has [30], [33], [34], [37] and [39]; the whole student the same but for [34] by itself;
words [30], [31], [37] and [39]; spoken digits these and [33]. [32] is measured on faces, [36], [40] and [41] on rows of
numbers: each on data of its paper's kind, beside [30] at equal cost. Two are in none of these tables. [35] is about
boxes and has its own, `results/detection_distillation.md`, where the arm of soft classes with a background of 1 is [30]
at temperature 1 and half the weight: real 8x8 digits of five classes are pasted onto a cluttered canvas of 32 pixels,
so that boxes are known exactly and a detector is trained in minutes (CamVid has class maps and no boxes). [35] compares
at equal passes, where a pass of its taught arms includes one of the teacher. [38] makes networks of few bits,
beside which a student of full precision is no comparison: its own table, `results/guided_low_bit_training.md`, has the
same bits trained directly and under [30], at equal passes and at equal cost.

In the tables above a teacher costs what it takes to ask it: its forward passes count, in seconds of the CPU, with the
way that asks. [30], [31], [36], [37], [40], the second stage of [33] and the students of [41] ask once for each sample
and keep what is said; [32], [34] and the first stage of [33] look inside and ask in each pass. Training the teacher
counts for none of them, but where the way itself trains it: the first network of [37], the peer of [39]."""


def page(tasks: dict[str, Any], *, seeds: int) -> str:
    """The whole page."""
    least = min(row["seeds"] for task in tasks.values() for row in task["rows"])
    whole = not any(task["missing"] for task in tasks.values())
    unmeasured = [name for name in TITLES if name not in tasks]
    lacking = f" Not measured at all: {', '.join(unmeasured)}." if unmeasured else ""
    state = [f"**Unfinished**: of {seeds} seeds at least {least} in each line that is told.{lacking}"]
    state = [] if whole and not unmeasured else state
    parts = ["# Distillation: a student alone, taught in every way, and at equal cost", *state, INTRODUCTION]
    parts += [f"## {name[0].upper()}{name[1:]}\n\n{_task(task)}" for name, task in tasks.items()]
    return "\n\n".join([*parts, ELSEWHERE, f"## What the papers claim\n\n{inventory()}"])


def inventory() -> str:
    """Of each paper's own benchmark, how many of its claims were seen, and which were not."""
    body = []
    for paper, slug in sorted((SLUGS | ELSEWHERE_ALONE).items()):
        file = ROOT / "results" / f"{slug}.json"
        if not file.is_file():
            body.append([paper, "not measured", "", ""])
            continue
        claims = json.loads(file.read_text("utf-8"))["claims"]
        missed = "; ".join(claim for claim, seen in claims.items() if not seen)
        body.append([paper, f"`results/{slug}.md`", f"{sum(claims.values())} of {len(claims)}", missed])
    return table(["paper", "its own benchmark", "claims seen", "not seen"], body)


def _task(task: dict[str, Any]) -> str:
    head = ["way", task["unit"], "CPU seconds", "parameters", *(f"{base}" for base in BASES), "over [30]", "seeds"]
    body = [
        [
            row["way"],
            told(row["score"]),
            f"{row['seconds']['mean']:.1f}",
            f"{row['parameters']:,}",
            *(_reached(task, row, told_, base) for told_, base in BASES.items()),
            told(row["over [30]"]) if "over [30]" in row else "",
            str(row["seeds"]),
        ]
        for row in task["rows"]
    ]
    about = f"{task['about'][0].upper()}{task['about'][1:]}. The teacher: {told(task['teacher'])}."
    missing = f"\n\nNot all seeds yet: {', '.join(task['missing'])}." if task["missing"] else ""
    ratios = [max(seen) / min(seen) for row in task["rows"] if len(seen := row["seconds"]["values"]) > 1]
    apart = f"\n\nSeconds of one way differ by up to {max(ratios):.1f} times from seed to seed." if ratios else ""
    return f"{about}\n\n{table(head, body)}{missing}{apart}"


def _reached(task: dict[str, Any], row: dict[str, Any], name: str, base: str) -> str:
    """What a base reaches at the way's cost; with a word where it was not trained so long."""
    if name not in row:
        return ""
    times = beyond(task, row, base)
    return told(row[name]) + (f" (way {times:.1f} times dearer)" if times > 1 else "")


def told(score: dict[str, Any]) -> str:
    """A score, with its interval if there is one."""
    return shown(score) if "low" in score else f"{score['mean']:.2f}"


def verdict(over: dict[str, Any], base: str, *, lower: bool) -> str:
    """Whether a difference is one, in words."""
    if "low" not in over:
        return f"one seed, no verdict on {base}"
    gain = (-over["high"], -over["low"]) if lower else (over["low"], over["high"])
    if gain[0] > 0:
        return f"better than {base}"
    return f"worse than {base}" if gain[1] < 0 else f"not told apart from {base}"


def beyond(task: dict[str, Any], row: dict[str, Any], base: str) -> float:
    """How many times the cost of a base's longest length the way has had; 1 where it is within it."""
    rows = {one["way"]: one for one in task["rows"]}
    longest = max(rows[name]["seconds"]["mean"] for name in lengths_of(base, rows))
    ratio = row["seconds"]["mean"] / longest
    return ratio if ratio > WITHIN else 1.0


def lines(values: dict[str, Any]) -> dict[str, list[str]]:
    """By slug, a line for each task and way."""
    found: dict[str, list[str]] = {}
    for name, task in values["tasks"].items():
        for row in task["rows"]:
            base, over = ("student alone", "over alone") if row["way"].startswith("[30]") else ("[30]", "over [30]")
            if over not in row:
                continue
            alone = base == "student alone"
            told_base = told(row["alone at equal cost" if alone else "[30] at equal cost"])
            times = beyond(task, row, ALONE if alone else SOFT)
            where = "at equal cost" if times == 1 else f"at its longest, {times:.1f} times cheaper"
            slug = next(slug for start, slug in SLUGS.items() if row["way"].startswith(start))
            found.setdefault(slug, []).append(
                f"{TITLES.get(name, name)}, {row['way'].partition('] ')[2]}: {task['unit']} {told(row['score'])}, "
                f"{base} ({where}) {told_base}; {verdict(row[over], base, lower=task['unit'] == 'perplexity')}"
            )
    return found
