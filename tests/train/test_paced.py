"""Layers that are held back or held still while the rest trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import SettingError, UsageError
from karui.model import Classification, Model
from karui.train import SGD, Adam, Constant, Influence, Paced, Together, Training, fit


def network() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return Model(net, example=(torch.zeros(2, 6),), task=Classification())


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(96, 6, generator=generator), torch.randint(0, 3, (96,), generator=generator))


def trained(influence: Influence | None, optimizer: Any = None, epochs: int = 3, **more: Any) -> dict[str, Any]:
    optimizer = optimizer or SGD(lr=0.1, weight_decay=0.01)
    training = Training(epochs=epochs, batch_size=32, optimizer=optimizer, schedule=Constant())
    return fit(network(), data(), training=training, influence=influence, **more).module.state_dict()


def test_what_is_held_still_stays_to_the_bit_and_the_rest_moves() -> None:
    before, after = network().module.state_dict(), trained(Paced(("0", "1"), 0.0))
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(("0.", "1.")), name
    assert after.keys() == before.keys()


def test_one_step_is_scaled_for_any_optimizer() -> None:
    """A training of one batch, so that the gradient is the same."""
    start = network().module.state_dict()
    for optimizer in (SGD(lr=0.1, weight_decay=0.01), Adam(lr=0.01)):
        training = Training(epochs=1, batch_size=96, optimizer=optimizer, schedule=Constant())
        whole, part = (
            fit(network(), data(), training=training, influence=influence).module.state_dict()
            for influence in (None, Paced(("0",), 0.25))
        )
        for name in ("0.weight", "0.bias"):
            moved, wanted = part[name] - start[name], 0.25 * (whole[name] - start[name])
            torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(part["3.weight"], whole["3.weight"])


def test_a_rate_of_one_changes_nothing_and_the_whole_network_may_be_paced() -> None:
    whole, one = trained(None), trained(Paced(("",), 1.0))
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value)


def test_it_leaves_no_trace_and_goes_with_others() -> None:
    net = network().module
    parts = Together(Paced(("0", "1"), 0.0), Paced(("3",), 0.5))
    parts.attach(net)
    assert any(name.startswith("3.karui") for name, _ in net.named_buffers())
    parts.finish(net)
    assert [name for name, _ in net.named_buffers()] == [name for name, _ in network().module.named_buffers()]
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_a_killed_training_resumes_where_it_was(tmp_path: Path) -> None:
    paced = Paced(("0",), 0.3)

    class Killed(Influence):
        armed = True

        def constraints(self, module: nn.Module, moment: Any) -> None:
            if Killed.armed and moment.step == 5:
                raise KeyboardInterrupt

    training = Training(epochs=3, batch_size=32, optimizer=SGD(lr=0.1), schedule=Constant(), checkpoint_seconds=0.0)

    def run() -> dict[str, Any]:
        both = Together(paced, Killed())
        return fit(network(), data(), training=training, influence=both, checkpoints=tmp_path).module.state_dict()

    with pytest.raises(KeyboardInterrupt):
        run()
    Killed.armed = False
    resumed, straight = run(), fit(network(), data(), training=training, influence=paced).module.state_dict()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_wrong_settings_are_told() -> None:
    with pytest.raises(SettingError, match="rate"):
        Paced(("0",), -0.1)
    with pytest.raises(UsageError, match="'9'"):
        trained(Paced(("9",), 0.5))
