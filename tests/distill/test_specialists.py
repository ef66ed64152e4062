"""Specialists, [30] section 5: clusters of confusable classes, training, and the combined distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.distill.specialists import (
    Council,
    Specialist,
    combine,
    confusable_classes,
    dustbin_shift,
    relabel,
    train_specialist,
)
from karui.errors import SurgeryError, UsageError
from karui.measuring.inference import inference
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training

pytestmark = pytest.mark.paper(30)


def distribution(samples: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).softmax(1)


def divergence(p: Tensor, special: list[Tensor], classes: list[tuple[int, ...]], q: Tensor) -> Tensor:
    """Equation 5: KL(p^g, q) and each specialist's KL with q summed over its dustbin."""
    total = (p * (p / q).log()).sum(1)
    for own, members in zip(special, classes, strict=True):
        rest = [c for c in range(q.shape[1]) if c not in members]
        summed = torch.cat([q[:, list(members)], q[:, rest].sum(1, keepdim=True)], 1)
        total = total + (own * (own / summed).log()).sum(1)
    return total


def test_without_an_active_specialist_the_generalist_is_right_to_the_bit() -> None:
    p = distribution(5, 6).float()
    assert torch.equal(combine(p, [], [], torch.zeros(5, 0, dtype=torch.bool)), p)
    own = distribution(5, 3, seed=1).float()
    assert torch.equal(combine(p, [own], [(0, 1)], torch.zeros(5, 1, dtype=torch.bool)), p)
    mixed = combine(p, [own], [(0, 1)], torch.tensor([[True], [False], [True], [False], [True]]))
    assert torch.equal(mixed[[1, 3]], p[[1, 3]])
    assert not torch.allclose(mixed[[0, 2, 4]], p[[0, 2, 4]])


@pytest.mark.parametrize("classes", [[(0, 1)], [(0, 1), (1, 4, 5)], [(2, 3), (0, 5), (1, 4)]])
def test_the_combination_meets_the_optimality_condition(classes: list[tuple[int, ...]]) -> None:
    p = distribution(7, 6)
    special = [distribution(7, len(members) + 1, seed=k + 1) for k, members in enumerate(classes)]
    q = combine(p, special, classes, torch.ones(7, len(classes), dtype=torch.bool))
    torch.testing.assert_close(q.sum(1), torch.ones(7, dtype=torch.float64))
    z = q.log().requires_grad_()
    divergence(p, special, classes, z.softmax(1)).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-8


def test_gradient_descent_on_the_logits_ends_at_the_same_distribution() -> None:
    p, classes = distribution(3, 5), [(0, 1), (1, 3)]
    special = [distribution(3, 3, seed=1), distribution(3, 3, seed=2)]
    z = p.log().requires_grad_()
    for _ in range(1500):
        (slope,) = torch.autograd.grad(divergence(p, special, classes, z.softmax(1)).sum(), z)
        with torch.no_grad():
            z -= 0.3 * slope
    q = combine(p, special, classes, torch.ones(3, 2, dtype=torch.bool))
    descended = z.softmax(1).detach()
    # The descent creeps where a probability is small; the fixed point is no worse, and nearby.
    torch.testing.assert_close(q, descended, rtol=0, atol=1e-3)
    assert (divergence(p, special, classes, q) <= divergence(p, special, classes, descended) + 1e-12).all()


