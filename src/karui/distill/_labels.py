"""Batches without any label: the task's loss is then no number, and the teachers' terms are all that counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from karui.measuring.inference import tensors_of
from karui.train import Influence, Moment
from karui.train.teaching import is_unlabelled


def labelled(loss: Tensor, targets: Any, outputs: Any) -> Tensor:
    """The loss so far; where no sample of the batch has a label and it is no number, 0 with a gradient of zero.

    Example:
        >>> import torch
        >>> none, outputs = torch.tensor([-100]), torch.ones(1, 2)
        >>> labelled(torch.tensor(torch.nan), none, outputs).item(), labelled(torch.tensor(2.0), none, outputs).item()
        (0.0, 2.0)
    """
    if is_unlabelled(targets) and not bool(loss.isfinite()):
        return sum((part.sum() * 0.0 for part in tensors_of(outputs)), loss.new_zeros(()))
    return loss


@dataclass(frozen=True, eq=False)
class Labelled(Influence):
    """Batches without any label teach nothing, in place of stopping the training."""

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss, where there is one."""
        return labelled(loss, moment.targets, moment.outputs)


def is_alone(loss: Tensor, moment: Moment) -> bool:
    """Whether no influence has added to the loss yet; so too where nobody tells.

    Example:
        >>> import torch
        >>> plain = torch.tensor(1.0)
        >>> moment = Moment(torch.nn.Identity(), (), None, None, plain=plain)
        >>> is_alone(plain, moment), is_alone(plain + 1, moment)
        (True, False)
    """
    return moment.plain is None or loss is moment.plain
