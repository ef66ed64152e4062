"""Who teaches: what a technique is given as teachers, or the model that the pipeline started from.

A teacher is a karui Model, the folder of a saved one, a torch module, a fitted estimator, an ONNX file, a function,
what `package.module:factory` or `file.py:factory` makes, or several of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.data import Batches
from karui.distill._asking import ask, require_alike
from karui.distill.predictors import Classifier, Predictor, Regressor, predictor
from karui.errors import KaruiError, NeedError, require, told
from karui.measuring.inference import inference
from karui.model import Detection, Model, Regression
from karui.model.importing import load_callable, told_of
from karui.train.teaching import DISK, MEMORY, Teachers, answer_bytes

if TYPE_CHECKING:
    from karui.technique import Bench

Teacher = Model | nn.Module | Classifier | Regressor | Callable[..., Any] | Path | str
GIVE = (
    "Give teacher=..., a Model, the folder of a saved one, file.py:factory or package.module:factory; "
    "where outputs are enough also an .onnx file, an estimator or a function."
)
WHOLE = "Teachers with inner layers are a karui Model, the folder of a saved one, or a torch module."
_ZOOS = ("timm", "torchvision")


def given(teacher: Teacher | tuple[Teacher, ...] | None) -> tuple[Teacher, ...]:
    """The teachers that a setting names, none for None."""
    if teacher is None:
        return ()
    return teacher if isinstance(teacher, tuple) else (teacher,)


def lacking_teachers(
    slug: str, teacher: Teacher | tuple[Teacher, ...] | None, bench: Bench, *, first: bool
) -> list[tuple[str, str]]:
    """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
    lost = [_lost(str(one)) for one in given(teacher) if isinstance(one, str | Path)]
    missing = [(f"'{slug}' has no teacher: {told}", GIVE) for told in lost if told]
    if teacher is None and bench.dense is None and first:
        missing.append((f"'{slug}' needs a teacher.", GIVE))
    return missing


def _lost(spec: str) -> str:
    """Why a teacher that is named cannot be there; empty where it may be."""
    where, colon, _ = spec.rpartition(":")
    if spec.endswith(".onnx"):
        return "" if Path(spec).is_file() else f"there is no file {spec}."
    if colon and not Path(spec).exists():
        if where in _ZOOS:
            return f"{spec} comes without trained weights."
        lacking = where.endswith(".py") and not Path(where).expanduser().is_file()
        return f"there is no file {where}." if lacking else ""
    return "" if (Path(spec) / "model.json").is_file() else f"{spec} holds no saved model."


def teachers_of(
    slug: str,
    teacher: Teacher | tuple[Teacher, ...] | None,
    student: Model,
    bench: Bench,
    *,
    whole: str = "",
    alike: str = "",
) -> tuple[Model, ...]:
    """The teachers as models, read where they are files; without any, the model at the start of the pipeline.

    Args:
        slug: of the technique, for errors.
        teacher: as its setting says.
        student: whose inputs and task the teachers share where they have none of their own.
        bench: knows the start of the pipeline.
        whole: what the technique does to its teacher that outputs alone do not allow, such as "looks at inner layers
            of its teacher"; empty where any teacher will do.
        alike: where answers must be of the shape of the student's: what to do if they are not; empty where they need
            not be.

    Raises:
        NeedError: there is none, it is the student itself, it only gives outputs where more is needed, it does not take
            the student's inputs, or does not answer alike.
    """
    named = given(teacher) or ((bench.dense,) if bench.dense is not None else ())
    teachers = tuple(model for one in named for model in _models(slug, one, student))
    require(len(teachers) > 0, f"'{slug}' needs a teacher.", GIVE, NeedError)
    require(
        all(one.module is not student.module for one in teachers),
        f"'{slug}' was given the student itself as its teacher.",
        f"Compress the model in a step before, or: {GIVE}",
        NeedError,
    )
    outside = [one.module.name for one in teachers if isinstance(one.module, Predictor)]
    told = f"'{slug}' {whole}, and {', '.join(outside)} gives outputs alone."
    require(not (whole and outside), told, WHOLE, NeedError)
    for one in teachers:
        said = ask(slug, one, student)
        if alike:
            require_alike(slug, said, student, alike)
    return teachers


def teacher_of(
    slug: str,
    teacher: Teacher | tuple[Teacher, ...] | None,
    student: Model,
    bench: Bench,
    *,
    whole: str,
    alike: str = "",
) -> Model:
    """The one teacher of a technique that matches a single network's inner layers; as `teachers_of`.

    Raises:
        NeedError: as there, or there are several: none of them may be passed over in silence.
    """
    found = teachers_of(slug, teacher, student, bench, whole=whole, alike=alike)
    require(
        len(found) == 1,
        f"'{slug}' {whole}, and was given {len(found)} teachers.",
        "Give one. Ensembles teach by their outputs: knowledge_distillation, logit_regression, munge_compression.",
        NeedError,
    )
    return found[0]


def spoken(slug: str, teachers: tuple[Model, ...], like: Model) -> Model:
    """Teachers as one model that answers in the shape of another: of several, the mean of their logits or numbers.

    Args:
        slug: of the technique, for errors.
        teachers: as `teachers_of` gives them.
        like: whose inputs, task and shape of outputs it has.
    """
    with inference(like.module) as module:
        outputs = module(*like.example)
    shape = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else None
    asked = Teachers(teachers, classes=not isinstance(like.task, Regression))
    return Model(_Spoken(slug, asked, shape), example=like.example, task=like.task)