def test_confusable_classes_fall_together() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (3000,), generator=generator)
    logits = torch.eye(9)[labels] + 5 * (labels[:, None] // 3 == torch.arange(9) // 3)
    logits = logits + torch.randn(3000, 9, generator=generator)
    # Each class shares its probability with the two others of its three.
    sets = confusable_classes(logits.softmax(1), 3, seed=3)
    assert sorted(sets) == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert sets == confusable_classes(logits.softmax(1), 3, seed=3)
    with pytest.raises(UsageError, match="10 clusters of 9 classes"):
        confusable_classes(logits.softmax(1), 10)


def test_dustbin_undoes_the_oversampling() -> None:
    """A network that learned the odds of a half-and-half mix is right about the true mix after the shift."""
    share, likelihood = 0.2, torch.tensor([0.6, 0.3])  # of a sample under the special classes and under the others
    seen = torch.stack([likelihood[0] * 0.5, likelihood[1] * 0.5]).log()
    true = torch.stack([likelihood[0] * share, likelihood[1] * (1 - share)])
    shifted = seen + torch.tensor([0.0, dustbin_shift(share)])
    torch.testing.assert_close(shifted.softmax(0), true / true.sum())
    assert dustbin_shift(0.5) == 0.0
    assert relabel(torch.tensor([0, 9, 4]), [9, 4]).tolist() == [2, 0, 1]
    # What has no label gets none: -100 wrapped round to the class of that place from the end.
    assert relabel(torch.tensor([-100, 5, 150, -1]), [50, 51]).tolist() == [-100, 2, 2, -1]
    assert relabel(torch.tensor([-100, -100]), [0, 1]).tolist() == [-100, -100]


def generalist(bench: Bench) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    return bench.fit(Model(net, example=(torch.zeros(1, 1, 8, 8),), task=Classification()), epochs=4)


def test_a_specialist_starts_as_the_generalist_and_tells_its_classes_apart(digits: Splits) -> None:
    training = Training(epochs=30, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant())
    bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training)
    general = generalist(bench)
    members = (1, 8)
    untrained = train_specialist(general, members, bench, epochs=0)
    x = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
    y = torch.tensor([int(digits.test[i][1]) for i in range(len(digits.test))])
    with inference(general.module) as module:
        logits = module(x)
        with inference(untrained.model.module) as special:
            torch.testing.assert_close(special(x)[:, :2], logits[:, [1, 8]])
    trained = train_specialist(general, members, bench)
    assert trained.classes == members
    assert "dustbin" in trained.model.lineage[-1].describe()
    mine = torch.isin(y, torch.tensor(members))
    with inference(trained.model.module) as special:
        apart = (special(x[mine])[:, :2].argmax(1) == relabel(y[mine], members)).float().mean()
    alone = (logits[mine][:, [1, 8]].argmax(1) == relabel(y[mine], members)).float().mean()
    assert apart >= 0.9
    assert apart >= alone
    council = Council(generalist=general, specialists=(trained,))
    p, q = logits.softmax(1), council.probabilities(x)
    asked = torch.isin(p.argmax(1), torch.tensor(members))
    assert torch.equal(q[~asked], p[~asked])
    right = [(told.argmax(1) == y).float().mean() for told in (p, q)]
    assert right[1] >= right[0] + 0.005, right
    assert torch.equal(Council(generalist=general).probabilities(x), p)


def test_what_cannot_be_a_specialist_is_told(digits: Splits) -> None:
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(epochs=1))
    model = generalist(bench)
    for classes in ((3,), tuple(range(10)), (11, 12)):
        with pytest.raises(UsageError, match="nothing to tell apart"):
            train_specialist(model, classes, bench)
    with pytest.raises(SurgeryError, match="not linear"):
        train_specialist(model, (1, 8), bench, layer="2")


def test_the_mean_of_the_others_becomes_the_dustbin() -> None:
    from karui.distill.specialists import _narrowed

    model = Model(nn.Sequential(nn.Linear(3, 5)), example=(torch.zeros(1, 3),), task=Classification())
    narrow, path = _narrowed(model, (0, 2), None)
    old, new = model.module.get_parameter("0.bias"), narrow.module.get_parameter("0.bias")
    assert path == "0"
    torch.testing.assert_close(new[:2], old[[0, 2]])
    torch.testing.assert_close(new[2], old[[1, 3, 4]].mean() + math.log(3))


def test_a_specialist_is_a_value() -> None:
    model = Model(nn.Linear(3, 3), example=(torch.zeros(1, 3),))
    assert Specialist(model=model, classes=(0, 1)).classes == (0, 1)


@pytest.mark.parametrize("void", [-100, 0], ids=["no label", "an ignored class"])
def test_samples_without_label_are_nobodys(void: int) -> None:
    """They were drawn for the dustbin, and counted in the share that its bias is corrected by."""
    x, y = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(6, 6)
    task = Classification(ignore=0 if void == 0 else None, label_smoothing=0.1)
    generalist = Model(net, example=(x[:2],), task=task)
    silent = torch.where(y == 0, void, y)
    training = Training(epochs=2, batch_size=16)
    mixed, bare = (
        train_specialist(generalist, (1, 2), Bench(train=data, validation=data, training=training))
        for data in (TensorDataset(x, silent), TensorDataset(x[y != 0], y[y != 0]))
    )
    for one, other in zip(mixed.model.module.parameters(), bare.model.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert mixed.model.task == Classification(label_smoothing=0.1)
