"""The losses of [30], [33] and [34] beside those of public packages, on fixed tensors.

RepDistiller's formulas are written down here; torchdistill is asked itself where it is installed (1.1.5 agreed). [33]
sums over units and halves, as its equation 3 does, where both packages take the mean over all: the factor is told by
the test.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from karui.distill.attention import attention_loss
from karui.distill.hint import hint_loss
from karui.numerics.soft_targets import distillation_loss, soften

WITHOUT = (
    "torchdistill is not installed: it requires torchvision, so karui's tests do not ask for it. The formulas of "
    "RepDistiller, written down in this file, are compared in any case; for torchdistill's: pip install torchdistill"
)
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.paper(30)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
@pytest.mark.parametrize("weight", [0.3, 0.9, 1.0])
def test_soft_targets_are_those_of_repdistiller_but_for_the_teachers_entropy(temperature: float, weight: float):
    """Cross-entropy here, divergence there: apart by T² times the teacher's entropy, which has no gradient."""
    student, teacher, labels = draw(8, 10, seed=1).requires_grad_(), draw(8, 10, seed=2), torch.arange(8)
    hard = functional.cross_entropy(student, labels)
    soft = soften(teacher, temperature)
    own = distillation_loss(student, soft, hard, temperature=temperature, weight=weight)
    divergence = functional.kl_div((student / temperature).log_softmax(1), soft, reduction="sum") / len(labels)
    theirs = (1 - weight) * hard + weight * temperature**2 * divergence
    entropy = weight * temperature**2 * -(soft * soft.log()).sum(1).mean()
    torch.testing.assert_close(own - entropy, theirs, **CLOSE)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (own, theirs)]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.mark.paper(33)
def test_the_hint_is_that_of_repdistiller_times_half_the_units():
    a, b = draw(6, 4, 5, 5, seed=1), draw(6, 4, 5, 5, seed=2)
    torch.testing.assert_close(hint_loss(a, b), nn.MSELoss()(a, b) * (4 * 5 * 5) / 2, **CLOSE)


@pytest.mark.paper(34)
def test_attention_is_that_of_repdistiller():
    student, teacher = draw(6, 4, 8, 8, seed=1), draw(6, 16, 4, 4, seed=2)
    # Its maps are pooled before the channels are summed; here after, so that sizes have to be equal for the comparison.
    student = functional.adaptive_avg_pool2d(student, 4)
    maps = [functional.normalize(f.pow(2).mean(1).view(len(f), -1)) for f in (student, teacher)]
    torch.testing.assert_close(attention_loss(student, teacher), (maps[0] - maps[1]).pow(2).mean(), **CLOSE)


@pytest.mark.paper(30)
@pytest.mark.paper(34)
def test_torchdistill_agrees_where_it_is_installed():
    published = pytest.importorskip("torchdistill.losses.mid_level", reason=WITHOUT, exc_type=ImportError)
    ends = ("logits", "output", "logits", "output")
    student, teacher, labels = draw(8, 10, seed=1).requires_grad_(), draw(8, 10, seed=2), torch.arange(8)
    theirs = published.KDLoss(*ends, temperature=4.0, alpha=0.1)
    told = theirs({"logits": {"output": student}}, {"logits": {"output": teacher}}, labels)
    hard = functional.cross_entropy(student, labels)
    own = distillation_loss(student, soften(teacher, 4.0), hard, temperature=4.0, weight=0.9)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (own, told)]
    torch.testing.assert_close(*gradients, **CLOSE)
    maps = draw(6, 4, 5, 5, seed=3), draw(6, 9, 5, 5, seed=4)
    attention = published.ATLoss({}, mode="code").compute_at_loss(*maps)
    torch.testing.assert_close(attention_loss(*maps), attention, **CLOSE)
