"""Attention transfer: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention" (survey 34).

A student learns *where* its teacher looks: at the end of each stage the activations of all channels are summed up to
one map over space, normalised, and the student's map is drawn to the teacher's. Channel counts need not match, so
nothing has to be added to the student. Or the gradient of the loss with respect to the input is matched instead.

Pays on networks over pictures whose stages correspond, together with soft targets (`soft`). Does not pay where the last
map has few positions left, where the teacher looks elsewhere for good reason (it was trained for another task), and in
its gradient form on large networks: that differentiates twice, which about doubles the cost of a step.

Sequences have maps, too, over time: behind linear layers, embeddings, recurrent layers and transformers the last
dimension holds the channels (`channels`).

Paper -> here: F_sum^p, F_max^p -> `attention_map(pool="sum" or "max", power=p)`, Q_S, Q_T -> `normalised` maps, beta ->
beta, J_S, J_T -> `input_gradient`.

The loss is the authors' code's: beta (1000) times the mean over positions and samples of the squared difference,
without 1/2. The paper's beta is for the sum over both: 1000 divided by the number of positions and by the batch.

Measured on CIFAR-10 at 16 pixels, 1,500 pictures, 6 passes, five seeds (`results/attention_transfer.md`): a student's
maps come together with its teacher's on pictures never seen (cosine 0.79 to 0.96), but it is not more accurate by that:
39.7 % by labels, 38.5 by maps, 44.8 by soft targets, 40.5 by both. Without normalisation nothing is learned. On whole
pictures maps and soft targets are as good as soft targets alone at equal cost (`results/distillation_table.md`), and
both are behind labels alone. The paper trains for hundreds of passes; few are no case for it.

DEPARTURE: `beta` of the gradient forms is 1 by default, a choice of ours: the paper's text gives none that carries over
to other data, as gradients shrink as a network learns.

DEPARTURE: weights that are exactly zero in the student stay so (`keep_zeros`), so that a pruned network can be taught
without losing its sparsity; the paper's students are dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from karui.distill._asking import require_classes
from karui.distill._input_gradients import InputGradients
from karui.distill._layouts import Channels, Layout, layout_at, may_come
from karui.distill._maps import fitting_maps, paired_layers
from karui.distill._teachers import Teacher, lacking_teachers, remark, teacher_of
from karui.errors import NeedError, SettingError, require, told
from karui.model import Model, Note
from karui.numerics.soft_targets import distillation_loss, soften
from karui.technique import Card, technique
from karui.train import Influence, Moment, Together
from karui.train.guide import Guide
from karui.train.loop import REMARK
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import is_unlabelled

if TYPE_CHECKING:
    from karui.technique import Bench

By = Literal["activations", "gradients", "symmetry"]
Pool = Literal["sum", "max"]
DEFAULT_BETA = {"activations": 1000.0, "gradients": 1.0, "symmetry": 1.0}


def attention_map(
    activations: Float[Tensor, "batch channels *space"], pool: Pool = "sum", power: float = 2.0
) -> Float[Tensor, "batch *space"]:
    """Where a layer is active: |A|^p summed, or its maximum, over the channels (section 3.1). Not normalised.

    Example:
        >>> import torch
        >>> attention_map(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]])).tolist()
        [[[10.0, 4.0]]]
    """
    magnitude = activations.abs() if power == 1 else activations.abs().pow(power)
    return magnitude.sum(1) if pool == "sum" else magnitude.amax(1)


def normalised(maps: Float[Tensor, "batch *space"]) -> Float[Tensor, "batch positions"]:
    """Each sample's map as a vector of unit length; a map of zeros stays as it is."""
    return functional.normalize(maps.flatten(1), dim=1)


def attention_loss(
    student: Float[Tensor, "batch channels *space"],
    teacher: Float[Tensor, "batch others *space_"],
    pool: Pool = "sum",
    power: float = 2.0,
) -> Float[Tensor, ""]:
    """Mean square of the difference of normalised maps, over positions and samples; the larger map is averaged down.

    Example:
        >>> import torch
        >>> a = torch.rand(2, 8, 4, 4)
        >>> float(attention_loss(3 * a, a[:, torch.randperm(8)])) < 1e-12
        True
    """
    maps = [attention_map(student, pool, power), attention_map(teacher, pool, power)]
    smaller = tuple(min(a, b) for a, b in zip(maps[0].shape[1:], maps[1].shape[1:], strict=True))
    a, b = (normalised(_averaged(one, smaller)) for one in maps)
    return (a - b).square().mean()


