"""The three parts of detection distillation, and the layer between maps of two sizes (Chen et al. 2017, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SettingError, require
from karui.model.detection import mean_over
from karui.numerics.soft_targets import log_soften, soften

Resize = Literal["interpolate", "pad"]
CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("", "linear", "bilinear", "trilinear")


def weighted_soft_loss(
    logits: Float[Tensor, "batch classes *boxes"],
    teacher: Float[Tensor, "batch classes *boxes"],
    background: float = 1.5,
    boxes: Float[Tensor, "batch *boxes"] | None = None,
) -> Float[Tensor, ""]:
    """-sum_c w_c P_t,c log P_s,c, averaged over boxes; w is `background` for class 0 and 1 for all others (equation 3).

    Args:
        logits: the student's.
        teacher: the teacher's; no gradient flows to it.
        background: w_0.
        boxes: what each box weighs, 1 together; None is all alike.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(float(weighted_soft_loss(z, z, background=1.0)), 4), round(float(weighted_soft_loss(z, z)), 4)
        (0.3653, 0.4212)
    """
    told, own = soften(teacher.detach(), 1.0), log_soften(logits)
    weights = torch.ones(logits.shape[1], dtype=own.dtype, device=logits.device)
    weights[0] = background
    weights = weights.reshape(-1, *([1] * (logits.ndim - 2)))
    terms = -(weights * told * own).sum(1)
    return terms.mean() if boxes is None else (terms * boxes).sum()


def bounded_loss(
    student: Float[Tensor, "batch 4 *boxes"],
    teacher: Float[Tensor, "batch 4 *boxes"],
    truth: Float[Tensor, "batch 4 *boxes"],
    margin: float = 0.0,
    counted: Tensor | None = None,
) -> Float[Tensor, ""]:
    """||R_s - y||² of each box where it plus the margin is more than ||R_t - y||², else 0; averaged (equation 4).

    The teacher is a bar to pass, box by box, never a target.

    Example:
        >>> truth, near, far = torch.zeros(1, 4, 1), torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1)
        >>> float(bounded_loss(near, far, truth)), float(bounded_loss(far, near, truth))
        (0.0, 4.0)
    """
    own = (student - truth).square().sum(1)
    bar = (teacher.detach() - truth).square().sum(1)
    terms = torch.where(own.detach() + margin > bar, own, torch.zeros_like(own))
    return terms.mean() if counted is None else mean_over(terms, counted)


def adaptation(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """A 1x1 convolution (for vectors a dense layer) from the student's channels to the teacher's, be they equal or not.

    Args:
        student: shape of the student's layer, without the batch.
        teacher: shape of the teacher's.

    Raises:
        SettingError: the two are of different kinds.

    Example:
        >>> adaptation((8, 4, 4), (32, 8, 8))
        Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
    """
    require(
        len(student) == len(teacher) <= 4,
        f"'detection_distillation': the student's layer gives shape {student} and the teacher's {teacher}.",
        "Name layers whose outputs have as many dimensions.",
        SettingError,
    )
    kind = CONVOLUTIONS[len(student) - 1]
    return kind(student[0], teacher[0], *([1] if len(student) > 1 else []))  # pyright: ignore[reportArgumentType]


def hint_distance(
    adapted: Float[Tensor, "batch channels *space"],
    hint: Float[Tensor, "batch channels *space_"],
    resize: Resize = "interpolate",
) -> Float[Tensor, ""]:
    """Mean square of the difference of the teacher's map and the adapted one, brought to the teacher's size.

    Args:
        adapted: the student's map after its adaptation layer.
        hint: the teacher's.
        resize: "interpolate" stretches the student's map; "pad" adds zeros around it, or cuts its rim.
    """
    space = hint.shape[2:]
    if adapted.shape[2:] != space:
        adapted = (
            functional.interpolate(adapted, space, mode=MODES[len(space)], align_corners=False)
            if resize == "interpolate"
            else _padded(adapted, space)
        )
    return (adapted - hint.detach()).square().mean()


def _padded(maps: Tensor, space: torch.Size) -> Tensor:
    """Zeros around the maps, as many before as after; a negative number of them cuts."""
    sides = []
    for have, want in zip(reversed(maps.shape[2:]), reversed(space), strict=True):
        before = (want - have) // 2
        sides += [before, want - have - before]
    return functional.pad(maps, sides)
