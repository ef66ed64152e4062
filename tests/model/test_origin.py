from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from karui.errors import ArtifactError, UsageError
from karui.model import Model, Origin, edit_from_json, edit_to_json, resolve

OWN = """
from dataclasses import dataclass
from torch import nn
import helper

@dataclass
class Sizes:
    width: int = 3

class Own(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes
        self.layer = nn.Linear(4, sizes.width)

    def forward(self, x):
        import late
        return self.layer(x) * helper.TWO

def make(width=3):
    return Own(Sizes(width))

def broken():
    raise RuntimeError("no luck\\ntoday")

def number():
    return 3

constant = 4
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("TWO = 2\n")
    (tmp_path / "late.py").write_text("")
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


@pytest.fixture(autouse=True)
def fresh_helpers() -> None:
    for name in ("helper", "late", "here", "lacks"):
        sys.modules.pop(name, None)


def test_a_file_with_classes_of_its_own(own: Path) -> None:
    origin = resolve(f"{own}:make", {"width": 5})
    assert origin.factory == f"{own.resolve()}:make"
    assert len(origin.sha256) == 64
    module = origin.replay(None, ())
    assert module.layer.out_features == 5
    assert copy.deepcopy(module).sizes == module.sizes
    assert type(origin.replay(None, ())) is type(module)


def test_an_edit_that_goes_through_json(own: Path) -> None:
    origin = resolve(f"{own}:make", {"width": 5})
    assert edit_from_json(json.loads(json.dumps(edit_to_json(origin)))) == origin
    assert origin.describe() == f"built by {own.resolve()}:make(width=5)"


def test_a_relative_file_is_kept_absolute(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    assert resolve("own.py:make").factory == f"{own.resolve()}:make"


@pytest.mark.slow
def test_a_fresh_process_elsewhere_builds_it(own: Path, tmp_path: Path) -> None:
    saved = json.dumps(edit_to_json(resolve(f"{own}:make", {"width": 5})))
    code = (
        "import json, sys; from karui.model import edit_from_json; "
        "print(type(edit_from_json(json.loads(sys.argv[1])).replay(None, ())).__name__)"
    )
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, saved],
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "Own"


def test_a_file_that_was_moved_with_its_project_is_found_where_one_starts(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, text = resolve(f"{own}:make"), own.read_text(encoding="utf-8")
    moved = tmp_path / "elsewhere" / own.name
    moved.parent.mkdir()
    own.rename(moved)
    monkeypatch.chdir(moved.parent)
    assert type(origin.replay(None, ())).__name__ == "Own"
    moved.write_text(f"{text}\n# another one\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not there any more"):
        origin.replay(None, ())


def test_a_file_that_is_gone(own: Path) -> None:
    origin = resolve(f"{own}:make")
    own.unlink()
    with pytest.raises(ArtifactError, match="not there any more") as caught:
        origin.replay(None, ())
    assert "base=" in caught.value.hint


def test_a_file_that_changed_is_told_and_read_anew(own: Path) -> None:
    origin = resolve(f"{own}:make")
    own.write_text(OWN.replace("width=3", "width=6"))
    with pytest.warns(UserWarning, match="has changed since the model was saved"):
        assert origin.replay(None, ()).layer.out_features == 6


def test_a_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here.py").write_text("from torch import nn\ndef net(): return nn.ReLU()\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(resolve("here:net").build(), nn.ReLU)
    assert sys.path == before


def test_a_class_is_a_factory_too() -> None:
    module = resolve("torch.nn:Linear", {"in_features": 4, "out_features": 2}).replay(None, ())
    assert isinstance(module, nn.Linear)


def test_a_factory_may_give_a_model(tmp_path: Path) -> None:
    file = tmp_path / "whole.py"
    file.write_text(
        "import torch, karui\nfrom torch import nn\nfrom karui.model import Model\n"
        "def make(): return Model(nn.ReLU(), example=(torch.zeros(1, 2),))\n"
    )
    origin = resolve(f"{file}:make")
    assert isinstance(origin.build(), Model)
    assert isinstance(origin.replay(None, ()), nn.ReLU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", r"'resnet' does not name a model.*package\.module:factory"),
        (":factory", "does not name a model"),
        ("missing.py:make", "There is no file missing.py"),
        ("nosuchpackage:make", "'nosuchpackage' is not there.*pip install nosuchpackage"),
        ("karui.model.nowhere:make", r"'karui\.model\.nowhere' is not there: 'karui' has no 'model\.nowhere'"),
        ("torch.nn:Linaer", "has no 'Linaer'. Did you mean Linear"),
        ("torch.nn:qqqqqq", r"has no 'qqqqqq'. There are: (\w+, ){7}\w+ and \d+ others\."),
        ("karui.model.origin:FORMS", "has a 'FORMS' that cannot be called"),
        ("os:system", "'os:system' is no factory of networks"),
        ("torch.hub:load", "is no factory of networks"),
        ("karui.model:torch.load", "does not name a factory"),
        ("torch.nn:Linear", r"does not take these settings: missing a required argument: 'in_features'.*It takes"),
    ],
)
def test_what_cannot_be_resolved_is_told_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


def test_failures_inside_a_file(own: Path) -> None:
    with pytest.raises(UsageError, match=r"has no 'mkae'. Did you mean make"):
        resolve(f"{own}:mkae")
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'size'.*It takes: width=3"):
        resolve(f"{own}:make", {"size": 3})
    with pytest.raises(UsageError, match=r"failed: RuntimeError: no luck Mend it there"):
        resolve(f"{own}:broken").build()
    with pytest.raises(UsageError, match=r"gives a int, not a torch.nn.Module"):
        resolve(f"{own}:number").build()
    with pytest.raises(UsageError, match="cannot be saved as JSON"):
        resolve(f"{own}:make", {"width": torch.zeros(1)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nosuchthing.inner", "needs 'nosuchthing', which is not installed. pip install nosuchthing"),
        ("def f(:", "failed: SyntaxError"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('usage: ...')", "failed: SystemExit: usage"),
    ],
)
def test_files_and_modules_that_do_not_import(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacks.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for spec in ("lacks.py:make", "lacks:make"):
        with pytest.raises(UsageError, match=message):
            resolve(spec)
        lies = str(tmp_path / "lacks.py")
        assert not any(
            n.startswith("_karui_file_") and getattr(m, "__file__", "") == lies for n, m in sys.modules.items()
        )


def test_replay_refuses_what_resolve_refuses() -> None:
    for factory in ("os:system", "subprocess:call", "builtins:exec", "torch:load", "nosuchpackage:make"):
        with pytest.raises(ArtifactError):
            Origin(factory, {}).replay(None, ())


@pytest.mark.external
@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_zoos(zoo: str) -> None:
    pytest.importorskip(zoo)
    module = resolve(f"{zoo}:resnet18", {"num_classes": 7}).replay(None, ())
    assert module.fc.out_features == 7
    with pytest.raises(UsageError, match=f"There is no model '{zoo}:resnet81'. Did you mean .*resnet18"):
        resolve(f"{zoo}:resnet81")


@pytest.mark.external
def test_a_network_for_segmentation_fetches_no_weights_of_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", pytest.fail)
    module = resolve("torchvision:lraspp_mobilenet_v3_large", {"num_classes": 3}).replay(None, ())
    assert module.classifier.low_classifier.out_channels == 3


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_a_zoo_that_is_not_installed(zoo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, zoo, None)
    with pytest.raises(UsageError, match=f"pip install {zoo}"):
        resolve(f"{zoo}:resnet18")
