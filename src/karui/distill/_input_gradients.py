"""Attention by gradients: what in its input moves a network's loss (Zagoruyko and Komodakis 2017, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.model import Task
from karui.train import Influence, Moment
from karui.train.guide import Guide, asked_anew, statistics_kept
from karui.train.teaching import is_unlabelled


def input_gradient(
    module: nn.Module, inputs: tuple[Any, ...], targets: Any, task: Task, *, differentiable: bool
) -> Float[Tensor, "batch *input"]:
    """The gradient of each sample's loss with respect to its (first) input, J = dL/dx (section 3.2).

    Args:
        module: the network; its gradients and running statistics stay as they are.
        inputs: of one call.
        targets: what the loss is against.
        task: whose loss; taken as a mean over the batch.
        differentiable: whether J is to be differentiated in its turn.
    """
    x = inputs[0].detach().requires_grad_()
    with statistics_kept(module), torch.enable_grad():
        loss = task.loss(module(x, *inputs[1:]), targets) * len(x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=differentiable)
    return slope


@dataclass(frozen=True, eq=False, kw_only=True)
class InputGradients(Influence):
    """Draws the student's input gradients to the teacher's, or makes them symmetric under a flip of the pictures.

    Settings:
        guide: the teacher; None asks for symmetry: J(x) as the flipped J of the flipped x (last dimension).
        task: whose loss is differentiated.
        beta: weight.
        decay: whether it falls linearly to zero over the training.
    """

    guide: Guide | None
    task: Task
    beta: float = 1.0
    decay: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """That the teacher is asked anew, and why; nothing where there is none."""
        return () if self.guide is None else (asked_anew("the gradient of its loss with respect to each input"),)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss + beta/2 ||J_S - J_T||, or + beta/2 ||J(x) - flip(J(flip(x)))||², averaged over the batch."""
        inputs, targets = moment.inputs, moment.targets
        if is_unlabelled(targets, self.task):
            return loss  # there is no loss whose gradient could be matched
        own = input_gradient(moment.module, inputs, targets, self.task, differentiable=True)
        if self.guide is None:
            flipped = (inputs[0].flip(-1), *inputs[1:])
            other = input_gradient(moment.module, flipped, targets, self.task, differentiable=True).flip(-1)
            term = (own - other).flatten(1).square().sum(1).mean()
        else:
            with self.guide.on(inputs) as teacher:
                other = input_gradient(teacher, inputs, targets, self.task, differentiable=False)
            term = (own - other).flatten(1).norm(dim=1).mean()
        beta = self.beta * (1 - moment.step / moment.steps) if self.decay else self.beta
        return loss + beta / 2 * term