def _averaged(maps: Tensor, space: tuple[int, ...]) -> Tensor:
    """Maps averaged down to a size in space, before they are normalised."""
    if maps.shape[1:] == space:
        return maps
    pooling = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
    return pooling[len(space) - 1](maps[:, None], space)[:, 0]  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMaps(Influence):
    """Draws the student's attention maps to the teacher's, and its outputs to the teacher's soft targets.

    Settings:
        guide: the teacher, showing `theirs`.
        layers: paths in the student.
        theirs: paths in the teacher, in the same order.
        layouts, their_layouts: where batch and channels of each are; none is [batch, channels, positions ...].
        pool, power: how maps are made.
        beta: weight of the maps' part.
        decay: whether beta falls linearly, to zero in the last step.
        soft: share of the soft targets, in [0, 1]; 0 leaves them out.
        temperature: of the soft targets.
    """

    guide: Guide
    layers: tuple[str, ...]
    theirs: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()
    their_layouts: tuple[Layout, ...] = ()
    pool: Pool = "sum"
    power: float = 2.0
    beta: float = 1000.0
    decay: bool = False
    soft: float = 0.0
    temperature: float = 4.0

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's layers."""
        return self.layers

    @property
    def remarks(self) -> tuple[str, ...]:
        """That the teacher is asked anew, and why."""
        return self.guide.remarks

    def ahead(self, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """What the teacher says and shows of the batch."""
        return self.guide.told(inputs)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss of this step with the parts of maps and soft targets."""
        answers, shown = self.guide.told(moment.inputs) if moment.ahead is None else moment.ahead
        if self.soft > 0:
            require(
                isinstance(answers, Tensor) and isinstance(moment.outputs, Tensor)
                and answers.shape == moment.outputs.shape,
                f"The student gives {told(moment.outputs)} and the teacher {told(answers)}.",
                "Soft targets need a teacher that knows the same classes; set soft=0 for the maps alone.",
                NeedError,
            )  # fmt: skip
            targets = soften(answers, self.temperature)
            weight = 1.0 if is_unlabelled(moment.targets, moment.task) else self.soft
            loss = distillation_loss(moment.outputs, targets, loss, temperature=self.temperature, weight=weight)
        plain = (Layout(()),) * len(self.layers)
        layouts, theirs = self.layouts or plain, self.their_layouts or plain
        for own, other, mine, their in zip(self.layers, self.theirs, layouts, theirs, strict=True):
            student, teacher = mine.first(moment.taps.get(own)), their.first(shown.get(other))
            _check(own, student, other, teacher)
            loss = loss + self._beta(moment) * attention_loss(student, teacher, self.pool, self.power)
        return loss

    def _beta(self, moment: Moment) -> float:
        return self.beta * (1 - moment.step / max(1, moment.steps - 1)) if self.decay else self.beta


def _check(own: str, student: Any, other: str, teacher: Any) -> None:
    fits = all(isinstance(value, Tensor) and value.ndim >= 3 for value in (student, teacher))
    require(
        fits and student.ndim == teacher.ndim,
        f"Layer '{own}' of the student gives {told(student)} and '{other}' of the teacher {told(teacher)}.",
        "Attention needs maps [batch, channels, positions ...] of both; name other layers.",
        SettingError,
    )


@technique(
    Card(
        survey=34,
        slug="attention_transfer",
        title="Paying More Attention to Attention (Attention Transfer)",
        kind="influence",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0},
        quick={"epochs": 1},
        arxiv="1612.03928",
        pays="Networks over pictures whose stages correspond: the student looks where its teacher looks.",
        costs="Nothing gets smaller by it; maps of few positions tell little; by gradients a step costs twice as much.",
    )
)
@dataclass(frozen=True, kw_only=True)
class AttentionTransfer:
    """Train a network so that its attention maps become its teacher's.

    Settings:
        teacher: a karui Model or the folder of a saved one; None is the model at the start of the pipeline. Not asked
            by "symmetry".
        by: "activations" matches maps, "gradients" the gradients of the loss with respect to the input, "symmetry" the
            student's own gradients under a flip of the picture.
        layers: paths in the student whose outputs are matched; none takes the last layer of each size in space. This
            and the four settings that follow are of maps, so only by "activations".
        teacher_layers: paths in the teacher, in the same order; none takes the same paths, or the last of each size.
        channels: where the channels are that become one map: "first" behind the batch; "last", as in sequences and
            transformers, whose map is over time; "auto" tells it by the kind of each layer, or refuses.
        pool: how channels become one map: their "sum" or their "max".
        power: the power of the activations before.
        beta: weight of the part; None is 1000 for maps and 1 for gradients.
        decay: whether beta falls linearly, to zero in the last step.
        soft: share of soft targets of the same teacher in the loss, in [0, 1]; the paper's combination has 0.9. Only
            by "activations".
        temperature: of the soft targets.
        epochs: passes over the training data.
        keep_zeros: whether weights that are exactly zero stay so.
        maps: a file to which the maps of the student before and after, and of the teacher, are written for some
            validation data: ".html", a page by itself, or ".npz". None writes none. Only by "activations".

    Raises:
        SettingError: a setting is out of range, or layers do not pair.
        NeedError: there is no teacher, no task, or soft targets of other classes.

    Relations: as an influence it joins any other training: `bench.under(AttentionTransfer(...).influence(model,
    bench))`. `KnowledgeDistillation` matches outputs only; `soft` adds that here with one run of the teacher for both.

    Example:
        >>> AttentionTransfer(layers=("layer2", "layer3"), soft=0.9).power
        2.0
    """

    teacher: Teacher | None = None
    by: By = "activations"
    layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    channels: Channels = "auto"
    pool: Pool = "sum"
    power: float = 2.0
    beta: float | None = None
    decay: bool = False
    soft: float = 0.0
    temperature: float = 4.0
    epochs: int = 10
    keep_zeros: bool = True
    maps: str | Path | None = None

    def __post_init__(self) -> None:
        require(self.power > 0, f"power is {self.power}; give a positive number, for example 2")
        require(self.beta is None or self.beta >= 0, f"beta is {self.beta}; give a weight from 0, or None")
        require(0 <= self.soft <= 1, f"soft is {self.soft}; give a share in [0, 1], for example 0.9")
        require(self.temperature > 0, f"temperature is {self.temperature}; give a positive number, for example 4")
        require(self.epochs >= 0, f"epochs is {self.epochs}; give a whole number from 0")
        require(
            self.by == "activations" or self.soft == 0,
            f"soft is {self.soft} and by is {self.by!r}; soft targets go with activations. "
            "Put knowledge_distillation's influence beside this one's",
        )
        of_maps = {"layers": (), "teacher_layers": (), "channels": "auto", "pool": "sum", "power": 2.0}
        given = [name for name, default in of_maps.items() if getattr(self, name) != default]
        require(
            self.by == "activations" or not given,
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} of maps, and by is {self.by!r}; leave out one "
            "or the other",
        )
        if self.maps is not None:
            kind = Path(self.maps).suffix
            require(kind in (".html", ".npz"), f"maps is '{self.maps}'; give a file that ends in .html or .npz")
            require(self.by == "activations", f"maps is '{self.maps}' and by is {self.by!r}; maps are of activations")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        return () if self.by == "symmetry" else (remark(self.teacher),)

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        return [] if self.by == "symmetry" else lacking_teachers("attention_transfer", self.teacher, bench, first=first)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        if self.epochs:
            self._require_classes(model)
        if any(may_come(model, path) for path in self.layers):
            return  # a step before this one may make them
        if self.teacher is not None or (self.by == "symmetry" and self.epochs):
            self.influence(model, bench)
        elif self.by == "activations" and self.epochs:
            self._check_maps(model, bench)

    def _check_maps(self, model: Model, bench: Bench) -> None:
        """Refuse layers that do not pair; the student's alone where nobody knows the teacher yet."""
        if bench.dense is not None:
            fitting_maps("attention_transfer", model, bench.dense, self._paired(model, bench.dense), self.channels)
            return
        own, _ = paired_layers("attention_transfer", model, model, self.layers, self.layers, channels=self.channels)
        for path in own:
            layout_at("attention_transfer", model, path, "student", self.channels, maps=True)

    def influence(self, model: Model, bench: Bench) -> Influence:
        """What draws the maps, or the gradients, together; for a training of `model` or of what becomes of it."""
        part = self._maps(model, bench) if self.by == "activations" else self._gradients(model, bench)
        masks = zero_masks(model.module) if self.keep_zeros else {}
        return Together(MaskKeeper(masks), part) if masks else part

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught."""
        if self.epochs == 0:
            return model
        influence = self.influence(model, bench)
        taught = bench.fit(model, epochs=self.epochs, influence=influence, label="attend")
        return taught if self.maps is None else self._with_maps(model, taught, bench)

    def _with_maps(self, before: Model, taught: Model, bench: Bench) -> Model:
        """The student, once the maps of both and of the teacher are written."""
        from karui.distill.map_plots import attention_maps, pictures_of, write_maps

        teacher, file = self._teacher(before, bench), Path(self.maps or "")
        own, theirs = self._paired(before, teacher)
        shown = {
            name: attention_maps(one, bench.validation, paths, pool=self.pool, power=self.power, channels=self.channels)
            for name, one, paths in (("before", before, own), ("after", taught, own), ("teacher", teacher, theirs))
        }
        write_maps(file, shown, pictures_of(bench.validation))
        return taught.evolve(taught.module, Note(f"attention maps written to {file}", {REMARK: "attend"}))

    def _require_classes(self, model: Model) -> None:
        if self.soft:
            require_classes("attention_transfer", model, "Set soft=0 for the maps alone.")

    def _teacher(self, model: Model, bench: Bench) -> Model:
        same = "Soft targets need a teacher that knows the same classes; set soft=0 for the maps alone."
        inside = "looks at inner layers of its teacher"
        alike = same if self.soft else ""
        return teacher_of("attention_transfer", self.teacher, model, bench, whole=inside, alike=alike)

    def _maps(self, model: Model, bench: Bench) -> Influence:
        self._require_classes(model)
        teacher = self._teacher(model, bench)
        own, theirs = self._paired(model, teacher)
        layouts = fitting_maps("attention_transfer", model, teacher, (own, theirs), self.channels)
        return AttentionMaps(
            guide=Guide(teacher, theirs),
            layers=own,
            theirs=theirs,
            layouts=layouts[0],
            their_layouts=layouts[1],
            pool=self.pool,
            power=self.power,
            beta=self._beta(),
            decay=self.decay,
            soft=self.soft,
            temperature=self.temperature,
        )

    def _paired(self, model: Model, teacher: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return paired_layers(
            "attention_transfer", model, teacher, self.layers, self.teacher_layers, channels=self.channels
        )

    def _gradients(self, model: Model, bench: Bench) -> Influence:
        require(
            model.task is not None,
            "'attention_transfer' differentiates the loss, and the model has no task.",
            "Give Model(..., task=karui.Classification()), or another task.",
            NeedError,
        )
        assert model.task is not None  # noqa: S101  (just required; for the type checker)
        x = model.example[0]
        require(
            isinstance(x, Tensor) and x.is_floating_point(),
            f"'attention_transfer' differentiates with respect to the input, and the model takes {told(x)}.",
            "Set by='activations'.",
            NeedError,
        )
        guide = None
        if self.by == "gradients":
            guide = Guide(
                teacher_of(
                    "attention_transfer",
                    self.teacher,
                    model,
                    bench,
                    whole="differentiates its teacher",
                    alike="Gradients of the loss need a teacher that knows the same classes; set by='activations'.",
                )
            )
        return InputGradients(guide=guide, task=model.task, beta=self._beta(), decay=self.decay)

    def _beta(self) -> float:
        return DEFAULT_BETA[self.by] if self.beta is None else self.beta
