"""A recipe: techniques with their settings, and how to train and measure, as a TOML file, as text or as values.

    [[step]]
    technique = "l1_filter_pruning"
    ratio = 0.5

    [training]
    epochs = 5

On the command line the same is `l1_filter_pruning:ratio=0.5`; several steps are joined with `+`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.errors import KaruiError, SettingError, UsageError, did_you_mean, require
from karui.recipes import toml
from karui.recipes.values import TECHNIQUE, build, settings
from karui.survey import find_technique

if TYPE_CHECKING:
    from karui.measuring import Clock
    from karui.technique import Bench, Technique, Then
    from karui.train import Training

_TABLES = ("step", "bench", "training", "clock")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps in order, and what they run with.

    Settings:
        steps: the techniques, applied one after the other.
        seed: fixes every random choice; None leaves it to who runs the recipe.
        training: how each training runs; None takes the default.
        clock: how time is measured; None takes the default.
        name: what the recipe is called in reports; empty for one without a file.

    Raises:
        UsageError: there is no step.
    """

    steps: tuple[Technique, ...]
    seed: int | None = None
    training: Training | None = None
    clock: Clock | None = None
    name: str = ""

    def __post_init__(self) -> None:
        steps = [part for step in self.steps for part in getattr(step, "steps", (step,))]
        require(len(steps) > 0, "The recipe has no step.", "Give at least one [[step]] with a technique.", UsageError)
        object.__setattr__(self, "steps", tuple(steps))

    def technique(self) -> Then:
        """The steps as one technique."""
        from karui.technique import Then

        return Then(*self.steps)

    def bench(self, bench: Bench) -> Bench:
        """The bench, with the recipe's own seed, training and clock where it has them."""
        own = {"seed": self.seed, "training": self.training, "clock": self.clock}
        return replace(bench, **{name: held for name, held in own.items() if held is not None})

    def told(self) -> list[dict[str, Any]]:
        """The steps as plain values: slug and settings of each.

        Raises:
            SettingError: a step is no technique of the catalogue, or a setting cannot be written.
        """
        return [{"technique": slug_of(step), "settings": settings(step)} for step in self.steps]

    def to_toml(self) -> str:
        """The recipe as the text of a file that `read_recipe` reads back to an equal one."""
        parts = [toml.table("[[step]]", {TECHNIQUE: t["technique"], **t["settings"]}) for t in self.told()]
        if self.seed is not None:
            parts.append(toml.table("[bench]", {"seed": self.seed}))
        for name, held in (("training", self.training), ("clock", self.clock)):
            if held is not None:
                parts.append(toml.table(f"[{name}]", settings(held)))
        return "\n".join(parts)


def slug_of(step: Technique) -> str:
    """The slug of a technique of the catalogue.

    Raises:
        SettingError: it carries no card.
    """
    from karui.technique import card_of

    card = card_of(step)
    if card is None:
        raise SettingError(f"{step!r} has no card, so a recipe cannot name it.", "Use techniques of the catalogue.")
    return card.slug


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a TOML file.

    Raises:
        UsageError: there is no such file, it is no TOML, or a table or technique in it is unknown.
        SettingError: a setting is unknown, of the wrong type, or refused; the message names the step.
    """
    path = Path(path)
    require(
        path.is_file(), f"There is no recipe file {path}.", "Give a TOML file, or steps such as tucker2.", UsageError
    )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML file: {error}.", "Strings need quotes, steps a [[step]] line.") from error
    try:
        return recipe_from_values(values, name=path.stem)
    except KaruiError as error:
        raise type(error)(f"{path.name}: {error.message}", error.hint) from error


def recipe_from_values(values: Mapping[str, Any], *, name: str = "") -> Recipe:
    """The recipe that a parsed TOML file tells; see `read_recipe`."""
    for table in values:
        if table not in _TABLES:
            did_you_mean(table, list(_TABLES), "Table")
    steps = values.get("step", [])
    shaped = isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps)
    require(
        shaped and bool(steps), "The recipe has no step.", 'Write [[step]] and technique = "..." below it.', UsageError
    )
    bench = values.get("bench", {})
    for setting in bench:
        if setting != "seed":
            did_you_mean(setting, ["seed"], "[bench]: setting", SettingError)
    seed = bench.get("seed")
    require(seed is None or type(seed) is int, f"[bench]: seed is {seed!r}; it takes a whole number.")
    return Recipe(
        steps=steps_from_values(steps),
        seed=seed,
        training=_training(values["training"]) if "training" in values else None,
        clock=_clock(values["clock"]) if "clock" in values else None,
        name=name,
    )


def steps_from_values(steps: list[Mapping[str, Any]]) -> tuple[Technique, ...]:
    """The techniques of plain tables. All names are checked from the sources before anything heavy is imported."""
    found = []
    for number, step in enumerate(steps, 1):
        given = dict(step)
        slug = given.pop(TECHNIQUE, None)
        require(isinstance(slug, str), f"Step {number} names no technique.", 'Write technique = "slug".', UsageError)
        try:
            entry = find_technique(str(slug))
        except UsageError as error:
            raise UsageError(f"Step {number}: {error.message}", error.hint) from error
        where = f"step {number} ({slug})"
        names = [setting.name for setting in entry.settings]
        for name in given:
            if name not in names:
                did_you_mean(name, names, f"{where}: setting", SettingError)
        found.append((entry, given, where))
    return tuple(build(entry.load(), given, where) for entry, given, where in found)


def _training(given: Mapping[str, Any]) -> Training:
    from karui.train import Training

    return build(Training, given, "[training]")


def _clock(given: Mapping[str, Any]) -> Clock:
    from karui.measuring import Clock

    return build(Clock, given, "[clock]")


def recipe_from(text: str) -> Recipe:
    """What `--recipe` says: a TOML file, or steps such as `l1_filter_pruning:ratio=0.5+knowledge_distillation`.

    Raises:
        UsageError: a technique is unknown, or the text cannot be read.
        SettingError: a setting is unknown, of the wrong type, or refused.
    """
    if text.endswith(".toml") or Path(text).is_file():
        return read_recipe(text)
    return Recipe(steps=steps_from_values([read_step(part) for part in _split(text, r"\+(?=[A-Za-z_])")]), name=text)


def read_step(text: str) -> dict[str, Any]:
    """A slug and its settings, as `slug:name=value,name=value`; the slug under "technique".

    Example:
        >>> read_step("wide_resnet:depth=10,block=basic")
        {'technique': 'wide_resnet', 'depth': 10, 'block': 'basic'}
    """
    slug, colon, rest = text.strip().partition(":")
    given: dict[str, Any] = {TECHNIQUE: slug}
    for part in _split(rest, ",") if colon else []:
        name, equals, value = part.partition("=")
        require(
            bool(equals and name.strip()),
            f"'{part}' in '{text}' is no setting.",
            "Write slug:name=value,name=value, for example l1_filter_pruning:ratio=0.5.",
            UsageError,
        )
        given[name.strip()] = _value(value.strip())
    return given


def _value(text: str) -> Any:
    """A value as TOML has it; a bare word is a string, since a shell takes quotes away."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark` outside of brackets and quotes."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif depth == 0 and re.match(mark, text[i:]):
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
