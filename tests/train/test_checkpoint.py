"""Checkpoints: a killed training goes on to the very same weights; damaged and foreign files are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.errors import TrainingError
from karui.model import Model, Regression
from karui.train import SGD, Adam, Influence, Moment, Training, fit
from karui.train.checkpoint import module_tensors, optimizer_tensors, read, restore, write

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
from karui.data import load_data
from karui.model import Classification, Model
from karui.train import SGD, Adam, Influence, Training, fit

class Slow(Influence):
    def constraints(self, module, moment):
        time.sleep(PAUSE)

def train(optimizer, folder, pause=0.0):
    global PAUSE
    PAUSE = pause
    torch.set_num_threads(1)
    torch.manual_seed(4)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(288, 10)
    model = Model(nn.Sequential(*layers), example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    training = Training(
        epochs=3, optimizer={"SGD": SGD(), "Adam": Adam()}[optimizer], checkpoint_seconds=0.0,
        channels_last=optimizer == "SGD",  # the order of memory is no part of a checkpoint
        augment=lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator),
    )
    return fit(model, load_data("digits").train, training=training, influence=Slow(), checkpoints=Path(folder))

def summary(trained):
    losses = [epoch["loss"] for epoch in trained.lineage[-1].settings["history"]]
    return [losses, [value.double().sum().item() for value in trained.module.state_dict().values()]]

if __name__ == "__main__":
    print(json.dumps(summary(train(*sys.argv[1:]))))
"""


def state_in(folder: Path) -> dict[str, object]:
    files = list(folder.glob("train-*.safetensors"))
    return read(files[0])[1] if files else {"step": -1}


