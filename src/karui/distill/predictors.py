"""Predictors: what is no torch module, as a module that a training can ask: estimators, ONNX files, functions.

Whatever is learned from outputs alone can be learned from these. A predictor has no parameters: no optimiser moves it,
no saved model holds it, and copies of it share what they ask. It says logits: a probability p becomes log p, whose
softmax is p again. Logarithms are taken where nothing is lost yet: of an estimator's own `predict_log_proba`, or of its
`decision_function` for the samples for which the softmax of that is what it tells; of an ONNX file, the tensor before
the softmax is asked for.

An exact zero has no logarithm. Of trees and neighbours, and means of them, it says that none of so many voted for the
class, which is common and means no more than "rarely": it counts as `FLOOR`, since the large negative number of a tiny
floor would be all that a squared error of logits sees. Of anything else it is what rounding left of 1 - p, and counts
as half the distance from 1 to the next number below. Nothing above zero is clipped, and how many were zero is told.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from karui.errors import NeedError, require, told
from karui.measuring.inference import evaluated, tensors_of
from karui.model.reach import networks
from karui.numerics.soft_targets import widened
from karui.train.fingerprint import fingerprint

FLOOR = 1e-4
"""What a probability of zero counts as, where probabilities are shares of votes."""
ROUNDED = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
"""What it counts as else: half the distance from 1 to the number below, which 1 - p does not tell from zero."""
Gives = Literal["logits", "probabilities", "numbers"]
GIVES = ("logits", "probabilities", "numbers")
Ask = Callable[[tuple[Tensor, ...]], Any]
"""From a batch of inputs to a tensor or an array, `[batch, ...]`; of a detector, to a tuple of these."""


@runtime_checkable
class Classifier(Protocol):
    """What tells probabilities as scikit-learn's classifiers do."""

    def predict_proba(self, table: Any, /) -> Any:
        """Probabilities `[samples, classes]` of a table `[samples, columns]`."""
        ...


@runtime_checkable
class Regressor(Protocol):
    """What tells numbers as scikit-learn's regressions do."""

    def predict(self, table: Any, /) -> Any:
        """Numbers `[samples]` or `[samples, numbers]` of a table `[samples, columns]`."""
        ...


@dataclass(frozen=True)
class Scores:
    """What is told instead of probabilities: numbers of which they are the softmax, infinite where one is zero.

    Settings:
        values: `[batch, classes, ...]`, in the precision in which they were computed; of a single column, the logit of
            class 1 of two.
    """

    values: np.ndarray


