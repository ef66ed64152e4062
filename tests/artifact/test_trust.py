"""What a crafted `model.json` may have called: nothing that does not build networks, nothing that came with it."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from karui.artifact import load, save
from karui.artifact.files import sealed
from karui.errors import ArtifactError
from karui.model import CustomTask, Model, Origin, resolve

Crafted = Callable[..., Path]


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.file),))


PACKAGE = {
    "library/__init__.py": "from library.reading import load\nfrom library.nets import make\n",
    "library/reading.py": """
import pickle
def load(filename):
    with open(filename, "rb") as file:
        return pickle.load(file)
""",
    "library/nets.py": """
import pickle
from functools import partial
from torch import nn
class Net(nn.Sequential):
    def __init__(self, width=3, file=""):
        super().__init__(nn.Linear(4, int(width)))
        if file:
            with open(file, "rb") as held:
                pickle.load(held)
def make(width=3): return Net(width)
narrow = partial(make, width=2)
""",
    "library/told.py": """
from __future__ import annotations
import torch
def build(width=3) -> torch.nn.Linear: return torch.nn.Linear(4, width)
def other(width=3): return torch.nn.Linear(4, width)
""",
}


@pytest.fixture
def crafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crafted:
    """A saved model whose file says that it is built by something else."""
    for name, text in PACKAGE.items():
        file = tmp_path / "site-packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] in {"library", "own", "m"}]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Mark(tmp_path / "owned")))

    def craft(factory: str, settings: Mapping[str, Any] | None = None) -> Path:
        folder = tmp_path / "m"
        origin = Origin("torch.nn:Linear", {"in_features": 4, "out_features": 3})
        torch.manual_seed(0)
        save(Model(nn.Linear(4, 3), example=(torch.zeros(1, 4),), lineage=(origin,)), folder, onnx=False)
        told = json.loads((folder / "model.json").read_text())
        told["lineage"][0].update(factory=factory, settings=dict(settings or {}))
        (folder / "model.json").write_bytes(sealed(told))
        return folder

    return craft


@pytest.mark.parametrize(
    ("factory", "settings", "message"),
    [
        ("joblib:load", {"filename": "evil.pkl"}, "Nothing tells that 'joblib:load' builds networks"),
        ("library:load", {"filename": "evil.pkl"}, "Nothing tells that 'library:load' builds networks"),
        ("library.reading:load", {"filename": "evil.pkl"}, "Nothing tells that"),
        ("library.nets:Net", {"file": "evil.pkl"}, "name a file, 'evil.pkl'"),
        ("library.nets:Net", {"file": "../evil.pkl"}, "name a file"),
        ("library.told:other", {}, "Nothing tells that"),
        ("karui.__main__:main", {}, "does not name a factory"),
        ("karui.cli.app:run", {"arguments": ["list"]}, "Nothing tells that"),
        ("karui.artifact:save", {}, "Nothing tells that"),
        ("torch.nn:Parameter", {}, "Nothing tells that"),
        ("own:load", {"filename": "evil.pkl"}, "Nothing tells that 'own:load' builds networks"),
        ("own.py:load", {"filename": "evil.pkl"}, "Nothing tells that"),
    ],
)
def test_what_does_not_build_networks_is_not_called(
    crafted: Crafted, tmp_path: Path, factory: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "own.py").write_text("import torch\nfrom library.reading import load\n")
    where = factory.replace("own.py", str(tmp_path / "own.py"))
    with pytest.raises(ArtifactError, match=message) as refused:
        load(crafted(where, settings))
    assert "model.json" in str(refused.value)
    assert not (tmp_path / "owned").exists()


def test_a_file_of_an_installed_package_is_no_file_of_ones_own(crafted: Crafted, tmp_path: Path) -> None:
    for file in (tmp_path / "site-packages" / "library" / "reading.py", Path(json.__file__)):
        with pytest.raises(ArtifactError, match="belongs to an installed package"):
            load(crafted(f"{file}:load", {"filename": "evil.pkl"}))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("factory", ["m.code:make", "m/code.py:make", "elsewhere/m/code.py:make"])
def test_code_that_comes_with_a_model_is_not_run(crafted: Crafted, tmp_path: Path, factory: str) -> None:
    """Also where it would be found as a file that was moved with its project."""
    folder = crafted("torch.nn:Linear")
    code = folder / "code.py"
    code.write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'owned')!r}).touch()\nfrom torch.nn import Linear as make\n"
    )
    told = json.loads((folder / "model.json").read_text())
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    where = factory if factory.startswith("m.") else f"{tmp_path}/{factory}"
    told["lineage"][0].update(factory=where, settings={}, sha256=digest)
    (folder / "model.json").write_bytes(sealed(told))
    with pytest.raises(ArtifactError, match="code that comes with a model is not run") as refused:
        load(folder)
    assert "base=net" in refused.value.hint
    assert not (tmp_path / "owned").exists()
    told["task"] = {"kind": "custom", "settings": {}, "loss": where, "scores": where}
    (folder / "model.json").write_bytes(sealed(told))
    if not where.startswith(f"{tmp_path}/elsewhere"):
        with pytest.raises(ArtifactError, match="code that comes with a model is not run"):
            load(folder, base=nn.Linear(4, 3))
    assert not (tmp_path / "owned").exists()


def test_nor_is_a_file_that_comes_with_it_given_to_code_of_ones_own(crafted: Crafted, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch, library.reading\ndef read(name): return library.reading.load(name)\n"
    )
    folder = crafted(f"{tmp_path / 'own.py'}:read", {"name": "m/evil.pkl"})
    (folder / "evil.pkl").write_bytes((tmp_path / "evil.pkl").read_bytes())
    with pytest.raises(ArtifactError, match=r"m/evil\.pkl lies in its own folder"):
        load(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("factory", "settings"),
    [
        ("torch.nn:Linear", {"in_features": 4, "out_features": 3}),
        ("library:make", {}),
        ("library.nets:make", {"width": 3}),
        ("library.nets:Net", {"width": "3"}),
        ("library.told:build", {}),
        ("karui.architectures.perceptron:perceptron", {"sizes": [4, 3]}),
    ],
)
def test_what_builds_networks_is_called(crafted: Crafted, factory: str, settings: dict[str, Any]) -> None:
    del crafted
    assert isinstance(resolve(factory, settings).build(), nn.Module)


def test_a_zoo_reads_no_checkpoint(crafted: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own way reads one with pickle."""
    given: dict[str, Any] = {}
    zoo = ModuleType("timm")
    vars(zoo).update(
        list_models=lambda: ["net"], create_model=lambda _name, **settings: given.update(settings) or nn.ReLU()
    )
    monkeypatch.setitem(sys.modules, "timm", zoo)
    for name in ("evil.pkl", "../evil.pkl"):
        with pytest.raises(ArtifactError, match="name a file"):
            load(crafted("timm:net", {"checkpoint_path": name}))
    resolve("timm:net", {"checkpoint_path": "later.pth", "pretrained": True}).build()
    assert given == {"checkpoint_path": "", "pretrained": False}


