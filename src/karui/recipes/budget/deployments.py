"""Deployments: the forms in which a model can be handed over (file, engine, precision), tried one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from karui.data import Batches
from karui.measuring import Engine, OnnxRuntime, Score, onnx_form
from karui.measuring.accuracy import mean_interval
from karui.measuring.engines import outputs_of
from karui.measuring.inference import tensors_of

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

FP32 = "fp32"


@dataclass(frozen=True, eq=False, kw_only=True)
class Deployment:
    """One form of a model.

    Settings:
        name: what it is called: "fp32", "int8".
        data: the ONNX file.
        engine: runs it.
        precision: of its weights and arithmetic.
        note: what a person should know of it.
    """

    name: str
    data: bytes
    engine: Engine
    precision: str = FP32
    note: str = ""

    @property
    def told(self) -> str:
        """Precision and engine in words."""
        return f"{self.precision} in {self.engine.name}"


def deployments(model: Model, bench: Bench, *, int8: bool = True) -> Iterator[Deployment]:
    """The forms that are worth trying; the first is the model as it is, in ONNX Runtime.

    Args:
        model: what is to be deployed.
        bench: calibration data for forms that need it.
        int8: whether forms of lower precision are among them.

    Raises:
        CaptureError: the model has no ONNX form.
    """
    del bench, int8
    yield Deployment(name=FP32, data=onnx_form(model).data, engine=OnnxRuntime())


def deployed_score(deployment: Deployment, model: Model, dataset: Any, threads: int = 1) -> Score:
    """The metric of a form on a data set, computed in its engine.

    Args:
        deployment: what is judged.
        model: tells the task, and how outputs are put together.
        dataset: (input, target) pairs.
        threads: of the engine.
    """
    import torch

    run, batches = deployment.engine.prepare(deployment.data, threads), Batches(dataset)
    task = model.task
    assert task is not None  # noqa: S101  (who judges has a task)
    join = _joiner(model)
    found = []
    for index in torch.arange(len(batches)).split(64):
        inputs, targets = batches.fetch(index)
        found.append(task.scores(join(outputs_of(run(inputs))), targets).detach().double())
    value, low, high = mean_interval(torch.cat(found))
    return Score(
        value=value,
        low=low,
        high=high,
        count=len(batches),
        metric=task.metric,
        higher_is_better=task.higher_is_better,
    )


def _joiner(model: Model) -> Callable[[list[Tensor]], Any]:
    """From an engine's list of outputs to what the model gives: one tensor, a tuple, a dict."""
    from torch.utils import _pytree as pytree

    from karui.measuring.inference import inference

    with inference(model.module) as module:
        leaves, spec = pytree.tree_flatten(module(*model.example))
    if len(tensors_of(leaves)) != len(leaves):
        return lambda outputs: outputs[0]
    return lambda outputs: pytree.tree_unflatten(outputs, spec)


def lost(dense: Score | Mapping[str, Any], light: Score | Mapping[str, Any]) -> float:
    """How much worse a score is: points of accuracy, or per cent of any other metric's value. Negative: better.

    Example:
        >>> def score(value, metric="accuracy", up=True):
        ...     return Score(value=value, low=0, high=1, count=9, metric=metric, higher_is_better=up)
        >>> round(lost(score(0.9), score(0.88)), 9), lost(score(2.0, "error", False), score(3.0, "error", False))
        (2.0, 50.0)
    """
    one, two = (s if isinstance(s, Mapping) else s.to_json() for s in (dense, light))
    gap = one["value"] - two["value"] if one["higher_is_better"] else two["value"] - one["value"]
    return 100 * gap if one["metric"] == "accuracy" else 100 * gap / max(abs(one["value"]), 1e-12)
