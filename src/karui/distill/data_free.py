"""Data-free distillation: Lopes, Fenu and Starner 2017, "Data-Free Knowledge Distillation for Deep Neural Networks"
(survey 41).

Whoever owns the training data publishes, beside the network, statistics of its activations: for each class, mean and
covariance of what layers give. Whoever has no data rebuilds inputs from them, by gradient descent from noise until the
network responds as a target drawn from these statistics, and teaches a student on the rebuilt inputs.

Pays where a network has to be made smaller after its data are gone or may not be passed on. Does not pay where any real
inputs of the kind are at hand, labelled or not: these teach better. On pictures as small as 8x8 even
noise teaches nearly as well in the end, so that the records are not what matters there.
Statistics over few samples tell of these samples: a record is no protection of privacy by itself.

Paper -> here: metadata -> `Record`, its kinds "top", "all", "all_dropout", "spectral_all", "spectral_pairs" -> `kind`,
T -> temperature, the reconstruction -> `reconstruct`. "jl", a random projection, follows the paper's argument.

Measured over three seeds (`results/data_free_distillation.md`). Digits, 64-128-128-10 (96.8 %) to 64-64-64-10, 100
inputs of each class: noise of one mean and deviation 72.1 %, top layer 93.9, all layers 91.5, real data 93.1, but noise
with each pixel's mean and deviation 91.3, without any record. MNIST, 784-256-128-10 (91.5 % from 6,000 pictures) to
784-128-64-10, 50 inputs of each class: noise 26, by pixel 28, top layer 51, random projection 60, spectral 59, spectral
pairs 62, all layers 68, real data 85. So the richer record is the better one on larger pictures, and spectral records,
in far fewer bytes, do not pass all layers, as the paper has it. Masks of dropout are worse on the digits, for a teacher
trained without it.

DEPARTURE: the spectral objective is told in outline only by the paper and its code; the definition here is in the
header of each record.

DEPARTURE: masks of "all_dropout" scale what they keep, as torch's dropout does in training.

DEPARTURE: samples of all classes are rebuilt in common batches, each towards its own class.

DEPARTURE: the soft loss has the factor T² of [30], which Adam does not feel.

DEPARTURE: by default inputs are rebuilt in 300 steps at a rate of 0.05, in batches of 500; the paper has 1000 steps, a
rate of 0.07 for the top layer, and batches of 64.

DEPARTURE: where a batch normalisation takes a layer's output, its own is recorded, as the ReLU comes behind that; the
paper's networks have none.

DEPARTURE: of each class, covariances are kept, not deviations beside them, which are on their diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.distill._asking import SAME_CLASSES, require_classes
from karui.distill._reconstruction import Descent, Rebuilt, reconstruct
from karui.distill._recording import record
from karui.distill._records import Kind, Record, load_record
from karui.distill._teachers import Teacher, lacking_teachers, remark, teacher_of
from karui.errors import NeedError, require, told
from karui.measuring.values import bytes_text
from karui.model import Model, Note
from karui.technique import Card, require_passes, technique
from karui.technique.card import Need
from karui.train import Influence, Together, Turn, fit
from karui.train.loop import REMARK
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import SoftTargets, Teachers

if TYPE_CHECKING:
    from karui.technique import Bench

NUMBERS = "Records are of classes; where there are inputs of any kind, logit_regression learns numbers."


def _outputs_alone(module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
    """The objective of a training in which only the teacher speaks."""
    del targets
    outputs = module(*inputs)
    return outputs, outputs.new_zeros(())


def distil(student: Model, teacher: Model, rebuilt: Rebuilt, bench: Bench, *, temperature: float, epochs: int) -> Model:
    """The student, taught the teacher's softened probabilities on rebuilt inputs; the bench's data are not touched."""
    soft = SoftTargets(teachers=Teachers((teacher,), len(rebuilt.inputs)), temperature=temperature, weight=1.0)
    masks = zero_masks(student.module)
    parts: list[Influence] = [MaskKeeper(masks), soft] if masks else [soft]
    return fit(
        student,
        TensorDataset(rebuilt.inputs, rebuilt.classes),
        training=replace(bench.training, epochs=epochs),
        seed=bench.seed,
        influence=Together(*parts, *((bench.influence,) if bench.influence is not None else ())),
        turns=(Turn(name="data-free", objective=_outputs_alone),),
        checkpoints=bench.checkpoints,
        label="data-free",
        progress=bench.progress,
    )


@technique(
    Card(
        survey=41,
        slug="data_free_distillation",
        title="Data-Free Knowledge Distillation for Deep Neural Networks",
        kind="data",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0},
        quick={"kind": "top", "epochs": 1, "samples": 10, "iterations": 20},
        arxiv="1710.07535",
        pays="The data are gone or may not be passed on: published statistics of activations take their place.",
        costs="Nothing gets smaller by it; any real inputs of the kind, labelled or not, teach better.",
    )
)
@dataclass(frozen=True, kw_only=True)
class DataFree:
    """Teach a network on inputs rebuilt from a teacher's activation record.

    Settings:
        teacher: a karui Model or the folder of a saved one; None is the model at the start of the pipeline.
        record: a `Record`, or the path of its file. Where there is no file yet, it is made from the training data and
            written there: that is what the owner of the data does, with epochs=0. With a record no data are touched.
            The lineage, and the command line, tell where it is, its size beside that of the data, and what it reveals.
        kind: of a record that is made: "top", "all", "all_dropout", "spectral_all", "spectral_pairs" or "jl".
        temperature: of the record that is made, and of the soft targets.
        share: share of the eigenvectors or random directions that a "spectral" or "jl" record keeps.
        heat: s of the heat kernel in place of plain eigenvectors; 0 for these.
        diagonal: whether a record that is made holds variances in place of covariances.
        samples: inputs rebuilt of each class.
        iterations: steps of Adam on the inputs.
        rate: its learning rate.
        tidy: after every so many steps, clip to the data's range and blur lightly; 0 never.
        epochs: passes over the rebuilt inputs; 0 returns the given model.

    Needs:
        A teacher and its record; labelled training data only where the record has to be made.

    Raises:
        SettingError: a setting is out of range, or the record is of another teacher.
        ArtifactError: the file is no record.
        NeedError: there is no teacher, it does not know the same classes, or inputs are no one tensor of numbers.

    Relations: with data of any kind at hand use `KnowledgeDistillation` or `LogitRegression`.

    Example:
        >>> DataFree(record="teacher.record.safetensors").kind
        'all'
    """

    teacher: Teacher | None = None
    record: Record | str | Path | None = None
    kind: Kind = "all"
    temperature: float = 8.0
    share: float = 0.1
    heat: float = 0.0
    diagonal: bool = False
    samples: int = 100
    iterations: int = 300
    rate: float = 0.05
    tidy: int = 0
    epochs: int = 30

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature is {self.temperature}; give a positive number, for example 8")
        require(0 < self.share <= 1, f"share is {self.share}; give a share in (0, 1], for example 0.1")
        require(self.heat >= 0, f"heat is {self.heat}; give a number from 0")
        require(self.samples > 0, f"samples is {self.samples}; give a positive number for each class")
        require(self.iterations > 0, f"iterations is {self.iterations}; give a positive number, for example 300")
        require(self.rate > 0, f"rate is {self.rate}; give a positive number, for example 0.05")
        require(self.tidy >= 0, f"tidy is {self.tidy}; give a number of steps from 0")
        require_passes(epochs=self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """A teacher; labelled data too where the record has to be made."""
        return ("teacher",) if self._at_hand() else ("labels", "training", "teacher")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        where = "" if self.record is None else f" and written to {self.record}"
        made = "with the record at hand no data are touched" if self._at_hand() else (
            f"there is no record yet: it is made from the training data{where}"
        )  # fmt: skip
        return (remark(self.teacher), made)

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        owner = first and self.epochs == 0 and self.record is not None  # who only makes the record of the given model
        return lacking_teachers("data_free_distillation", self.teacher, bench, first=first and not owner)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught; or, with epochs=0, the given model, once its record is written."""
        self._require_fit(model)
        if self.epochs == 0:
            return self._recorded(model, bench)
        teacher = self._teacher(model, bench)
        held, notes = (self._read(), ()) if self._at_hand() else self._made(teacher, bench)
        descent = Descent(steps=self.iterations, lr=self.rate, tidy=self.tidy)
        rebuilt = reconstruct(teacher, held, descent, samples=self.samples, seed=bench.seed, progress=bench.progress)
        taught = distil(model, teacher, rebuilt, bench, temperature=self.temperature, epochs=self.epochs)
        facts = {"loss": [rebuilt.losses[0], rebuilt.losses[-1]], "samples": len(rebuilt.inputs), REMARK: "data-free"}
        note = Note(f"taught on {len(rebuilt.inputs):,} inputs rebuilt from an {held.describe()}", facts)
        return taught.evolve(taught.module, *notes, note)

    def _recorded(self, model: Model, bench: Bench) -> Model:
        """The given model, once its record, or that of its teacher, is written where there is none yet."""
        if self.record is None or self._at_hand():
            return model
        dense = bench.dense is not None and bench.dense.module is not model.module
        given = self.teacher is not None or dense
        _, notes = self._made(self._teacher(model, bench) if given else model, bench)
        return model.evolve(model.module, *notes)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        self._require_fit(model)
        if self.teacher is not None:
            self._teacher(model, bench)

    def _require_fit(self, model: Model) -> None:
        """Refuse a model that tells no classes apart, or whose inputs cannot be rebuilt."""
        if self.epochs:
            require_classes("data_free_distillation", model, NUMBERS)
        if self.epochs or (self.record is not None and not self._at_hand()):
            numbers = all(isinstance(x, Tensor) and x.is_floating_point() for x in model.example)
            tokens = any(isinstance(x, Tensor) and not x.is_floating_point() for x in model.example)
            require(
                len(model.example) == 1 and numbers,
                f"'data_free_distillation' rebuilds one input by its gradient, and the model takes "
                f"{' and '.join(map(told, model.example))}{' of whole numbers, such as tokens' if tokens else ''}.",
                "Take a model of one input of floating-point numbers.",
                NeedError,
            )

    def _teacher(self, model: Model, bench: Bench) -> Model:
        self._require_fit(model)
        return teacher_of(
            "data_free_distillation",
            self.teacher,
            model,
            bench,
            whole="looks at inner layers of its teacher",
            alike=SAME_CLASSES if self.epochs else "",
        )

    def _at_hand(self) -> bool:
        return isinstance(self.record, Record) or (self.record is not None and Path(self.record).is_file())

    def _read(self) -> Record:
        return self.record if isinstance(self.record, Record) else load_record(Path(self.record or ""))

    def _made(self, teacher: Model, bench: Bench) -> tuple[Record, tuple[Note, ...]]:
        """The teacher's record, written where a path is given, and what there is to tell of that."""
        made = record(
            teacher, bench.train, self.kind, temperature=self.temperature, share=self.share, heat=self.heat,
            diagonal=self.diagonal, seed=bench.seed, progress=bench.progress,
        )  # fmt: skip
        if self.record is None or isinstance(self.record, Record):
            return made, ()
        size = made.save(Path(self.record))
        text = f"written to {self.record}, {bytes_text(size)} with its header: an {made.describe()}"
        return made, (Note(text, {"record": str(self.record), "bytes": size, REMARK: "record"}),)
