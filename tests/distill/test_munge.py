"""Model compression, [36]: transfer sets that are made, the mimic's loss, the best epoch, and what the paper claims."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.data import Splits, hold_out
from karui.data.splits import take
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression, chosen_ensemble, labelled, mimic_loss, number_loss
from karui.errors import DataError, NeedError, SettingError
from karui.measuring import evaluate
from karui.model import Classification, Model, Regression
from karui.technique import Bench, Then, lacking
from karui.train import Adam, Constant, Cosine, Influence, Moment, Together, Training, fit
from karui.train.best_epoch import BestEpoch
from karui.train.pseudo import Pseudo, inputs_of
from karui.train.teaching import Teachers

pytestmark = pytest.mark.paper(36)


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, samples: int = 100, epochs: int = 1, seed: int = 0, lr: float = 3e-3) -> Bench:
    few = take(digits.train, torch.arange(samples))
    return Bench(
        train=few,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=lr), schedule=Constant()),
        seed=seed,
    )


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_loss_is_the_squared_error_of_probabilities() -> None:
    z, p = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    torch.testing.assert_close(mimic_loss(z, p), ((z.softmax(1) - p) ** 2).sum() / 6)
    assert float(mimic_loss(p.log(), p)) < 1e-12
    torch.testing.assert_close(mimic_loss(z + 3, p), mimic_loss(z, p))
    torch.testing.assert_close(number_loss(z, p), ((z - p) ** 2).sum() / 6)


@pytest.mark.parametrize("generator", ["munge", "random", "nbe"])
def test_pseudo_data_are_like_the_inputs_and_the_data_stay(digits: Splits, generator: str) -> None:
    few = take(digits.train, torch.arange(60))
    before = few.tensors[0].clone()
    pseudo = Pseudo(generator=generator, copies=3)  # pyright: ignore[reportArgumentType]
    (made,) = pseudo.grow(few, seed=0).tensors
    assert made.shape == (180, 1, 8, 8)
    assert made.dtype == torch.float32
    assert torch.equal(few.tensors[0], before)
    assert torch.equal(made, pseudo.grow(TensorDataset(before), seed=0).tensors[0]), "targets are not looked at"
    assert not torch.equal(made, pseudo.grow(few, seed=1).tensors[0])


def test_whole_numbers_are_names(digits: Splits) -> None:
    words = torch.randint(7, (40, 5), generator=torch.Generator().manual_seed(0))
    for generator in ("munge", "nbe"):
        (made,) = Pseudo(generator=generator, copies=2).grow(TensorDataset(words), seed=0).tensors  # pyright: ignore
        assert made.dtype == torch.int64
        assert set(made.unique().tolist()) <= set(words.unique().tolist())
    with pytest.raises(DataError, match="one input tensor"):
        inputs_of(TensorDataset(words, words, words))


def test_the_teacher_is_asked_once_and_answers_with_probabilities(digits: Splits) -> None:
    members = mlp(16, seed=1), mlp(24, seed=2)
    x = inputs_of(digits.test)
    data = labelled(Teachers(members), x, classes=True, batch=100)
    wanted = sum(one.module(x).softmax(1) for one in members) / 2
    torch.testing.assert_close(data.tensors[1], wanted.detach())  # pyright: ignore[reportAttributeAccessIssue]
    counting = Counting()
    technique = ModelCompression(teacher=Model(counting, example=(x[:1],)), copies=2, epochs=3)
    counted: list[int] = []
    Counting.seen = counted
    technique.apply(mlp(8), bench_of(digits, 50))
    assert sum(counted) == 1 + 150, "the example, two copies and the originals, whatever the number of passes"


class Counting(nn.Module):
    """Says how many samples it was asked about."""

    seen: list[int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(len(x))
        return x.flatten(1)[:, :10]


def test_no_label_is_looked_at(digits: Splits) -> None:
    few = take(digits.train, torch.arange(60))
    x = few.tensors[0]
    bench, technique = bench_of(digits, 60), ModelCompression(teacher=mlp(16, seed=1), copies=1, epochs=1)
    made = [
        technique.apply(replace(mlp(8), task=None), replace(bench, train=TensorDataset(*tensors)))
        for tensors in ((x, few.tensors[1]), (x, torch.full((60,), 77)), (x,))
    ]
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def test_the_student_comes_near_its_teacher(digits: Splits) -> None:
    teacher, student = bench_of(digits, 600, 15).fit(mlp(32, seed=1)), mlp(32)
    taught = ModelCompression(teacher=teacher, copies=2, epochs=8).apply(student, bench_of(digits, 300))
    x = inputs_of(digits.test)
    before, after = (
        float(mimic_loss(one.module(x).detach(), teacher.module(x).softmax(1).detach())) for one in (student, taught)
    )
    assert after < 0.3 * before
    assert "pseudo data" in taught.lineage[-1].describe()


def test_a_new_network_of_one_hidden_layer_is_taught_by_the_given_model(digits: Splits) -> None:
    deep = bench_of(digits, 200, 3).fit(mlp(24, 24, seed=1))
    technique = ModelCompression(hidden=12, copies=1, epochs=1)
    bench = bench_of(digits)
    assert lacking(technique, deep, bench) == []
    made = technique.apply(deep, bench)
    assert made.parameters == 64 * 12 + 12 + 12 * 10 + 10
    assert same(made, Then(technique).apply(deep, bench))
    assert not same(made, replace(technique, teacher=mlp(8, seed=5)).apply(deep, bench))
    assert any("910 parameters" in text for text in technique.remarks(deep))


def test_a_regression_is_taught_numbers() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=draw)
    teacher = Model(nn.Linear(3, 1), example=(x[:1],), task=Regression())
    student = Model(nn.Linear(3, 1), example=(x[:1],), task=Regression())
    training = Training(batch_size=16, optimizer=Adam(lr=0.05), schedule=Constant())
    bench = Bench(train=TensorDataset(x), training=training)
    taught = ModelCompression(teacher=teacher, copies=4, epochs=10).apply(student, bench)
    torch.testing.assert_close(
        taught.module.get_parameter("weight"), teacher.module.get_parameter("weight"), atol=0.02, rtol=0
    )


def test_an_ensemble_is_chosen_of_a_library_by_validation_data(digits: Splits) -> None:
    bench = bench_of(digits, 300, 12)
    good = [bench.fit(mlp(16, seed=seed)) for seed in (1, 2)]
    library = (*good, mlp(16, seed=3), wrong)
    chosen = chosen_ensemble(library, mlp(8), bench, rounds=8)
    assert 1 <= len(chosen) <= 8
    assert set(map(id, chosen)) <= {id(one) for one in good}, "what has learned nothing stays out"
    ModelCompression(teacher=chosen, copies=1, epochs=1).apply(mlp(8), bench)
    with pytest.raises(NeedError, match="labels"):
        chosen_ensemble(good, mlp(8), replace(bench, validation=TensorDataset(inputs_of(digits.validation))))


def wrong(x: torch.Tensor) -> torch.Tensor:
    return 9 * torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]


def test_which_samples_are_taught_on(digits: Splits) -> None:
    bench, base = bench_of(digits, 50), ModelCompression(teacher=mlp(8, seed=1), copies=4, held=0.25)
    sizes = {}
    for originals, held in ((True, 0.25), (True, 0.0), (False, 0.25), (False, 0.0)):
        parts = replace(base, originals=originals, held=held).transfer(mlp(8), bench)
        sizes[originals, held] = tuple(0 if part is None else len(part) for part in parts)
    assert sizes == {(True, 0.25): (200, 50), (True, 0.0): (250, 0), (False, 0.25): (150, 50), (False, 0.0): (200, 0)}
    plain = replace(base, copies=0).transfer(mlp(8), bench)
    assert torch.equal(plain[0].tensors[0], inputs_of(bench.train))
    assert plain[1] is None


def test_pseudo_data_serve_other_techniques_as_a_pool(digits: Splits) -> None:
    bench, pool = bench_of(digits, 50), Pseudo(copies=2).grow(take(digits.train, torch.arange(50)), seed=0)
    technique = LogitRegression(teacher=mlp(8, seed=1), unlabelled=pool, epochs=1)
    taught = technique.apply(mlp(8), bench)
    assert "150" in str(taught.lineage[-1])


def test_the_best_epoch_is_kept_and_a_training_goes_on_from_it(digits: Splits) -> None:
    """The weights are those of the epoch with the least loss on what is held out; nothing of the store is left."""
    x, y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 1)
    net = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))
    model = Model(net, example=(x[:1],), task=Regression())
    best = BestEpoch(inputs=x[:8], targets=torch.full((8, 1), 0.7), loss=nn.functional.mse_loss)
    seen: list[tuple[float, dict[str, torch.Tensor]]] = []

    class Spy(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            if (moment.step + 1) % (moment.steps // moment.epochs) == 0:
                held = {k: v.clone() for k, v in module.state_dict().items() if "_best" not in k}
                seen.append((best._tried(module), held))

    training = Training(epochs=6, batch_size=16, optimizer=Adam(lr=0.1), schedule=Constant())
    made = fit(model, TensorDataset(x, y), training=training, influence=Together(Spy(), best))
    wanted = min(seen, key=lambda pair: pair[0])[1]
    assert made.module.state_dict().keys() == wanted.keys()
    assert all(torch.equal(v, wanted[k]) for k, v in made.module.state_dict().items())
    assert min(range(6), key=lambda epoch: seen[epoch][0]) < 5, "the last epoch is not the best here"


def test_zeros_stay(digits: Splits) -> None:
    student = mlp(16)
    with torch.no_grad():
        student.module.get_parameter("1.weight")[:, ::2] = 0.0
    taught = ModelCompression(teacher=mlp(16, seed=1), copies=1, epochs=2).apply(student, bench_of(digits))
    assert not taught.module.get_parameter("1.weight")[:, ::2].any()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("copies", -1), ("swap", 1.5), ("tightness", 0.0), ("hidden", 0), ("held", 1.0), ("epochs", -1), ("clusters", 0),
     ("generator", "noise"), ("neighbours", "all"), ("nominal", (-1,))],
)  # fmt: skip
def test_wrong_settings_are_told(setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=setting):
        ModelCompression(**{setting: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="nothing to teach on"):
        ModelCompression(copies=0, originals=False)


def test_a_teacher_of_other_classes_is_refused(digits: Splits) -> None:
    other = Model(perceptron((64, 8, 7)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    with pytest.raises(NeedError, match=r"\(1, 10\).*\(1, 7\)"):
        ModelCompression(teacher=other, copies=1).apply(mlp(8), bench_of(digits))
    with pytest.raises(NeedError, match="needs a teacher"):
        ModelCompression().apply(mlp(8), bench_of(digits))


def test_a_killed_training_goes_on(digits: Splits, tmp_path: object) -> None:
    bench = replace(bench_of(digits), checkpoints=tmp_path)  # pyright: ignore[reportArgumentType]
    technique = ModelCompression(teacher=mlp(8, seed=1), copies=1, epochs=2)
    first = technique.apply(mlp(8), bench)
    assert same(first, technique.apply(mlp(8), bench))
    assert same(first, technique.apply(mlp(8), replace(bench, checkpoints=None)))
    few, _ = hold_out(digits.train, 0.5, 0)
    assert not same(first, technique.apply(mlp(8), replace(bench, train=few)))


def taught_by_forests(digits: Splits, samples: int, seed: int) -> tuple[Bench, ModelCompression]:
    """So few digits, and two forests fitted to the same."""
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    few = take(digits.train, order[:samples])
    x, y = few.tensors[0].flatten(1).double().numpy(), few.tensors[1].numpy()
    forests = tuple(kind(60, random_state=seed).fit(x, y) for kind in (RandomForestClassifier, ExtraTreesClassifier))
    settings = Training(batch_size=64, optimizer=Adam(lr=1e-2), schedule=Cosine())
    return replace(bench_of(digits, seed=seed), train=few, training=settings), ModelCompression(teacher=forests)


@pytest.mark.effect
def test_the_error_falls_with_the_number_of_copies(digits: Splits) -> None:
    """k = 10 over k = 1 at equal steps, 100 and 300 digits, four seeds each; 1.1 and 0.3 points in the benchmark."""
    gains = []
    for samples, seed in itertools.product((100, 300), range(4)):
        bench, technique = taught_by_forests(digits, samples, seed)
        many, once = (
            evaluate(replace(technique, copies=k, epochs=epochs).apply(mlp(32, seed=seed), bench), digits.test).value
            for k, epochs in ((10, 14), (1, 75))
        )
        gains.append(100 * (many - once))
    assert sum(gains) / len(gains) >= 0.2, gains


@pytest.mark.effect
def test_pseudo_data_teach_better_than_independent_draws(digits: Splits) -> None:
    """2.4 points [1.4, 3.4] over five seeds in the benchmark, where the section asks for 3; over three here half a one.

    Over hard labels, where the section asks for one point, it is half a one there and within chance: none is asserted.
    """
    gains = []
    for seed in range(3):
        bench, technique = taught_by_forests(digits, 300, seed)
        alone = replace(technique, epochs=15, originals=False)
        made = [replace(alone, generator=kind).apply(mlp(32, seed=seed), bench) for kind in ("munge", "random")]
        accuracy = [100 * evaluate(model, digits.test).value for model in made]
        gains.append(accuracy[0] - accuracy[1])
    assert sum(gains) / 3 >= 0.5, gains
