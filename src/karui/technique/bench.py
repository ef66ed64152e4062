"""The bench: what a technique is handed to work with. A value, never a global."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.artifact import stored_bytes
from karui.data import hold_out
from karui.errors import require
from karui.measuring import Clock, Measurement, Score, evaluate, measure_model
from karui.train import Influence, Together, Training, Turn, fit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from karui.model import Model

VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Data, training and measuring for a technique.

    Settings:
        train: data set of (input, target) pairs, used for training and, without targets, for calibration.
        validation: data that decisions look at; a tenth of `train`, drawn by `seed`, where it is not given.
        test: data that no decision looks at, for the final report.
        training: how a model is trained.
        clock: how time is measured.
        seed: fixes every random choice.
        influence: what acts on every training run through this bench; see `under`.
        checkpoints: folder for checkpoints, from which a killed training resumes; None keeps none.
        progress: whether progress bars are shown.
        dense: the model at the start of the pipeline, from which later steps may learn; `Then` fills it in.

    Example:
        >>> bench = Bench(seed=3)
        >>> bench.seed, bench.train is None
        (3, True)
    """

    train: Any = None
    validation: Any = None
    test: Any = None
    training: Training = field(default_factory=Training)
    clock: Clock = field(default_factory=Clock)
    seed: int = 0
    influence: Influence | None = None
    checkpoints: Path | None = None
    progress: bool = False
    dense: Model | None = None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        if self.train is not None and self.validation is None:
            train, validation = hold_out(self.train, VALIDATION_SHARE, self.seed)
            object.__setattr__(self, "train", train)
            object.__setattr__(self, "validation", validation)

    def under(self, influence: Influence) -> Bench:
        """A bench whose every training runs under `influence` too: how a technique's retraining gets a teacher."""
        return replace(self, influence=influence if self.influence is None else Together(self.influence, influence))

    def fit(
        self,
        model: Model,
        *,
        epochs: int | None = None,
        influence: Influence | None = None,
        turns: tuple[Turn, ...] | None = None,
        label: str = "train",
    ) -> Model:
        """A trained copy of `model`.

        Args:
            model: what to train; left as it is.
            epochs: passes over the training data; None takes the number of `training`.
            influence: what acts during this training, with the bench's own.
            turns: parts of a step, each with parameters, objective and data of its own; None is ordinary training.
            label: what the progress bar and the checkpoint are called.

        Raises:
            NeedError: there is no training data.
            TrainingError: the loss stopped being finite.
        """
        training = self.training if epochs is None else replace(self.training, epochs=epochs)
        return fit(
            model,
            self.train,
            training=training,
            seed=self.seed,
            influence=self.under(influence).influence if influence is not None else self.influence,
            turns=turns,
            checkpoints=self.checkpoints,
            label=label,
            progress=self.progress,
        )

    def evaluate(self, model: Model, split: str = "validation") -> Score:
        """The model's metric on "train", "validation" or "test", with its confidence interval."""
        return evaluate(model, {"train": self.train, "validation": self.validation, "test": self.test}[split])

    def calibration(self, samples: int = 256, batch: int = 64) -> Iterator[tuple[Any, ...]]:
        """Batches of inputs, without targets, of a seeded subset of the training data."""
        from karui.data import calibration_batches

        return calibration_batches(self.train, samples=samples, batch=batch, seed=self.seed)


def measure(model: Model, bench: Bench, *, against: Model | None = None) -> Measurement:
    """Parameters, multiply-adds, bytes, time, memory and test accuracy of a model, beside the dense one if given."""
    return measure_model(
        model, test=bench.test, clock=bench.clock, against=against, stored=stored_bytes, progress=bench.progress
    )


def require_seed(seed: int) -> None:
    """Refuse a seed that not every generator of random numbers takes: NumPy's takes none below 0, torch's 64 bits."""
    require(0 <= seed < 2**63, f"The seed is {seed}.", "Give a whole number from 0, of at most 63 bits.")
