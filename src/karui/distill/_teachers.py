"""Who teaches: the models that a technique is given as teachers, or the one that the pipeline started from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from karui.errors import NeedError, require
from karui.model import Model

if TYPE_CHECKING:
    from karui.technique import Bench

Teacher = Model | str | Path
GIVE = "Give teacher=..., a Model or the folder of a saved one."


def given(teacher: Teacher | tuple[Teacher, ...] | None) -> tuple[Teacher, ...]:
    """The teachers that a setting names, none for None."""
    if teacher is None:
        return ()
    return teacher if isinstance(teacher, tuple) else (teacher,)


def lacking_teachers(
    slug: str, teacher: Teacher | tuple[Teacher, ...] | None, bench: Bench, *, first: bool
) -> list[tuple[str, str]]:
    """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
    folders = [Path(one) for one in given(teacher) if not isinstance(one, Model)]
    lost = [folder for folder in folders if not (folder / "model.json").is_file()]
    missing = [(f"'{slug}' has no teacher: {folder} holds no saved model.", GIVE) for folder in lost]
    if teacher is None and bench.dense is None and first:
        missing.append((f"'{slug}' needs a teacher.", GIVE))
    return missing


def teachers_of(
    slug: str, teacher: Teacher | tuple[Teacher, ...] | None, student: Model, bench: Bench
) -> tuple[Model, ...]:
    """The teachers, read where they are folders; without any, the model at the start of the pipeline.

    Raises:
        NeedError: there is none, or it is the student itself.
    """
    named = given(teacher) or ((bench.dense,) if bench.dense is not None else ())
    teachers = tuple(one if isinstance(one, Model) else _read(Path(one)) for one in named)
    require(len(teachers) > 0, f"'{slug}' needs a teacher.", GIVE, NeedError)
    require(
        all(one.module is not student.module for one in teachers),
        f"'{slug}' was given the student itself as its teacher.",
        f"Compress the model in a step before, or: {GIVE}",
        NeedError,
    )
    return teachers


def remark(teacher: Teacher | tuple[Teacher, ...] | None) -> str:
    """What `karui plan` tells of the teacher."""
    told = "the model at the start of the pipeline" if teacher is None else f"{teacher}"
    return f"the teacher is {told}; nothing gets smaller by distillation itself"


def _read(folder: Path) -> Model:
    from karui.artifact import load  # a teacher that is at hand needs no reader of files

    return load(folder)
