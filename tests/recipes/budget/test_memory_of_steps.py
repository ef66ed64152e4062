"""Each step of a budget holds three copies of a network at most, whatever has them: parameters, plain tensors, doubles.

A point is cut of the dense network, cut again, saved, read again, and its training kept. Copies are counted by their
values, so one in double precision counts once; of a layer that is worked on another may be there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karui.artifact import load, save
from karui.errors import SurgeryError
from karui.model import Classification, Model, coupled_groups, remove_units
from karui.model import cut as cuts
from karui.train import checkpoint

LAYERS, LARGE = 9, 10_000
"""Layers of a network, and values of a tensor that is counted."""


class Held(TorchDispatchMode):
    """Values of large tensors that are there at once; those that share their memory are counted once."""

    def __init__(self, *models: Model) -> None:
        super().__init__()
        self.there: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most, self.models = 0, models

    def __enter__(self) -> Held:
        gc.collect()
        gc.freeze()  # so that what is made from here on is collected fast
        for model in self.models:
            for parameter in model.module.parameters():
                self.see(parameter)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.numel() >= LARGE:
                self.see(value)
        return made

    def see(self, value: Tensor) -> None:
        """Another tensor: only then can there be more than before."""
        place = value.untyped_storage()
        if place.nbytes() // value.element_size() >= LARGE:
            self.there[place._cdata] = (StorageWeakRef(place), place.nbytes() // value.element_size())
            if self._now() > self.most:
                gc.collect()  # what only a cycle keeps will go by itself
                self.most = max(self.most, self._now())

    def _now(self) -> int:
        self.there = {key: held for key, held in self.there.items() if not held[0].expired()}
        return sum(values for _, values in self.there.values())


class Frozen(nn.Module):
    """A network that the cut leaves in its graph form: its forward has a width as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(LAYERS))
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).view(-1, 8, 16).reshape(-1, 128).relu()
        return self.head(x)


def linear() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 4)), torch.randn(2, 128)


def images() -> tuple[nn.Module, Tensor]:
    """Convolutions, whose cut is proved on corners."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 3, 4, 1)]
    for _ in range(LAYERS):
        layers += [nn.Conv2d(48, 48, 3, 1, 1), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)), torch.randn(1, 3, 40, 40)


def frozen() -> tuple[nn.Module, Tensor]:
    return Frozen(), torch.randn(2, 128)


def lighter(model: Model, share: float) -> Model:
    return remove_units(model, {group.name: torch.arange(int(share * group.size)) for group in coupled_groups(model)})


def large(model: Model) -> int:
    return sum(p.numel() for p in model.module.parameters() if p.numel() >= LARGE)


@pytest.fixture(params=[linear, images, frozen], ids=lambda build: build.__name__)
def dense(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    build: Callable[[], tuple[nn.Module, Tensor]] = request.param
    net, example = build()
    return Model(net.eval(), example=(example,), task=Classification())


def test_values_are_counted():
    torch.manual_seed(0)
    model = Model(linear()[0], example=(torch.zeros(2, 128),))
    whole = large(model)
    with Held(model) as held:
        assert held.most == whole
        twin = model.copy().module
        assert held.most == 2 * whole
        views = [p.detach()[:] for p in twin.parameters()]
        assert held.most == 2 * whole
        del twin
        wide = [view.double() for view in views]
        assert held.most == 3 * whole
        del wide, views
        model.copy()
        assert held.most == 3 * whole


def test_a_cut_and_its_proof(dense: Model):
    whole = large(dense)
    with Held(dense) as held:
        lighter(dense, 0.1)
    assert held.most < 2.2 * whole, f"{held.most / whole:.2f} copies"


def test_a_cut_of_a_point_and_its_proof(dense: Model):
    whole, point = large(dense), lighter(dense, 0.1)
    assert large(point) > 0.75 * whole
    with Held(dense, point) as held:
        light = lighter(point, 0.1)
    assert large(light) < large(point)
    assert held.most < 2.9 * whole, f"{held.most / whole:.2f} copies"


def test_what_was_refused_is_not_held(monkeypatch: pytest.MonkeyPatch):
    """A cut that its own forward does not survive leaves nothing behind while the graph form is made."""
    torch.manual_seed(0)
    net, example = frozen()
    dense, seen = Model(net.eval(), example=(example,)), []
    whole, own = large(dense), cuts.capture_programs
    with Held(dense) as held:
        monkeypatch.setattr(cuts, "capture_programs", lambda *given: seen.append(held._now()) or own(*given))
        lighter(dense, 0.1)
    assert seen == [whole]


def test_a_refusal_still_tells_both_reasons(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net, example = frozen()

    def refused(*given: Any) -> Any:
        raise SurgeryError("There is no program.")

    monkeypatch.setattr(cuts, "capture_programs", refused)
    with pytest.raises(SurgeryError, match=r"own forward does not run after the cut.*There is no program"):
        lighter(Model(net.eval(), example=(example,)), 0.1)


def test_a_point_is_saved_and_read(dense: Model, tmp_path: Path):
    whole, point = large(dense), lighter(dense, 0.1)
    with Held(dense, point) as held:
        save(point, tmp_path / "point", onnx=False)
    assert held.most < 3 * whole, f"{held.most / whole:.2f} copies"
    with Held(dense) as held:
        back = load(tmp_path / "point", base=dense)
    assert held.most <= 3 * whole, f"{held.most / whole:.2f} copies"
    assert all(torch.equal(p, q) for p, q in zip(point.module.parameters(), back.module.parameters(), strict=True))


def test_a_checkpoint_is_written_as_it_stands(dense: Model, tmp_path: Path):
    tensors = checkpoint.module_tensors(dense.module)
    with Held(dense) as held:
        checkpoint.write(tmp_path / "training.safetensors", tensors, {})
    assert held.most == large(dense)
