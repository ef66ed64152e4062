"""Loading: the original network where it has to be given, and everything that is refused because it is another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from karui.artifact import export, load, save
from karui.artifact.export import rounding
from karui.artifact.files import sealed
from karui.errors import ArtifactError
from karui.measuring.inference import tensors_of
from karui.model import Model, resolve

NETS = Path(__file__).with_name("nets.py")


def test_the_base_that_is_given_stays_as_it_is(tmp_path):
    model = Model(nn.Linear(4, 3), example=(torch.ones(2, 4),))
    save(model, tmp_path / "m", onnx=False)
    base = nn.Linear(4, 3)
    before = base.weight.clone()
    load(tmp_path / "m", base=base)
    assert torch.equal(base.weight, before)


def test_without_an_origin_the_base_is_asked_for(tmp_path):
    save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path / "m", onnx=False)
    with pytest.raises(ArtifactError, match=r"model\.json.*base=net"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (nn.Linear(4, 3, bias=False), "has no 'bias'"),
        (nn.Sequential(nn.Linear(4, 3)), "names differ"),
        (nn.Linear(4, 5), "shape"),
        ("a string", "base is a str"),
    ],
)
def test_another_base_is_refused(tmp_path, base, words):
    save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path / "m", onnx=False)
    with pytest.raises(ArtifactError, match=words):
        load(tmp_path / "m", base=base)


def test_a_network_that_computes_something_else_is_refused(tmp_path):
    """The same names and shapes, other code."""

    def net(activation):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 2))

    save(Model(net(nn.ReLU()), example=(torch.randn(2, 4),)), tmp_path / "m", onnx=False)
    load(tmp_path / "m", base=net(nn.ReLU()))
    with pytest.raises(ArtifactError, match="computes something else"):
        load(tmp_path / "m", base=net(nn.Sigmoid()))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_outputs_of_any_size_are_watched(tmp_path, scale):
    def net(sign):
        layer = nn.Linear(4, 3, bias=False)
        nn.init.constant_(layer.weight, scale)
        return nn.Sequential(layer, nn.Identity() if sign > 0 else nn.Hardtanh(-scale / 2, scale / 2))

    model = Model(net(1), example=(torch.ones(2, 4),))
    saved = save(model, tmp_path / "m")
    assert saved.verification.tolerance < 1e-2 * scale
    assert torch.equal(load(tmp_path / "m", base=net(1)).module(torch.ones(2, 4)), model.module(torch.ones(2, 4)))
    with pytest.raises(ArtifactError, match="computes something else"):
        load(tmp_path / "m", base=net(-1))


def test_outputs_that_are_only_rounding_do_not_stop_a_load(tmp_path):
    class Nothing(nn.Module):
        """Zero, but for the rounding of two sums."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 999))

        def forward(self, x):
            return (x @ self.weight - (x.flip(1) @ self.weight.flip(0)))[:, None]

    save(Model(Nothing(), example=(torch.randn(2, 999),)), tmp_path / "m", onnx=False)
    told = json.loads((tmp_path / "m" / "model.json").read_text())
    assert told["probe"][0]["noise"] > 0
    told["probe"][0]["values"] = [-value for value in told["probe"][0]["values"]]
    (tmp_path / "m" / "model.json").write_bytes(sealed(told))
    load(tmp_path / "m", base=Nothing())


def test_a_changed_factory_file_is_told(tmp_path):
    code = tmp_path / "mine.py"
    shutil.copy(NETS, code)
    origin = resolve(f"{code}:small")
    model = Model(origin.replay(None, ()).eval(), example=(torch.randn(2, 2, 5, 5),), lineage=(origin,))
    save(model, tmp_path / "m", onnx=False)
    code.write_text(code.read_text() + "\n\nEXTRA = 1\n")
    with pytest.warns(UserWarning, match=r"mine\.py has changed since"):
        back = load(tmp_path / "m")
    assert torch.equal(back.module(model.example[0]), model.module(model.example[0]))
    code.write_text(code.read_text().replace("self.up(torch.relu(", "self.up(torch.tanh("))
    with pytest.warns(UserWarning, match="has changed"), pytest.raises(ArtifactError, match="computes something else"):
        load(tmp_path / "m")
    code.unlink()
    with pytest.raises(ArtifactError, match=r"model\.json.*mine\.py.*base=net"):
        load(tmp_path / "m")


def test_a_later_format_is_refused_with_the_remedy(tmp_path):
    saved = save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path / "m", onnx=False)
    path = saved.folder / "model.json"
    told = json.loads(path.read_text())
    path.write_bytes(sealed({**told, "format": 2}))
    with pytest.raises(ArtifactError, match=r"model\.json is of format 2.*Update karui"):
        load(saved.folder)


def test_rounding_counts_what_last_digits_decide_between_two_levels() -> None:
    class Tie(nn.Module):
        """A sum that lies half way between two levels."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).round()

    x = torch.ones(3, 1)
    model = Model(Tie(), example=(x,))
    assert rounding(model, (x,), [model.module(x).detach()]) == 1
    smooth = Model(nn.Linear(1, 1), example=(x,))
    assert rounding(smooth, (x,), [smooth.module(x).detach()]) < 1e-4


def test_rounding_takes_no_copy_in_64_bits_unless_a_forward_minds(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[nn.Module] = []
    whole = export.doubled
    monkeypatch.setattr(export, "doubled", lambda module: (copies.append(module), whole(module))[1])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for net, count in (nn.Linear(8, 8), 0), (nn.LSTM(8, 8), 1):
        model = Model(net, example=(x,))
        with torch.no_grad():
            ours = tensors_of(net(x))
        assert 0 < rounding(model, (x,), ours) < 1e-5
        assert len(copies) == count