def zeros_of(teacher: Model) -> tuple[str, ...]:
    """What `Teachers.zeros` tells of a model that `spoken` made; nothing of another."""
    return teacher.module.teachers.zeros if isinstance(teacher.module, _Spoken) else ()


class _Spoken(nn.Module):
    """What teachers say, as a module without parameters."""

    def __init__(self, slug: str, teachers: Teachers, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.slug, self.teachers, self.shape = slug, teachers, shape

    def forward(self, *inputs: Any) -> Tensor:
        said = self.teachers(inputs).mean(0)
        fits = self.shape is not None and said[0].numel() == math.prod(self.shape)
        wanted = "no tensor" if self.shape is None else f"outputs of shape {('batch', *self.shape)}".replace("'", "")
        require(
            fits,
            f"'{self.slug}': the model gives {wanted} and the teacher {told(said)}.",
            "A teacher must know the same classes, or give as many numbers.",
            NeedError,
        )
        return said.reshape(len(said), *(self.shape or ()))


def _models(slug: str, one: Any, student: Model) -> tuple[Model, ...]:
    """What a teacher is as models: several where a factory makes several."""
    if isinstance(one, Model):
        return (one,)
    if isinstance(one, tuple | list):
        return tuple(model for part in one for model in _models(slug, part, student))
    if isinstance(one, str | Path):
        return _named(slug, str(one), student)
    gives = "numbers" if isinstance(student.task, Regression) else None
    whole = isinstance(one, nn.Module) and not isinstance(one, torch.jit.ScriptModule)
    module = one if whole else predictor(one, gives=gives)
    return (Model(module, example=student.example, task=student.task),)


def _named(slug: str, spec: str, student: Model) -> tuple[Model, ...]:
    lost = _lost(spec)
    require(not lost, f"'{slug}' has no teacher: {lost}", GIVE, NeedError)
    if spec.endswith(".onnx"):
        from karui.distill._onnx_teachers import onnx_teacher

        gives = "numbers" if isinstance(student.task, Regression) else None
        pair = isinstance(student.task, Detection)
        return _models(slug, onnx_teacher(Path(spec), gives=gives, pair=pair), student)
    if ":" in spec and not Path(spec).exists():
        factory = load_callable(spec, NeedError)
        try:
            made = factory()
        except KaruiError:
            raise
        except Exception as failure:  # a factory is foreign code and may raise anything
            raise NeedError(f"The factory '{spec}' of the teacher failed: {told_of(failure)}") from failure
        require(
            not isinstance(made, str | Path), f"The factory '{spec}' gives a {type(made).__name__}.", GIVE, NeedError
        )
        return _models(slug, made, student)
    from karui.artifact import load  # a teacher that is at hand needs no reader of files

    return (load(Path(spec)),)


@dataclass(frozen=True)
class Keeping:
    """Whether teachers' answers are kept, and why.

    Settings:
        samples: whose answers are kept at most.
        folder: where; None is in memory.
        why: for people; None where the user wants it so.
    """

    samples: int
    folder: Path | None
    why: str | None = None

    def teachers(self, models: tuple[Model, ...], *, classes: bool = True, shared: bool = False) -> Teachers:
        """The models, frozen, with this memory; `classes` and `shared` as in `Teachers`."""
        return Teachers(models, self.samples, self.folder, classes=classes, why=self.why, shared=shared)


def keeping(models: tuple[Model, ...], bench: Bench, remember: int | None = None) -> Keeping:
    """Where and for how many samples answers are kept: all, unless augmentation or their size forbids it.

    Args:
        models: the teachers.
        bench: with training data.
        remember: number of samples that the user wants; None decides here.
    """
    folder = bench.checkpoints / "answers" if bench.checkpoints is not None else None
    samples = 0 if bench.train is None else len(Batches(bench.train))
    anew = "teacher: asked anew in each pass, as"
    if remember is None and bench.training.augment is not None:
        return Keeping(0, None, f"{anew} augmentation makes every sample a new one, for which no kept answer would do")
    sizes = [answer_bytes(model) for model in models] if remember != 0 else []
    if None in sizes:
        return Keeping(0, None, f"{anew} its answers are in double precision, and kept ones in single")
    if remember is not None:
        return Keeping(remember, folder)
    size, most = samples * sum(size or 0 for size in sizes), MEMORY if folder is None else DISK
    if size > most:
        room = f"{size / 2**20:,.0f} MiB of {most // 2**20:,}"
        return Keeping(0, None, f"{anew} its answers for {samples:,} samples would take {room}")
    where = "in memory" if folder is None else "beside the checkpoints"
    if (processes := bench.training.devices) > 1:
        # Samples are dealt anew in each pass, so that a process comes to see what another has asked about.
        each = f"asked by each of {processes} processes, once for each input that it comes to see"
        return Keeping(samples, folder, f"teacher: {each}; answers are kept {where}")
    return Keeping(samples, folder, f"teacher: asked once for each input; those for {samples:,} are kept {where}")


def remark(teacher: Teacher | tuple[Teacher, ...] | None) -> str:
    """What `karui plan` tells of the teacher."""
    names = " and ".join(_name(one) for one in given(teacher)) or "the model at the start of the pipeline"
    return f"the teacher is {names}; nothing gets smaller by distillation itself"


def _name(one: Teacher) -> str:
    if isinstance(one, str | Path):
        return str(one)
    if isinstance(one, Predictor):
        return one.name
    return (
        f"a {type(one).__name__}"
        if isinstance(one, Model | nn.Module)
        else getattr(one, "__name__", f"a {type(one).__name__}")
    )