class Predictor(nn.Module):
    """Something that answers, as a module without parameters.

    Args:
        ask: from a batch of inputs to a tensor or array.
        name: what errors call it.
        content: a digest of what it computes: answers that are kept on disk are those of this very content.
        gives: "logits", "probabilities", or the "numbers" of a regression.
        floor: what a probability of zero counts as; None is what rounding leaves of 1 - p in the teacher's precision.

    Raises:
        SettingError: the floor is no probability, or `gives` is none of these.

    Example:
        >>> thirds = Predictor(lambda inputs: torch.full((len(inputs[0]), 3), 1 / 3), "thirds", "", "probabilities")
        >>> thirds(torch.zeros(2, 5)).softmax(1).shape, list(thirds.parameters())
        (torch.Size([2, 3]), [])
    """

    def __init__(self, ask: Ask, name: str, content: str, gives: Gives, floor: float | None = None) -> None:
        super().__init__()
        require(gives in GIVES, f"gives is {gives!r}; choose from {', '.join(GIVES)}")
        require(floor is None or 0 < floor < 1, f"floor is {floor}; give a small probability, for example {FLOOR}")
        self.ask, self.name, self.content, self.floor = ask, name, content, floor
        self.gives: Gives = gives

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits, or the numbers of a regression, on the device of the inputs; where a tuple is said, its parts.

        In a tuple only the first part can be probabilities.

        Raises:
            NeedError: it fails, or gives something else.
        """
        with torch.no_grad():
            said = self.ask(inputs)
        if isinstance(said, tuple):
            first, *others = said
            return self._told(first, inputs), *(self._placed(self._values(part, inputs), inputs) for part in others)
        values = self._told(said, inputs)
        return values[:, None] if self.gives == "numbers" and values.ndim == 1 else values

    @property
    def scores_of_zero(self) -> tuple[float, ...]:
        """What it says of a class whose probability is zero, in double and in single precision."""
        return (
            tuple(math.log(self.floor or floor) for floor in ROUNDED.values()) if self.gives == "probabilities" else ()
        )

    def _told(self, said: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits or numbers; logarithms are taken in the teacher's precision, and only then made shorter."""
        if self.gives != "probabilities":
            return self._placed(self._values(said, inputs), inputs)
        given = said.values if isinstance(said, Scores) else said
        values = self._values(given, inputs, exact=True)
        logits = _of_two_classes(values) if isinstance(said, Scores) else self._logarithms(values)
        zero = math.log(self.floor or ROUNDED.get(values.dtype, ROUNDED[torch.float32]))
        kind = values.dtype if isinstance(given, Tensor) else torch.float32
        return self._placed(logits.masked_fill(logits == -torch.inf, zero).to(kind), inputs)

    @staticmethod
    def _placed(values: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        return values.to(tensors_of(inputs)[0].device)

    def _values(self, said: Any, inputs: tuple[Tensor, ...], *, exact: bool = False) -> Tensor:
        """What was said as a tensor of a row for each sample, of an array in single precision unless it is `exact`."""
        try:
            array = said if isinstance(said, Tensor) else np.asarray(said, dtype=None if exact else np.float32)
            values = array.detach() if isinstance(array, Tensor) else torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise NeedError(f"The teacher, {self.name}, gives {told(said)}.", "Let it give one array.") from error
        first = tensors_of(inputs)[0]
        require(
            values.ndim >= 1 and len(values) == len(first),
            f"The teacher, {self.name}, gives {told(values)} for inputs of shape {tuple(first.shape)}.",
            "Let it give one row for each sample.",
            NeedError,
        )
        return values

    def extra_repr(self) -> str:
        """What it is: fingerprints of trainings count it."""
        said = f"probabilities, zero as {self.floor or 'rounded'}" if self.gives == "probabilities" else self.gives
        return f"{self.name}, gives {said}, {self.content}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Predictor:
        """A module of its own that asks the same: nothing in it is ever changed."""
        twin = Predictor(self.ask, self.name, self.content, self.gives, self.floor)
        memo[id(self)] = twin
        return twin.train(self.training)

    def _logarithms(self, values: Tensor) -> Tensor:
        """Of probabilities; minus infinity of zero."""
        if values.ndim == 1 or values.shape[1] == 1:  # the probability of class 1 of two
            values = torch.stack([1 - values.flatten(), values.flatten()], 1)
        sums = values.sum(1)
        require(
            bool((values >= -1e-4).all()) and bool(((sums - 1).abs() < 1e-2).all()),
            f"The teacher, {self.name}, gives rows that are no probabilities: one sums to {float(sums[0]):.4g}.",
            'If they are logits, say so: predictor(..., gives="logits").',
            NeedError,
        )
        return (values.clamp_min(0) / sums[:, None]).log()


def _of_two_classes(scores: Tensor) -> Tensor:
    """Scores for each class; of a single column, which is the logit of class 1 of two, a column of zeros before it."""
    if scores.ndim > 1 and scores.shape[1] > 1:
        return scores
    return torch.stack([torch.zeros_like(scores.flatten()), scores.flatten()], 1)


def predictor(given: Any, *, gives: Gives | None = None, floor: float | None = None) -> Predictor:
    """A function or a fitted estimator as a predictor.

    Args:
        given: a function of a batch of inputs; or what has `predict_proba`, or `predict`, as scikit-learn's have. An
            estimator is given a table: inputs are flattened. On disk a function counts by its code and what it
            encloses, not by files or globals that it reads.
        gives: what comes out; None takes probabilities of a classifier, numbers of a regression, logits of a function.
        floor: what a probability of zero counts as; None is `FLOOR` for trees, neighbours and means of them, and for
            others what rounding leaves of 1 - p. Of a function that asks a forest it has to be said.

    Raises:
        NeedError: it is neither, is not fitted, or a classifier that tells no probabilities.

    Example:
        >>> from sklearn.tree import DecisionTreeClassifier
        >>> tree = DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1])
        >>> predictor(tree)(torch.tensor([[0.9]])).softmax(1).round(decimals=2).tolist()
        [[0.0, 1.0]]
    """
    if isinstance(given, Predictor):
        return given
    name = getattr(given, "__name__", type(given).__name__)
    if isinstance(given, Classifier | Regressor) and not isinstance(given, type):
        return _estimator(given, name, gives, floor)
    require(
        callable(given) and not isinstance(given, type),
        f"A {name} is no teacher.",
        "Give a karui Model, the folder of a saved one, a torch module, an estimator, an .onnx file or a function.",
        NeedError,
    )
    return Predictor(_Function(given), name, fingerprint(given), gives or "logits", floor)


class _Function:
    """Asks a function; the networks that it reaches are in evaluation mode meanwhile, and nothing of them moves.

    It is asked in single precision at least, whatever the student trains in: it may hand the numbers to numpy.
    """

    def __init__(self, given: Callable[..., Any]) -> None:
        self.given, self.networks = given, networks(given)

    def __call__(self, inputs: tuple[Any, ...]) -> Any:
        kind = tensors_of(inputs)[0].device.type
        given = tree_map(lambda x: widened(x) if isinstance(x, Tensor) else x, inputs)
        plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with evaluated(*self.networks), torch.no_grad(), plain:
            return self.given(*given)


def _estimator(given: Classifier | Regressor, name: str, gives: Gives | None, floor: float | None) -> Predictor:
    import joblib
    from sklearn.base import BaseEstimator, is_classifier
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    # A pipeline has the method in its class, and in truth only where its last step has.
    classifies = getattr(given, "predict_proba", None) is not None
    if isinstance(given, BaseEstimator):
        try:
            check_is_fitted(given)
        except NotFittedError as error:
            raise NeedError(
                f"The teacher, a {name}, is not fitted.", "Fit it first; it is never trained here."
            ) from error
        require(
            classifies or not is_classifier(given),
            f"The teacher, a {name}, tells no probabilities.",
            "Wrap it in sklearn.calibration.CalibratedClassifierCV, or set probability=True where it has that.",
            NeedError,
        )
    said: Gives = gives or ("probabilities" if classifies else "numbers")
    table = _Table(given, f"a {name}", classifies, scored=said == "probabilities")
    floor = FLOOR if floor is None and _votes(given) else floor
    return Predictor(table, f"a {name}", str(joblib.hash(given)), said, floor)


def _votes(estimator: Any) -> bool:
    """Whether probabilities are shares of votes or of samples: of trees and neighbours, and of means of such."""
    from sklearn.neighbors import KNeighborsClassifier, RadiusNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    if isinstance(estimator, DecisionTreeClassifier | KNeighborsClassifier | RadiusNeighborsClassifier):
        return True
    last = [step for _, step in getattr(estimator, "steps", ())[-1:]]
    parts = last or [*getattr(estimator, "estimators_", ())] or [getattr(estimator, "best_estimator_", None)]
    return parts != [None] and all(map(_votes, parts))


class _Table:
    """Asks an estimator about inputs as a table; classes in the order of their numbers, as scores where it has some."""

    def __init__(self, estimator: Classifier | Regressor, name: str, classifies: bool, *, scored: bool) -> None:
        self.estimator, self.name, self.classifies, self.scored = estimator, name, classifies, scored
        self.columns: int | None = getattr(estimator, "n_features_in_", None)
        classes = np.asarray(getattr(estimator, "classes_", ()))
        # An estimator that has not seen a class has no column for it: it gets one, of probability 0.
        self.classes = classes if classes.ndim == 1 and np.issubdtype(classes.dtype, np.integer) else None

    def __call__(self, inputs: tuple[Tensor, ...]) -> np.ndarray | Scores:
        require(
            len(inputs) == 1 and isinstance(inputs[0], Tensor),
            f"The teacher, {self.name}, takes one table, not {' and '.join(map(told, inputs))}.",
            "Give a function that makes one of them.",
            NeedError,
        )
        flat = inputs[0].detach().flatten(1).cpu()
        require(
            self.columns in (None, flat.shape[1]),
            f"The teacher, {self.name}, takes tables of shape (batch, {self.columns}), and the inputs are of shape "
            f"{tuple(inputs[0].shape)}, {flat.shape[1]} numbers each.",
            "Give inputs of the columns that it was fitted on.",
            NeedError,
        )
        table = flat.double().numpy() if flat.is_floating_point() else flat.numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X does not have valid feature names")
            if not self.classifies:
                return np.asarray(self.estimator.predict(table))  # pyright: ignore[reportAttributeAccessIssue]
            return self._probabilities(table)

    def _probabilities(self, table: np.ndarray) -> np.ndarray | Scores:
        ask: Any = self.estimator
        in_logarithms = getattr(ask, "predict_log_proba", None) if self.scored else None
        decides = getattr(ask, "decision_function", None) if self.scored else None
        with np.errstate(divide="ignore"):  # of a zero
            said = ask.predict_proba(table) if in_logarithms is None else in_logarithms(table)
            require(
                not isinstance(said, list),
                f"The teacher, {self.name}, has several targets.",
                "Give one a target.",
                NeedError,
            )
            said = np.asarray(said)
            if in_logarithms is None and decides is None:
                return self._in_order(said, 0)
            logarithms = said if in_logarithms is not None else np.log(said)
        if decides is not None:
            logarithms = _of_decisions(np.asarray(decides(table)), logarithms)
        return Scores(self._in_order(logarithms, -np.inf))

    def _in_order(self, said: np.ndarray, unseen: float) -> np.ndarray:
        classes = self.classes
        if classes is None or classes.min() < 0 or np.array_equal(classes, np.arange(len(classes))):
            return said
        full = np.full((len(said), int(classes.max()) + 1), unseen, said.dtype)
        full[:, classes] = said
        return full


def _of_decisions(decisions: np.ndarray, logarithms: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities from an estimator's decisions, for those samples of which their softmax is told.

    Each sample is looked at by itself, so that what is said of it does not depend on its batch: of some estimators a
    decision is the logit, which has not been rounded to a probability of one, and of others it is a distance or a sum
    of votes.
    """
    scores = np.stack([np.zeros_like(decisions), decisions], 1) if decisions.ndim == 1 else decisions
    if scores.shape != logarithms.shape:
        return logarithms
    scores = log_softmax(scores, axis=1)
    slack = 8 * np.finfo(logarithms.dtype).eps
    same = np.isclose(np.exp(scores), np.exp(logarithms), rtol=1e-4, atol=slack).all(1, keepdims=True)
    return np.where(same, scores, logarithms)


def digest_of(data: bytes) -> str:
    """A name for the content of a file."""
    return hashlib.sha256(data).hexdigest()[:24]
