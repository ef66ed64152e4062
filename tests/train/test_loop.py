"""fit: it learns, repeats, leaves its input and the caller's generators alone, and stops on nonsense."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from karui.data import Splits
from karui.errors import DataError, NeedError, SettingError, TrainingError
from karui.model import Classification, CustomTask, Model, Note, Regression
from karui.recipes.values import build
from karui.train import SGD, Constant, Influence, Moment, Training, fit

SHORT = Training(epochs=2, batch_size=128)


def line(samples: int = 48, scale: float = 1.0) -> TensorDataset:
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, scale * x.sum(1, keepdim=True))


def linear(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(nn.Linear(3, 1), example=(torch.zeros(1, 3),), task=Regression())


def weights(model: Model) -> dict[str, Tensor]:
    return model.module.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_defaults_train_a_small_network_from_nothing(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    trained = fit(small_cnn(), digits.train)
    inputs, targets = digits.test.tensors
    with torch.no_grad():
        accuracy = Classification().scores(trained.module(inputs), targets).mean().item()
    assert accuracy > 0.95
    assert not trained.module.training


def test_same_seed_same_bits_other_seed_other_bits(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    runs = [weights(fit(small_cnn(), digits.train, training=SHORT, seed=seed)) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_order_of_memory_changes_no_more_than_the_rounding(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    seen = []

    class Watch(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            filters = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
            seen.append(all(p.is_contiguous(memory_format=torch.channels_last) for p in filters))

    few = Subset(digits.train, range(256))
    plain = fit(small_cnn(), few, training=SHORT)
    ordered = fit(small_cnn(), few, training=replace(SHORT, channels_last=True), influence=Watch())
    assert seen
    assert all(seen)
    for name, tensor in weights(ordered).items():
        assert tensor.is_contiguous(), name
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-3, atol=1e-4)


def test_dropout_is_seeded_too() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    model = Model(net, example=(torch.zeros(1, 3),), task=Regression())
    torch.manual_seed(1)
    first = weights(fit(model, line(), training=SHORT))
    torch.manual_seed(2)
    assert same(first, weights(fit(model, line(), training=SHORT)))


def test_the_input_model_and_the_callers_generators_are_left_as_they_were(
    small_cnn: Callable[..., Model], digits: Splits
) -> None:
    model = small_cnn()
    before = {name: value.clone() for name, value in weights(model).items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fit(model, digits.train, training=SHORT)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert same(before, weights(model))
    assert not model.module.training
    assert all(p.grad is None for p in model.module.parameters())


def test_no_epochs_change_nothing() -> None:
    model = linear()
    assert same(weights(model), weights(fit(model, line(), training=Training(epochs=0))))


def test_the_note_tells_settings_seed_and_learning_curve() -> None:
    (note,) = fit(linear(), line(), training=SHORT, seed=7, label="refit").lineage
    assert isinstance(note, Note)
    assert note.describe() == "trained for 2 epochs (refit)"
    assert (note.settings["seed"], note.settings["samples"]) == (7, 48)
    assert build(Training, note.settings["training"], "note") == SHORT
    losses = [epoch["loss"] for epoch in note.settings["history"]]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_a_step_is_plain_gradient_descent() -> None:
    """One step over all the data, written out by hand."""
    model, data = linear(), line()
    settings = SGD(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)
    training = Training(epochs=1, batch_size=48, optimizer=settings, schedule=Constant())
    x, y = data.tensors
    net = nn.Linear(3, 1)
    net.load_state_dict(weights(model))
    nn.functional.mse_loss(net(x), y).backward()
    got = weights(fit(model, data, training=training))
    torch.testing.assert_close(got["weight"], (net.weight - 0.1 * net.weight.grad).detach())


def test_data_without_tensors_trains_to_the_same_weights() -> None:
    """A user's own data set, read sample by sample, against the fast path."""

    class Slow(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return 48

        def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
            return line()[number]

    assert same(weights(fit(linear(), Slow(), training=SHORT)), weights(fit(linear(), line(), training=SHORT)))
    assert same(
        weights(fit(linear(), Subset(line(), range(48)), training=SHORT)),
        weights(fit(linear(), line(), training=SHORT)),
    )


def test_a_model_of_several_inputs() -> None:
    net = nn.Bilinear(3, 3, 1)
    model = Model(net, example=(torch.zeros(1, 3), torch.zeros(1, 3)), task=Regression())
    x, y = line().tensors
    assert not torch.equal(fit(model, TensorDataset(x, x, y), training=SHORT).module.weight, net.weight)


def test_the_first_loss_that_is_not_finite_stops_the_training() -> None:
    x, y = line().tensors
    y = y.clone()
    y[17] = float("nan")
    with pytest.raises(TrainingError, match=r"The loss of 'train' became nan in epoch 1 of 2, step \d of \d") as caught:
        fit(linear(), TensorDataset(x, y), training=Training(epochs=2, batch_size=8))
    assert "learning rate" in caught.value.hint


@pytest.mark.parametrize(("samples", "left"), [(33, 32), (34, 34)])
def test_a_last_batch_of_one_is_left_out_where_there_is_batch_normalisation(samples: int, left: int) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = Model(net, example=(torch.zeros(1, 3),), task=Regression())
    seen = []

    class Count(Influence):
        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            seen.append(len(moment.targets))
            return loss

    trained = fit(model, line(samples), training=Training(epochs=1, batch_size=16), influence=Count())
    assert sum(seen) == left
    assert ("left out" in trained.lineage[-1].settings) == (left < samples)


def test_what_is_missing_is_refused_before_a_step() -> None:
    model = linear()
    with pytest.raises(NeedError, match="no training data"):
        fit(model, None)
    with pytest.raises(NeedError, match="no task"):
        fit(replace(model, task=None), line())
    with pytest.raises(TrainingError, match="no samples"):
        fit(model, TensorDataset(torch.zeros(0, 3), torch.zeros(0, 1)))

    class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(line())

    with pytest.raises(DataError, match="a Stream without a length"):
        fit(model, Stream())
    frozen = linear()
    frozen.module.requires_grad_(requires_grad=False)
    with pytest.raises(TrainingError, match="no parameter to train"):
        fit(frozen, line())
    vector = CustomTask(loss=torch.sub, scores=torch.sub)
    with pytest.raises(TrainingError, match=r"The loss .* is of shape \(48, 1\)"):
        fit(replace(model, task=vector), line())
    for settings in (
        {"accelerator": "tpu"},
        {"accelerator": "abacus"},
        {"accelerator": "cpu", "precision": "16-mixed"},
    ):
        with pytest.raises(SettingError, match="is not possible here"):
            fit(model, line(), training=Training(**settings))
