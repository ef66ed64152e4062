"""A deployed form as a model: what judges a model can judge the file in its engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from karui.deployment.choice import Deployment
from karui.errors import ArtifactError, require
from karui.measuring import known_engine
from karui.measuring.engines import outputs_of
from karui.measuring.inference import inference
from karui.model import Model


class Running(nn.Module):
    """Runs a file in its engine; without parameters, gradients or a training mode.

    Args:
        deployment: file and engine.
        outputs: outputs of the original model, whose structure is given to those of the file.
        threads: number of threads of the engine.
    """

    def __init__(self, deployment: Deployment, outputs: Any, threads: int = 1) -> None:
        super().__init__()
        self._run = known_engine(deployment.engine).prepare(deployment, threads)
        self._leaves, self._structure = pytree.tree_flatten(outputs)

    def forward(self, *inputs: Any) -> Any:
        """The outputs of one batch."""
        found = outputs_of(self._run(inputs))
        places = [number for number, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        require(
            len(places) == len(found),
            f"The ONNX file has {len(found)} outputs, and the model {len(places)}.",
            "It is the file of another model; export it again.",
            ArtifactError,
        )
        leaves = list(self._leaves)
        for place, value in zip(places, found, strict=True):
            leaves[place] = value
        return pytree.tree_unflatten(leaves, self._structure)


def as_model(deployment: Deployment, model: Model, *, threads: int = 1) -> Model:
    """The deployment as a model with the example and the task of the one it was made from.

    So accuracy is that of the file in its engine, and not that of a network that it is hoped to equal.

    Raises:
        UsageError: the engine cannot open the file, or is not installed.

    Example:
        >>> import torch
        >>> from karui.measuring import onnx_form
        >>> model = Model(nn.Linear(3, 2), example=(torch.zeros(1, 3),))
        >>> form = Deployment(name="file", engine="onnxruntime", precision="fp32", data=onnx_form(model).data)
        >>> as_model(form, model).module(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    with inference(model.module) as module:
        outputs = module(*model.example)
    return Model(Running(deployment, outputs, threads), example=model.example, task=model.task)
