"""Several processes: the same training as one process with the batch of all; errors come back as they are."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from karui.errors import DataError, SettingError, TrainingError
from karui.model import Classification, Model
from karui.train import SGD, Constant, Influence, Moment, Training, fit

ONE = Training(epochs=3, batch_size=16, accelerator="cpu", optimizer=SGD(lr=0.1), schedule=Constant())
TWO = replace(ONE, batch_size=8, devices=2, strategy="ddp")


def rings(samples: int = 64) -> TensorDataset:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.norm(dim=1) > 1.1).long())


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    return Model(net, example=(torch.zeros(1, 2),), task=Classification())


def losses(trained: Model) -> list[float]:
    return [epoch["loss"] for epoch in trained.lineage[-1].settings["history"]]


def test_two_processes_train_as_one_with_the_double_batch() -> None:
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
    one, two = fit(model(), rings(), training=ONE), fit(model(), rings(), training=TWO)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(two)[-1] < losses(two)[0]
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(two.module.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} & set(os.environ)


def test_an_influence_of_its_own_layers_trains_in_two_processes() -> None:
    """A part that one step leaves without gradient, and one that only the influence uses."""

    class Helper(Influence):
        def attach(self, module: nn.Module) -> None:
            module.helper, module.idle = nn.Linear(2, 1, bias=False), nn.Linear(2, 1)
            module.forward = lambda x: module[2](module[1](module[0](x)))

        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            return loss + (moment.module.helper(moment.inputs[0]) - 1).square().mean()

        def finish(self, module: nn.Module) -> nn.Module:
            self.left = module.helper.weight.detach().clone()
            del module.helper, module.idle, module.forward
            return module

    influences = Helper(), Helper()
    one = fit(model(), rings(), training=ONE, influence=influences[0])
    two = fit(model(), rings(), training=TWO, influence=influences[1])
    torch.testing.assert_close(influences[0].left, influences[1].left, rtol=1e-4, atol=1e-6)
    assert losses(two) != losses(fit(model(), rings(), training=ONE))
    torch.testing.assert_close(one.module[0].weight, two.module[0].weight, rtol=1e-4, atol=1e-6)


def test_an_error_in_a_process_comes_back_as_itself() -> None:
    x, y = rings().tensors
    x = x.clone()
    x[5] = float("inf")
    with pytest.raises(TrainingError, match=r"The loss of 'train' became nan in epoch 1 of 3") as caught:
        fit(model(), TensorDataset(x, y), training=TWO)
    assert "learning rate" in caught.value.hint

    class Torn(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            return torch.zeros(2 if number % 32 else 3), 0

    with pytest.raises(DataError, match="cannot be put in one batch"):
        fit(model(), Torn(), training=TWO)


def test_a_foreign_error_in_a_process_names_it() -> None:
    class Broken(Influence):
        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            raise RuntimeError("no such neuron")

    with pytest.raises(TrainingError, match="One of 2 training processes failed: RuntimeError: no such neuron"):
        fit(model(), rings(), training=TWO, influence=Broken())


def test_devices_that_are_not_there_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(SettingError, match="accelerator 'cuda', devices 2") as caught:
        fit(model(), rings(), training=replace(TWO, accelerator="cuda"))
    assert "accelerator='cpu'" in caught.value.hint


def test_mixed_precision_trains_close_to_full() -> None:
    mixed = fit(model(), rings(), training=replace(ONE, precision="bf16-mixed"))
    full = fit(model(), rings(), training=ONE)
    assert losses(mixed) != losses(full)
    assert losses(mixed) == pytest.approx(losses(full), rel=0.02)
    assert mixed.module[0].weight.dtype == torch.float32
