"""Data-free distillation, [41]: records, reconstruction, and what the paper claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import save
from karui.cli.app import run
from karui.data import Splits
from karui.distill._reconstruction import Descent, Rebuilt, block_loss, reconstruct
from karui.distill._recording import record
from karui.distill._records import KINDS, Block, Kind, load_record
from karui.distill.data_free import DataFree, distil
from karui.errors import ArtifactError, NeedError, SettingError
from karui.measuring import evaluate
from karui.measuring.values import bytes_text
from karui.model import Classification, Model, Note, Origin
from karui.technique import Bench, lacking
from karui.train import Adam, Constant, Training
from karui.train.loop import REMARK

pytestmark = pytest.mark.paper(41)
FACTORY = f"{__file__}:network"


def network() -> Any:
    """The factory of the teacher that is saved."""
    return perceptron((64, 32, 24, 10))


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, lr: float = 3e-3) -> Bench:
    return Bench(
        train=digits.train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=lr), schedule=Constant()),
        seed=seed,
    )


@pytest.fixture(scope="module")
def teacher(digits: Splits) -> Model:
    trained = bench_of(digits, 15).fit(mlp(32, 24, seed=1))
    return replace(trained, lineage=(Origin(FACTORY),))


def whole(digits: Splits) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in digits.train]), torch.tensor([int(y) for _, y in digits.train])


def outputs_of(model: Model, x: Tensor, temperature: float = 8.0) -> dict[str, Tensor]:
    seen, h = {}, x
    for path, layer in model.module.named_children():
        h = layer(h)
        seen[path] = h.detach()
    return {path: seen[path] / (temperature if path == "5" else 1.0) for path in ("1", "3", "5")}


def test_a_record_is_the_mean_and_covariance_of_each_class(digits: Splits, teacher: Model) -> None:
    (x, y), made = whole(digits), record(teacher, digits.train, "all")
    assert made.layers == ("1", "3", "5")
    seen = outputs_of(teacher, x)
    for block in made.blocks:
        (path,) = block.layers
        for number in range(10):
            rows = seen[path][y == number].double()
            torch.testing.assert_close(block.means[number].double(), rows.mean(0), rtol=1e-4, atol=1e-4)
            covariance = torch.cov(rows.T, correction=0)
            torch.testing.assert_close(block.spreads[number].double(), covariance, rtol=1e-3, atol=1e-3)
    top = record(teacher, digits.train, "top")
    assert top.layers == ("5",)
    assert torch.equal(top.blocks[0].means, made.blocks[-1].means)


@pytest.mark.parametrize("full", [True, False])
def test_sampled_targets_have_the_recorded_mean_and_covariance(full: bool) -> None:
    """With the covariance's root: the covariance itself as a factor would give its square."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(2, 3, 3, generator=draw)
    spreads, means = half @ half.transpose(1, 2), torch.randn(2, 3, generator=draw) * 4
    block = Block(("a",), (3,), means, spreads if full else spreads.diagonal(dim1=1, dim2=2))
    drawn = block.sample(torch.tensor([0, 1]).repeat(40_000), draw)
    for number in range(2):
        rows = drawn[number::2]
        torch.testing.assert_close(rows.mean(0), means[number], rtol=0, atol=0.06)
        wanted = spreads[number] if full else torch.diag(spreads[number].diagonal())
        torch.testing.assert_close(torch.cov(rows.T), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_file_holds_no_example_and_its_size_follows_the_formula(
    kind: Kind, diagonal: bool, digits: Splits, teacher: Model, tmp_path: Path
) -> None:
    made = record(teacher, digits.train, kind, diagonal=diagonal, share=0.2, seed=3)
    size = made.save(tmp_path / "record.safetensors")
    assert size == (tmp_path / "record.safetensors").stat().st_size
    spread = (lambda d: d) if diagonal else (lambda d: d * d)
    units = {"top": (10,), "all": (32, 24, 10), "all_dropout": (32, 24, 10), "spectral_all": (66,), "jl": (66,),
             "spectral_pairs": (56, 34)}[kind]  # fmt: skip
    features = [round(0.2 * n) for n in units] if kind in ("spectral_all", "spectral_pairs", "jl") else units
    basis = sum(n * d for n, d in zip(units, features, strict=True)) if kind.startswith("spectral") else 0
    assert made.numbers == sum(10 * (d + spread(d)) for d in features) + basis
    assert 0 < size - 4 * made.numbers < 2000, "the rest is the header"
    read = load_record(tmp_path / "record.safetensors")
    assert read.describe() == made.describe()
    for a, b in zip(read.blocks, made.blocks, strict=True):
        assert (a.layers, a.sizes) == (b.layers, b.sizes)
        assert torch.equal(a.means, b.means)
        assert torch.equal(a.spreads, b.spreads)
        assert (a.basis is None) == (b.basis is None)
        assert a.basis is None or torch.equal(a.basis, b.basis)  # pyright: ignore[reportArgumentType]
    (tmp_path / "other").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="no activation record"):
        load_record(tmp_path / "other")


