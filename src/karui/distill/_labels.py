"""Batches without any label: the task's loss is then no number, and the teachers' terms are all that counts."""

from __future__ import annotations

from torch import Tensor

from karui.measuring.inference import tensors_of
from karui.train import Moment
from karui.train.teaching import is_unlabelled


def labelled(loss: Tensor, moment: Moment) -> Tensor:
    """The loss so far; where no sample of the batch has a label and it is no number, 0 with a gradient of zero.

    Example:
        >>> import torch
        >>> silent = Moment(torch.nn.Identity(), (), torch.tensor([-100]), torch.ones(1, 2))
        >>> labelled(torch.tensor(torch.nan), silent).item(), labelled(torch.tensor(2.0), silent).item()
        (0.0, 2.0)
    """
    if is_unlabelled(moment.targets) and not bool(loss.isfinite()):
        return sum((part.sum() * 0.0 for part in tensors_of(moment.outputs)), loss.new_zeros(()))
    return loss


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