@pytest.mark.parametrize(
    "text",
    [
        "from torch import nn\ndef build(): return nn.Linear(4, 3)\n",
        "from library import make as build\n",
        "from library.nets import narrow as build\n",
        "from torch.nn import ReLU as build\n",
        "from functools import partial\nfrom torch import nn\nbuild = partial(nn.Linear, 4, 3)\n",
        "from library.nets import Net\nbuild = lambda: Net(3)\n",
        "import karui\nbuild = lambda: karui.load_anything\n",
        "def build() -> 'torch.nn.Module':\n    import torch\n    return torch.nn.ReLU()\nimport torch\n",
    ],
)
def test_code_of_ones_own_that_knows_torch_is_called(crafted: Crafted, tmp_path: Path, text: str) -> None:
    del crafted
    (tmp_path / "own.py").write_text(text)
    assert resolve(f"{tmp_path / 'own.py'}:build").factory.endswith("own.py:build")


def test_a_model_saved_beside_its_code_says_that_it_needs_a_base(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 3)\n")
    origin = resolve(f"{tmp_path / 'net.py'}:build")
    model = Model(nn.Linear(4, 3), example=(torch.zeros(1, 4),), lineage=(origin,))
    (warning,) = save(model, tmp_path, onnx=False).warnings
    assert "lies in its own folder" in warning
    with pytest.raises(ArtifactError, match="is not run"):
        load(tmp_path)
    again = load(tmp_path, base=nn.Linear(4, 3))
    assert torch.equal(again.module.get_parameter("weight"), model.module.get_parameter("weight"))


def test_a_task_whose_functions_lie_elsewhere_loads(tmp_path: Path) -> None:
    task = CustomTask(loss=nn.functional.mse_loss, scores=nn.functional.mse_loss)
    save(Model(nn.Linear(4, 3), example=(torch.zeros(1, 4),), task=task), tmp_path / "m", onnx=False)
    assert load(tmp_path / "m", base=nn.Linear(4, 3)).task == task