def test_projected_records_are_those_of_projected_activations(digits: Splits, teacher: Model) -> None:
    x, y = whole(digits)
    seen = outputs_of(teacher, x)
    scaled = torch.cat([seen[path].double().relu() / seen[path].shape[1] for path in ("1", "3", "5")], 1)
    for kind in ("spectral_all", "jl"):
        (block,) = record(teacher, digits.train, kind, share=0.3).blocks  # pyright: ignore[reportArgumentType]
        assert block.basis is not None
        rows = (scaled @ block.basis.double())[y == 4]
        torch.testing.assert_close(block.means[4].double(), rows.mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(block.spreads[4].double(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-6)


def test_with_all_eigenvectors_the_spectral_loss_is_that_of_all_layers(digits: Splits, teacher: Model) -> None:
    every = record(teacher, digits.train, "all")
    (block,) = record(teacher, digits.train, "spectral_all", share=1.0).blocks
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = outputs_of(teacher, x)
    targets = [part.sample(torch.arange(20) % 10, torch.Generator().manual_seed(1)) for part in every.blocks]
    plain = torch.stack([block_loss(b, t, outputs) for b, t in zip(every.blocks, targets, strict=True)]).sum(0)
    projection = block.projection()
    assert projection is not None
    rotated = block_loss(block, torch.cat(targets, 1).relu() @ projection, outputs)
    torch.testing.assert_close(rotated, plain, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_move_and_they_come_nearer(kind: Kind, digits: Splits, teacher: Model) -> None:
    made, before = record(teacher, digits.train, kind), {n: v.clone() for n, v in teacher.module.state_dict().items()}
    short = Descent(steps=60, batch=25, tidy=20 if kind == "top" else 0)
    rebuilt, again = (reconstruct(teacher, made, short, samples=4, seed=2) for _ in range(2))
    assert rebuilt.inputs.shape == (40, 1, 8, 8)
    assert torch.equal(rebuilt.inputs, again.inputs)
    assert rebuilt.classes.bincount().tolist() == [4] * 10
    assert rebuilt.losses[-1] < 0.5 * rebuilt.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert not any(p.grad is not None for p in teacher.module.parameters())
    assert not torch.equal(rebuilt.inputs, reconstruct(teacher, made, short, samples=4, seed=3).inputs)


def test_a_light_blur_and_the_range_are_kept_where_asked_for(digits: Splits, teacher: Model) -> None:
    made = record(teacher, digits.train, "top")
    tidy = reconstruct(teacher, made, Descent(steps=40, tidy=1), samples=5)
    free = reconstruct(teacher, made, Descent(steps=40), samples=5)
    assert float(tidy.inputs.min()) >= 0
    assert float(tidy.inputs.max()) <= 1
    assert float(free.inputs.min()) < 0
    assert float(tidy.inputs.diff(dim=3).abs().mean()) < 0.7 * float(free.inputs.diff(dim=3).abs().mean())


def test_rebuilt_inputs_are_of_the_intended_class(digits: Splits, teacher: Model) -> None:
    for kind, share in (("all", 0.95), ("top", 0.7)):
        rebuilt = reconstruct(teacher, record(teacher, digits.train, kind), samples=20)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            said = teacher.module(rebuilt.inputs).argmax(1)
        assert float((said == rebuilt.classes).float().mean()) >= share, kind


class Untouchable(Dataset):
    """Data that were promised not to be looked at."""

    def __len__(self) -> int:
        raise AssertionError("the data were counted")

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("the data were read")


def test_with_a_record_no_data_are_touched(digits: Splits, teacher: Model, tmp_path: Path) -> None:
    file = tmp_path / "teacher.record.safetensors"
    owner = DataFree(record=str(file), kind="top", epochs=0)
    assert owner.needs() == ("labels", "training", "teacher")
    unchanged = owner.apply(teacher, replace(bench_of(digits), dense=teacher))  # as the first step of a recipe
    assert unchanged.module is teacher.module
    assert file.is_file()
    save(teacher, tmp_path / "teacher", onnx=False)
    user = DataFree(teacher=str(tmp_path / "teacher"), record=file, samples=5, iterations=20, epochs=1)
    assert user.needs() == ("teacher",)
    training = bench_of(digits).training
    none = user.apply(mlp(8), Bench(training=training))
    sealed = user.apply(
        mlp(8), Bench(train=Untouchable(), validation=Untouchable(), test=Untouchable(), training=training)
    )
    for a, b in zip(none.module.parameters(), sealed.module.parameters(), strict=True):
        assert torch.equal(a, b)
    for told in (unchanged.lineage[-1], none.lineage[-1]):
        assert isinstance(told, Note)
        assert REMARK in told.settings, "the command line tells it"
        for words in ("no sample is in it", "protects no privacy", f"beside {bytes_text(len(digits.train) * 64 * 4)}"):
            assert words in told.describe()
    size = file.stat().st_size
    assert f"written to {file}, {bytes_text(size)}" in unchanged.lineage[-1].describe()
    assert unchanged.lineage[-1].settings["bytes"] == size  # pyright: ignore[reportAttributeAccessIssue]
    assert lacking(replace(user, record=tmp_path / "lost"), mlp(8), Bench())
    fresh = replace(user, record=None, kind="all", teacher=teacher)
    fresh.apply(mlp(8), bench_of(digits))


@pytest.mark.slow
def test_the_command_line_tells_size_and_privacy_to_owner_and_user(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from karui.architectures.perceptron import perceptron\n\n\ndef net():\n    return perceptron((64, 8, 10))\n"
    )
    clock = "[clock]\nbatches = [1]\nthreads = [1]\nrounds = 5\nseconds = 0.2\nengines = [{ kind = 'OnnxRuntime' }]\n\n"
    step = "[[step]]\ntechnique = 'data_free_distillation'\nrecord = 'rec.safetensors'\nkind = 'top'\n"
    (tmp_path / "owner.toml").write_text(f"{clock}{step}epochs = 0\n")
    few = "samples = 5\niterations = 5\nepochs = 1\nteacher = 'owned'\n"
    (tmp_path / "user.toml").write_text(f"{clock}{step}{few}")
    assert run(["compress", "net.py:net", "--data", "digits", "--recipe", "owner.toml", "--out", "owned"]) == 0
    owner = capsys.readouterr().err
    assert run(["compress", "net.py:net", "--data", "digits", "--recipe", "user.toml", "--out", "used"]) == 0
    user = capsys.readouterr().err
    assert "data_free_distillation: written to rec.safetensors" in owner
    assert "data_free_distillation: taught on 50 inputs rebuilt from an activation record 'top'" in user
    for told in (owner, user):
        assert "kB of 1,0" in told
        assert "no sample is in it" in told
        assert "protects no privacy by itself" in told


def test_inputs_that_cannot_be_rebuilt_are_refused_by_name(digits: Splits, tmp_path: Path) -> None:
    """Tokens and several inputs: before any training, for the owner of the data and for the user of a record."""
    words = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    tokens = Model(words, example=(torch.zeros(2, 3, dtype=torch.long),), task=Classification())
    data = TensorDataset(torch.randint(9, (40, 3)), torch.randint(3, (40,)))
    bench = Bench(train=data, training=Training(epochs=1))
    for step in (DataFree(teacher=tokens.copy(), epochs=1), DataFree(record=tmp_path / "record", epochs=0)):
        with pytest.raises(NeedError, match="rebuilds one input by its gradient, and the model takes .*whole numbers"):
            step.fits(tokens, bench)
        with pytest.raises(NeedError, match="rebuilds one input"):
            step.apply(tokens, bench)
    two = Model(torch.nn.Bilinear(3, 3, 4), example=(torch.zeros(2, 3), torch.zeros(2, 3)), task=Classification())
    with pytest.raises(NeedError, match=r"takes .*\(2, 3\).* and .*\(2, 3\)"):
        DataFree(teacher=two.copy()).fits(two, bench)
    DataFree(epochs=0).fits(tokens, bench)
    named = Model(torch.nn.Linear(3, 4), example=({"x": torch.zeros(2, 3)},), task=Classification())
    with pytest.raises(NeedError, match=r"takes a dict\."):
        DataFree(teacher=tokens.copy()).fits(named, bench)


def test_what_does_not_fit_is_told(digits: Splits, teacher: Model) -> None:
    made = record(teacher, digits.train, "all")
    with pytest.raises(SettingError, match="The record is of layers"):
        reconstruct(mlp(16, 24), made)
    with pytest.raises(SettingError, match="kind is 'best'"):
        DataFree(kind="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NeedError, match="needs a teacher"):
        DataFree(record=made).apply(mlp(8), bench_of(digits))
    with pytest.raises(SettingError, match="two layers or more"):
        record(teacher, digits.train, "spectral_pairs", layers=("5",))
    wide = mlp(5000)
    with pytest.raises(SettingError, match=r"5,000 units"):
        record(wide, digits.train, "all")
    assert record(wide, digits.train, "all", diagonal=True).blocks[0].spreads.shape == (10, 5000)


def test_a_convolutional_teacher_is_recorded_and_rebuilt(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    model = bench_of(digits, 2).fit(small_cnn((4, 6, 8)))
    made = record(model, digits.train, "all")
    assert made.layers == ("bn1", "bn2", "bn3", "linear")
    rebuilt = reconstruct(model, made, Descent(steps=40), samples=3)
    assert rebuilt.losses[-1] < rebuilt.losses[0]


def test_where_a_normalisation_follows_its_output_is_what_is_recorded() -> None:
    """The ReLU comes behind it, and the loss puts one on what is recorded."""
    nets = torch.nn
    second = nets.Sequential(nets.Linear(16, 6), nets.ReLU(), nets.BatchNorm1d(6), nets.Linear(6, 3))
    layers = (nets.Conv2d(1, 4, 3), nets.BatchNorm2d(4), nets.ReLU(), nets.AdaptiveAvgPool2d(2), nets.Flatten(), second)
    model = Model(nets.Sequential(*layers), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    data = TensorDataset(torch.randn(60, 1, 8, 8), torch.arange(60) % 3)
    made = record(model, data, "all")
    assert made.layers == ("1", "5.0", "5.3"), "a normalisation behind a ReLU is not the first layer's"
    assert made.blocks[0].sizes == (144,)
    rebuilt = reconstruct(model, made, Descent(steps=20), samples=2)
    assert rebuilt.losses[-1] < rebuilt.losses[0]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.module.modules())


@pytest.mark.effect
@pytest.mark.slow
def test_rebuilt_inputs_teach_far_better_than_noise_of_the_same_range(digits: Splits) -> None:
    """Two seeds, few steps. What all layers add to the top one shows in many more steps, or on larger pictures."""
    scores: dict[str, list[float]] = {"teacher": [], "noise": [], "top": [], "all": []}
    x = whole(digits)[0]
    for seed in range(2):
        teacher = bench_of(digits, 40, seed).fit(mlp(128, 128, seed=50 + seed))
        scores["teacher"].append(evaluate(teacher, digits.test).value)
        noise = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * x.std() + x.mean()
        sets = {"noise": Rebuilt(noise, torch.zeros(1000).long(), ())}
        for kind in ("top", "all"):
            sets[kind] = reconstruct(teacher, record(teacher, digits.train, kind), seed=seed)  # pyright: ignore[reportArgumentType]
        for name, rebuilt in sets.items():
            bench = bench_of(digits, seed=seed, lr=1e-3)
            taught = distil(mlp(64, 64, 64, seed=seed), teacher, rebuilt, bench, temperature=8.0, epochs=30)
            scores[name].append(evaluate(taught, digits.test).value)
    mean = {name: sum(values) / 2 for name, values in scores.items()}
    assert mean["top"] >= mean["noise"] + 0.15, scores
    assert mean["all"] >= mean["noise"] + 0.1, scores
    assert mean["all"] >= 0.9 * mean["teacher"], scores


def test_a_data_set_of_the_owner_may_be_any(digits: Splits, teacher: Model) -> None:
    x, y = whole(digits)
    plain = record(teacher, TensorDataset(x, y), "top")
    listed = record(teacher, list(zip(x, y.tolist(), strict=True)), "top")
    assert torch.equal(plain.blocks[0].means, listed.blocks[0].means)
    assert plain.pixels == pytest.approx((float(x.mean()), float(x.std()), 0.0, 1.0), rel=1e-3)
