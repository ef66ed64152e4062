"""Deep mutual learning, [39]: the divergence, the turns, and what the paper claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import save
from karui.data import Splits, hold_out
from karui.distill.mutual import Mutual, MutualLearning, divergence, mutual_loss
from karui.errors import NeedError, SettingError, UsageError
from karui.measuring import evaluate
from karui.model import Classification, Model, Origin, Regression
from karui.technique import Bench
from karui.technique.redraw import redrawn
from karui.train import SGD, Adam, Constant, Training
from karui.train.joint import Answer
from karui.train.masks import zero_masks
from karui.train.randomness import seed_of
from karui.train.teaching import of_labels
from karui.train.transfer import with_unlabelled

pytestmark = pytest.mark.paper(39)


FACTORY = f"{__file__}:network"


def network() -> nn.Module:
    """The factory of the network that is saved."""
    return perceptron((64, 6, 10))


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, **more: Any) -> Bench:
    given = {"train": digits.train, "validation": digits.validation, "test": digits.test, **more}
    training = Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant())
    return Bench(**given, training=training, seed=seed)


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_gradient_is_the_difference_to_labels_and_to_peers() -> None:
    """(p_k - y) + mean over peers of (p_k - p_l), per sample: the direction is KL(p_l || p_k)."""
    torch.manual_seed(0)
    z, peers, y = torch.randn(6, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True), torch.arange(6) % 4
    (nn.functional.cross_entropy(z, y) + mutual_loss(z, peers)).backward()
    p, one_hot = z.detach().softmax(1), nn.functional.one_hot(y, 4)
    by_hand = (p - one_hot) + (p - peers.detach().softmax(2)).mean(0)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, by_hand / 6)
    assert peers.grad is None, "no gradient crosses peers"
    theirs = peers[0].detach().log_softmax(1)
    expected = nn.functional.kl_div(z.log_softmax(1), theirs, log_target=True, reduction="batchmean")
    torch.testing.assert_close(divergence(theirs, z), expected)


def test_peers_that_agree_do_not_pull_and_the_variants_agree_for_two() -> None:
    torch.manual_seed(0)
    z, others = torch.randn(5, 4), torch.randn(3, 5, 4)
    agreeing = torch.stack([z + 1.0, z - 3.0])
    for variant in ("mean", "ensemble"):
        assert mutual_loss(z, agreeing, variant).abs().item() < 1e-6  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(mutual_loss(z, others[:1], "ensemble"), mutual_loss(z, others[:1]))
    mean = others.softmax(2).mean(0).log()
    torch.testing.assert_close(mutual_loss(z, others, "ensemble"), divergence(mean, z))
    assert mutual_loss(z, others, "ensemble") < mutual_loss(z, others), "the mean is nearer than the peers are"


def test_alone_it_is_plain_training(digits: Splits) -> None:
    bench = bench_of(digits, 2)
    assert same(MutualLearning(peers=1).apply(mlp(12), bench), bench.fit(mlp(12)))
    apart = MutualLearning(peers=2, weight=0.0).study(mlp(12), bench)
    assert same(apart[0], bench.fit(mlp(12)))
    assert same(apart[1], bench.fit(redrawn(mlp(12), seed_of(0, "peer", 1))))


class Spy(nn.Module):
    """A network that notes what it said, in which mode, and whether with gradient."""

    def __init__(self, log: list[tuple[str, Tensor, bool]], name: str) -> None:
        super().__init__()
        self.net, self.name, self.log = nn.Linear(4, 3), name, log

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        self.log.append((self.name, outputs.detach().clone(), torch.is_grad_enabled()))
        return outputs

    def __deepcopy__(self, memo: Any) -> Spy:
        copied = Spy(self.log, self.name)
        copied.net.load_state_dict(self.net.state_dict())
        return copied


def test_the_second_peer_sees_what_the_first_says_after_its_step() -> None:
    """One batch: first says (gradient), second is asked (none); then first is asked anew, after its update."""
    log: list[tuple[str, Tensor, bool]] = []
    torch.manual_seed(0)
    models = [Model(Spy(log, name), (torch.zeros(1, 4),), Classification()) for name in ("first", "second")]
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    bench = Bench(train=data, validation=data, training=Training(epochs=1, batch_size=8))
    log.clear()
    trained = MutualLearning(peers=1, partners=(models[1],)).study(models[0], bench)
    del log[:2]  # before the training each is asked once, whether they fit
    assert [(name, gradient) for name, _, gradient in log[:4]] == [
        ("second", False), ("first", True), ("first", False), ("second", True),
    ]  # fmt: skip
    assert not torch.equal(log[1][1], log[2][1]), "its answer has moved with its update"
    x = data.tensors[0]
    said = sorted(map(tuple, trained[0].module.net(x).tolist()))
    asked = sorted(map(tuple, log[2][1].tolist()))
    torch.testing.assert_close(torch.tensor(said), torch.tensor(asked))


@pytest.mark.parametrize("alternating", [True, False])
def test_peers_in_two_processes_learn_as_in_one(digits: Splits, alternating: bool) -> None:
    """Under ddp, each process with half of every batch: also a partner of another architecture."""
    few = torch.utils.data.Subset(digits.train, range(128))
    settings = {"epochs": 2, "accelerator": "cpu", "optimizer": SGD(lr=0.05), "schedule": Constant()}
    one = Training(batch_size=32, **settings)
    technique = MutualLearning(peers=2, partners=(mlp(7, seed=3),), alternating=alternating)
    alone, both = (
        technique.study(mlp(12), replace(bench_of(digits, train=few), training=training))
        for training in (one, replace(one, batch_size=16, devices=2, strategy="ddp"))
    )
    for a, b in zip(alone, both, strict=True):
        for name, value in a.module.state_dict().items():
            torch.testing.assert_close(b.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_peers_start_from_other_values_and_from_each_other(digits: Splits) -> None:
    peers = MutualLearning(peers=3, epochs=1).study(mlp(12), bench_of(digits))
    weights = [peer.module[1].weight for peer in peers]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_samples_without_labels_count_by_the_peers_alone(digits: Splits) -> None:
    z, other, none = torch.randn(6, 4), torch.randn(6, 4), torch.full((6,), -100)
    hard = nn.functional.cross_entropy(z, none)
    assert not hard.isfinite()
    told = Mutual()(0, of_labels(hard, z, none), none, Answer(z), (Answer(other),))
    torch.testing.assert_close(told, divergence(other.log_softmax(1), z))
    few, rest = (torch.utils.data.Subset(digits.train, range(*span)) for span in ((0, 100), (100, 400)))
    trained = MutualLearning().apply(mlp(12), bench_of(digits, train=with_unlabelled(few, rest)))
    assert all(bool(value.isfinite().all()) for value in trained.module.state_dict().values())


def test_what_is_kept(digits: Splits, tmp_path: Path) -> None:
    bench, small = bench_of(digits), replace(mlp(6, seed=3), lineage=(Origin(FACTORY),))
    technique = MutualLearning(peers=2, partners=(small,), epochs=1)
    peers = technique.study(mlp(24), bench)
    assert same(technique.apply(mlp(24), bench), peers[0])
    assert same(replace(technique, keep="smallest").apply(mlp(24), bench), peers[2])
    scores = [bench.evaluate(peer).value for peer in peers]
    assert same(replace(technique, keep="best").apply(mlp(24), bench), peers[scores.index(max(scores))])
    with pytest.raises(UsageError, match="differ in structure"):
        replace(technique, keep="ensemble").apply(mlp(24), bench)
    pair = MutualLearning(epochs=1).study(mlp(24), bench)
    whole = MutualLearning(epochs=1, keep="ensemble").apply(mlp(24), bench)
    x = torch.rand(5, 1, 8, 8)
    mean = sum(peer.module(x).softmax(1) for peer in pair) / 2
    torch.testing.assert_close(whole.module(x).softmax(1), mean)
    save(small, tmp_path / "small", onnx=False)
    saved = replace(technique, partners=(str(tmp_path / "small"),), keep="smallest")
    assert same(saved.apply(mlp(24), bench), peers[2])


def test_zeros_of_the_given_model_stay(digits: Splits) -> None:
    pruned = mlp(24)
    with torch.no_grad():
        pruned.module[3].weight[:, ::2] = 0
    kept = zero_masks(MutualLearning(epochs=1).apply(pruned, bench_of(digits)).module)
    assert torch.equal(kept["3.weight"], zero_masks(pruned.module)["3.weight"])
    assert not zero_masks(MutualLearning(epochs=1, keep_zeros=False).apply(pruned, bench_of(digits)).module)


def test_what_it_cannot_do_is_told(digits: Splits, tmp_path: Path) -> None:
    for name in ("variant", "keep"):
        with pytest.raises(SettingError, match=f"{name} is 'none'"):
            MutualLearning(**{name: "none"})
    with pytest.raises(NeedError, match="holds no saved model"):
        MutualLearning(partners=(str(tmp_path),)).apply(mlp(8), bench_of(digits))
    data = TensorDataset(torch.randn(40, 3), torch.randn(40))
    line = Model(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), example=(torch.zeros(2, 3),), task=Regression())
    with pytest.raises(NeedError, match="scores of classes"):
        MutualLearning().apply(line, Bench(train=data, training=Training(epochs=1)))


def entropy(model: Model, x: Tensor) -> float:
    with torch.no_grad():
        told = model.module(x).log_softmax(1)
    return -float((told.exp() * told).sum(1).mean())


@pytest.mark.effect
@pytest.mark.slow
def test_peers_are_less_sure_of_themselves_and_no_worse_than_networks_alone(digits: Splits) -> None:
    """Two peers and the same two alone, on 300 digits, four seeds: the mean of both networks.

    The paper's higher entropy over the other classes shows; its gain in accuracy does not at this scale (0.0 to 0.2
    points), so that the test asks for no loss.
    """
    x = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
    softer, gains = [], []
    for seed in range(4):
        few = hold_out(digits.train, 300 / len(digits.train), seed)[1]
        bench = bench_of(digits, 30, seed, train=few)
        alone, mutual = (MutualLearning(weight=weight).study(mlp(48, seed=seed), bench) for weight in (0.0, 1.0))
        softer.append(sum(entropy(one, x) for one in mutual) / sum(entropy(one, x) for one in alone))
        scores = [sum(evaluate(one, digits.test).value for one in pair) / 2 for pair in (mutual, alone)]
        gains.append(scores[0] - scores[1])
    assert sum(softer) / 4 > 1.005, softer
    assert sum(gains) / 4 > -0.01, gains


@pytest.mark.parametrize("variant", ["mean", "ensemble"])
def test_divergences_are_of_single_precision_at_least(variant: Any) -> None:
    z = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    peers = torch.stack([z + 0.25, z * 1.125])
    half = mutual_loss(z, peers, variant)
    torch.testing.assert_close(half, mutual_loss(z.float(), peers.float(), variant), rtol=0, atol=0)