def killed(train: Callable[..., Model], optimizer: str, folder: Path, wanted: int) -> None:
    """Train in a process of its own, and kill it once `wanted` steps are in the checkpoint."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(optimizer, folder, 0.02))
    process.start()
    while state_in(folder)["step"] < wanted and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert wanted <= state_in(folder)["step"] < 51


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_training_killed_twice_ends_with_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code = runpy.run_path(str(script))
    whole = code["train"](optimizer, tmp_path / "whole")
    for wanted in (5, 23):  # in the middle of the first and of the second epoch of 17 steps
        killed(code["train"], optimizer, tmp_path / "killed", wanted)
    resumed = code["train"](optimizer, tmp_path / "killed")
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name
    assert code["summary"](resumed) == code["summary"](whole)
    assert state_in(tmp_path / "killed")["finished"]


def test_a_fresh_interpreter_finds_the_state_and_goes_on(tmp_path: Path) -> None:
    """Names of checkpoints must not hang on addresses or on the hash seed of a process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code = runpy.run_path(str(script))
    killed(code["train"], "Adam", tmp_path / "killed", 5)
    command = [sys.executable, str(script), "Adam", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert json.loads(out) == code["summary"](code["train"]("Adam", tmp_path / "whole"))
    assert len(list((tmp_path / "killed").glob("*"))) == 1
    assert [f.name for f in (tmp_path / "killed").glob("*")] == [f.name for f in (tmp_path / "whole").glob("*")]


def data(samples: int = 40) -> TensorDataset:
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def model(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(nn.Linear(3, 1), example=(torch.zeros(1, 3),), task=Regression())


class Counting(Influence):
    """Counts the steps taken; `weight` is a setting that changes the outcome."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        counted.append(moment.step)
        return self.weight * loss


counted: list[int] = []


def test_a_finished_training_is_not_repeated_and_another_one_never_taken_for_it(tmp_path: Path) -> None:
    base = {"training": Training(epochs=2, batch_size=10), "influence": Counting(), "checkpoints": tmp_path}
    counted.clear()
    first = fit(model(), data(), **base)
    assert len(counted) == 8
    again = fit(model(), data(), **base)
    assert len(counted) == 8
    assert torch.equal(first.module.weight, again.module.weight)
    assert again.lineage == first.lineage
    counted.clear()
    often = Training(epochs=2, batch_size=10, checkpoint_seconds=0.0)
    fit(model(), data(), **{**base, "training": often})
    assert not counted  # how often a checkpoint is written does not make it another training
    for change in (
        {"seed": 1},
        {"label": "other"},
        {"training": Training(epochs=2, batch_size=10, optimizer=SGD(lr=0.01))},
        {"influence": Counting(2.0)},
    ):
        counted.clear()
        fit(model(), data(), **{**base, **change})
        assert len(counted) == 8, change
    for other, samples in ((model(1), data()), (model(), data(41))):
        counted.clear()
        fit(other, samples, **base)
        assert counted[0] == 0


def test_the_last_good_state_is_kept_when_the_loss_stops_being_finite(tmp_path: Path) -> None:
    class Explode(Influence):
        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            return loss * (float("inf") if moment.step == 6 else 1.0)

    training = Training(epochs=2, batch_size=10, checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match=r"became inf in epoch 2 of 2, step 7 of 8") as caught:
        fit(model(), data(), training=training, influence=Explode(), checkpoints=tmp_path)
    (file,) = tmp_path.iterdir()
    assert str(file) in caught.value.message
    tensors, facts = read(file)
    assert facts["step"] == 6
    assert all(value.isfinite().all() for value in tensors.values())


def test_weights_that_have_gone_bad_do_not_replace_the_last_good_state(tmp_path: Path) -> None:
    class Poison(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            if moment.step == 4:
                module.weight.fill_(float("nan"))

    training = Training(epochs=2, batch_size=10, checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match="became nan in epoch 2 of 2, step 6 of 8"):
        fit(model(), data(), training=training, influence=Poison(), checkpoints=tmp_path)
    assert state_in(tmp_path)["step"] == 4


def test_weights_that_go_bad_in_the_very_last_step_are_not_handed_out() -> None:
    class Poison(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            module.weight[0, 0] = float("inf") if moment.step == moment.steps - 1 else 0.0

    with pytest.raises(TrainingError, match="The weights of 'train' became not finite in epoch 2 of 2, step 8 of 8"):
        fit(model(), data(), training=Training(epochs=2, batch_size=10), influence=Poison())


def test_infinite_buffers_are_no_reason_not_to_save(tmp_path: Path) -> None:
    net = model()
    net.module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    fit(net, data(), training=Training(epochs=1), checkpoints=tmp_path)
    assert state_in(tmp_path)["finished"]


def test_several_processes_resume_too(tmp_path: Path) -> None:
    training = Training(epochs=3, batch_size=5, devices=2, strategy="ddp", accelerator="cpu", checkpoint_seconds=0.0)
    whole = fit(model(), data(), training=training)

    class Stop(Influence):
        """Stops a training from outside of its outcome: its attributes are the same in both runs."""

        def constraints(self, module: nn.Module, moment: Moment) -> None:
            if moment.step == 6 and not (tmp_path / "go on").exists():
                raise TrainingError("stopped")

    with pytest.raises(TrainingError, match="stopped"):
        fit(model(), data(), training=training, influence=Stop(), checkpoints=tmp_path)
    assert state_in(tmp_path)["step"] == 6
    (tmp_path / "go on").touch()
    resumed = fit(model(), data(), training=training, influence=Stop(), checkpoints=tmp_path)
    assert torch.equal(resumed.module.weight, whole.module.weight)


def test_every_damage_to_a_file_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Cut short anywhere, or not a checkpoint at all."""
    file = tmp_path / "state.safetensors"
    write(file, {"parameter:weight": torch.arange(6.0)}, {"step": 3})
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(TrainingError, match="cannot be read"):
            read(file)
    file.write_bytes(content)
    assert read(file)[1] == {"step": 3}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    write(file, {"parameter:weight": torch.ones(2)}, {"step": 1})
    with pytest.raises(TypeError):
        write(file, {"parameter:weight": torch.zeros(2)}, {"step": object()})
    assert read(file)[1] == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_tensors_of_another_network_are_refused() -> None:
    with pytest.raises(TrainingError, match="another network"):
        restore(module_tensors(nn.Linear(3, 2)), nn.Linear(2, 3))


def test_shared_and_strided_tensors_and_optimizer_state_come_back(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.register_buffer("view", torch.arange(6.0).reshape(2, 3).T, persistent=False)

    def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = Tied()
        optimizer = Adam().make([{"params": list(net.parameters())}])
        (net.first(torch.ones(1, 3)) + net.second(torch.ones(1, 3))).sum().backward()
        optimizer.step()
        return net, optimizer

    (net, optimizer), (other, fresh) = stepped(), stepped()
    write(tmp_path / "state", {**module_tensors(net), **optimizer_tensors([optimizer])}, {})
    restore(read(tmp_path / "state")[0], other, [fresh])
    assert other.second.weight is other.first.weight
    assert torch.equal(other.first.weight, net.first.weight)
    assert torch.equal(other.view, net.view)
    for ours, theirs in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
