"""Predictors: what is no torch module, as a module that a training can ask: estimators, ONNX files, functions.

Whatever is learned from outputs alone can be learned from these. A predictor has no parameters: no optimiser moves it,
no saved model holds it, and copies of it share what they ask. It says logits: a probability p becomes log p, whose
softmax is p again. Probabilities below `FLOOR` count as that much, since a forest's exact zero has no logarithm.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from karui.errors import NeedError, require, told
from karui.measuring.inference import evaluated
from karui.model.reach import networks
from karui.train.fingerprint import fingerprint

FLOOR = 1e-4
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


class Predictor(nn.Module):
    """Something that answers, as a module without parameters.

    Args:
        ask: from a batch of inputs to a tensor or array.
        name: what errors call it.
        content: a digest of what it computes: answers that are kept on disk are those of this very content.
        gives: "logits", "probabilities", or the "numbers" of a regression.

    Example:
        >>> thirds = Predictor(lambda inputs: torch.full((len(inputs[0]), 3), 1 / 3), "thirds", "", "probabilities")
        >>> thirds(torch.zeros(2, 5)).softmax(1).shape, list(thirds.parameters())
        (torch.Size([2, 3]), [])
    """

    def __init__(self, ask: Ask, name: str, content: str, gives: Gives) -> None:
        super().__init__()
        require(gives in GIVES, f"gives is {gives!r}; choose from {', '.join(GIVES)}")
        self.ask, self.name, self.content = ask, name, content
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
            first, *others = (self._values(part, inputs) for part in said)
            return self._logits(first) if self.gives == "probabilities" else first, *others
        values = self._values(said, inputs)
        if self.gives == "numbers":
            return values[:, None] if values.ndim == 1 else values
        return self._logits(values) if self.gives == "probabilities" else values

    def _values(self, said: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        """What was said as a tensor of a row for each sample."""
        try:
            values = said.detach() if isinstance(said, Tensor) else torch.from_numpy(np.asarray(said, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise NeedError(f"The teacher, {self.name}, gives {told(said)}.", "Let it give one array.") from error
        require(
            values.ndim >= 1 and len(values) == len(inputs[0]),
            f"The teacher, {self.name}, gives {told(values)} for inputs of shape {tuple(inputs[0].shape)}.",
            "Let it give one row for each sample.",
            NeedError,
        )
        return values.to(inputs[0].device)

    def extra_repr(self) -> str:
        """What it is: fingerprints of trainings count it."""
        return f"{self.name}, gives {self.gives}, {self.content}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Predictor:
        """A module of its own that asks the same: nothing in it is ever changed."""
        twin = Predictor(self.ask, self.name, self.content, self.gives)
        memo[id(self)] = twin
        return twin.train(self.training)

    def _logits(self, values: Tensor) -> Tensor:
        if values.ndim == 1 or values.shape[1] == 1:  # the probability of class 1 of two
            values = torch.stack([1 - values.flatten(), values.flatten()], 1)
        sums = values.sum(1)
        require(
            bool((values >= -1e-4).all()) and bool(((sums - 1).abs() < 1e-2).all()),
            f"The teacher, {self.name}, gives rows that are no probabilities: one sums to {float(sums[0]):.4g}.",
            'If they are logits, say so: predictor(..., gives="logits").',
            NeedError,
        )
        floored = values.clamp_min(FLOOR)
        return (floored / floored.sum(1, keepdim=True)).log()


def predictor(given: Any, *, gives: Gives | None = None) -> Predictor:
    """A function or a fitted estimator as a predictor.

    Args:
        given: a function of a batch of inputs; or what has `predict_proba`, or `predict`, as scikit-learn's have. An
            estimator is given a table: inputs are flattened. On disk a function counts by its code and what it
            encloses, not by files or globals that it reads.
        gives: what comes out; None takes probabilities of a classifier, numbers of a regression, logits of a function.

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
        return _estimator(given, name, gives)
    require(
        callable(given) and not isinstance(given, type),
        f"A {name} is no teacher.",
        "Give a karui Model, the folder of a saved one, a torch module, an estimator, an .onnx file or a function.",
        NeedError,
    )
    return Predictor(_Function(given), name, fingerprint(given), gives or "logits")


class _Function:
    """Asks a function; the networks that it reaches are in evaluation mode meanwhile, and nothing of them moves."""

    def __init__(self, given: Callable[..., Any]) -> None:
        self.given, self.networks = given, networks(given)

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        with evaluated(*self.networks), torch.no_grad():
            return self.given(*inputs)


def _estimator(given: Classifier | Regressor, name: str, gives: Gives | None) -> Predictor:
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
    said: Gives = "probabilities" if classifies else "numbers"
    return Predictor(_Table(given, f"a {name}", classifies), f"a {name}", str(joblib.hash(given)), gives or said)


class _Table:
    """Asks an estimator about inputs as a table; classes in the order of their numbers."""

    def __init__(self, estimator: Classifier | Regressor, name: str, classifies: bool) -> None:
        self.estimator, self.name, self.classifies = estimator, name, classifies
        self.columns: int | None = getattr(estimator, "n_features_in_", None)
        classes = np.asarray(getattr(estimator, "classes_", ()))
        # An estimator that has not seen a class has no column for it: it gets one, of probability 0.
        self.classes = classes if classes.ndim == 1 and np.issubdtype(classes.dtype, np.integer) else None

    def __call__(self, inputs: tuple[Tensor, ...]) -> np.ndarray:
        require(
            len(inputs) == 1, f"The teacher, {self.name}, takes one table, not {len(inputs)} inputs.", "", NeedError
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
            said = self.estimator.predict_proba(table)  # pyright: ignore[reportAttributeAccessIssue]
        require(
            not isinstance(said, list),
            f"The teacher, {self.name}, has several targets.",
            "Give one a target.",
            NeedError,
        )
        return self._in_order(np.asarray(said))

    def _in_order(self, said: np.ndarray) -> np.ndarray:
        classes = self.classes
        if classes is None or classes.min() < 0 or np.array_equal(classes, np.arange(len(classes))):
            return said
        full = np.zeros((len(said), int(classes.max()) + 1), said.dtype)
        full[:, classes] = said
        return full


def digest_of(data: bytes) -> str:
    """A name for the content of a file."""
    return hashlib.sha256(data).hexdigest()[:24]
