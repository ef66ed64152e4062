"""Origin: the first edit of a lineage, which builds the network by calling the factory that it came from.

Loading a saved model imports and calls the factory that its origin names, as running the factory's own program would.
Names that can do other things than build a network (the standard library, torch outside torch.nn) are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import nn

from karui.errors import ArtifactError, KaruiError, UsageError, require
from karui.model.edits import edit
from karui.model.value import Model

FORMS = "Give package.module:factory, file.py:factory, timm:NAME or torchvision:NAME."
_NOT_FACTORIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "pip", "setuptools"}


@edit
@dataclasses.dataclass(frozen=True)
class Origin:
    """The factory that built the network, and its settings.

    Settings:
        factory: `package.module:factory`, `/absolute/file.py:factory`, `timm:NAME` or `torchvision:NAME`.
        settings: keyword arguments of the factory, JSON values.
        sha256: of the file, where the factory lies in one; a change since is told when the lineage is replayed.

    Example:
        >>> Origin("torch.nn:Linear", {"in_features": 4, "out_features": 2}).build()
        Linear(in_features=4, out_features=2, bias=True)
    """

    kind: ClassVar[str] = "origin"
    factory: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module:
        """The network as its factory builds it.

        Raises:
            ArtifactError: the factory cannot be found any more, or fails.
        """
        del module, example
        built = self.build(ArtifactError)
        return built.module if isinstance(built, Model) else built

    def build(self, error: type[KaruiError] = UsageError) -> nn.Module | Model:
        """What the factory gives: a module, or a model with its example inputs and task.

        Raises:
            UsageError: (or `error`) the factory cannot be found, fails, or gives something else.
        """
        factory = _load(self.factory, self.sha256, error)
        _check_call(self.factory, factory, self.settings, error)
        with _importable(_folder(self.factory)):
            try:
                built = factory(**self.settings)
            except KaruiError:
                raise
            except (Exception, SystemExit) as failure:  # a factory is foreign code and may raise anything
                raise error(f"The factory '{self.factory}' failed: {_told(failure)}") from failure
        require(
            isinstance(built, nn.Module | Model),
            f"The factory '{self.factory}' gives a {type(built).__name__}, not a torch.nn.Module.",
            "It must return the network, or a karui.Model.",
            error,
        )
        return built

    def describe(self) -> str:
        """Who built it, with what."""
        told = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"built by {self.factory}({told})"


def resolve(spec: str, settings: dict[str, Any] | None = None) -> Origin:
    """The origin that `spec` names, checked as far as can be without building the network.

    Args:
        spec: `package.module:factory` (the current folder is importable), `file.py:factory`, `timm:NAME` or
            `torchvision:NAME`; the last two without trained weights.
        settings: keyword arguments of the factory.

    Raises:
        UsageError: the spec has another form, what it names cannot be imported or is not there, or the settings do
            not fit.

    Example:
        >>> resolve("torch.nn:Linear", {"in_features": 4, "out_features": 2}).describe()
        'built by torch.nn:Linear(in_features=4, out_features=2)'
    """
    settings = dict(settings or {})
    where, colon, name = spec.rpartition(":")
    require(bool(colon and where and name), f"'{spec}' does not name a model.", FORMS, UsageError)
    sha256 = ""
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        require(path.is_file(), f"There is no file {where}.", FORMS, UsageError)
        spec, sha256 = f"{path}:{name}", _digest(path)
    try:
        json.dumps(settings)
    except TypeError as error:
        raise UsageError(f"The settings of '{spec}' cannot be saved as JSON: {error}.") from error
    _check_call(spec, _load(spec, sha256, UsageError), settings, UsageError)
    return Origin(spec, settings, sha256)


def load_callable(spec: str, error: type[KaruiError] = UsageError) -> Callable[..., Any]:
    """The function or class that `package.module:name` or `file.py:name` names.

    Raises:
        UsageError: (or `error`) it cannot be imported or is not there.

    Example:
        >>> load_callable("torch.nn:Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    where, colon, name = spec.rpartition(":")
    require(bool(colon and where and name), f"'{spec}' names no function.", "Write package.module:name.", error)
    return _load(f"{Path(where).expanduser().resolve()}:{name}" if where.endswith(".py") else spec, "", error)


def _load(spec: str, sha256: str, error: type[KaruiError]) -> Callable[..., Any]:
    where, _, name = spec.rpartition(":")
    if where in _ZOOS:
        return _ZOOS[where](_import(where, error), name, error)
    require(name.isidentifier(), f"'{spec}' does not name a factory.", FORMS, error)
    if where.endswith(".py"):
        module = _import_file(Path(where), sha256, error)
    else:
        allowed = where == "torch.nn" or where.partition(".")[0] not in _NOT_FACTORIES
        require(allowed, f"'{spec}' is no factory of networks.", FORMS, error)
        module = _import(where, error)
    factory = getattr(module, name, None)
    if callable(factory):
        return factory
    offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    what = f"has no '{name}'" if factory is None else f"has a '{name}' that cannot be called"
    raise error(f"'{where}' {what}.", _closest(name, offered))


def _check_call(spec: str, factory: Callable[..., Any], settings: dict[str, Any], error: type[KaruiError]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # built-in callables have none; the call itself will tell
        return
    try:
        signature.bind(**settings)
    except TypeError as failure:
        takes = ", ".join(str(part) for part in signature.parameters.values()) or "nothing"
        raise error(
            f"The factory '{spec}' does not take these settings: {failure}.", f"It takes: {takes}."
        ) from failure


def _import(name: str, error: type[KaruiError]) -> ModuleType:
    with _importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as failure:
            raise _missing(f"The module '{name}'", name, failure, error) from failure
        except (Exception, SystemExit) as failure:  # importing runs foreign code, which may raise anything
            raise error(f"Importing '{name}' failed: {_told(failure)}") from failure


def _missing(what: str, wanted: str, failure: ModuleNotFoundError, error: type[KaruiError]) -> KaruiError:
    lacking = (failure.name or "").partition(".")[0]
    if f"{wanted}.".startswith(f"{failure.name}."):
        if lacking == failure.name:
            return error(f"{what} is not there.", f"Start karui where it lies, or: pip install {lacking}")
        return error(f"{what} is not there: '{lacking}' has no '{(failure.name or '').partition('.')[2]}'.")
    return error(f"{what} needs '{failure.name}', which is not installed.", f"pip install {lacking}")


def _import_file(path: Path, sha256: str, error: type[KaruiError]) -> ModuleType:
    """The file as a module under a private name that depends on its path alone, so that its classes keep theirs."""
    if not path.is_file():
        raise error(
            f"The model was built by {path}, which is not there any more.",
            "Put the file back, or build the network yourself and give it: karui.load(folder, base=net).",
        )
    digest = _digest(path)
    if sha256 and digest != sha256:
        warnings.warn(f"{path} has changed since the model was saved; its network may be another one.", stacklevel=2)
    name = f"_karui_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    known = sys.modules.get(name)
    if known is not None and vars(known).get("__karui_sha256__") == digest:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018  (a .py file always has a loader)
    module = importlib.util.module_from_spec(spec)
    vars(module)["__karui_sha256__"] = digest
    sys.modules[name] = module
    with _importable(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as failure:  # the file is foreign code, which may raise anything
            del sys.modules[name]
            if isinstance(failure, ModuleNotFoundError):
                raise _missing(str(path), path.stem, failure, error) from failure
            raise error(f"Importing {path} failed: {_told(failure)}") from failure
    return module


def _timm(timm: ModuleType, name: str, error: type[KaruiError]) -> Callable[..., Any]:
    _known(f"timm:{name}", name, timm.list_models(), error)

    def create(**settings: Any) -> nn.Module:
        return timm.create_model(name, **{**settings, "pretrained": False})

    return create


def _torchvision(torchvision: ModuleType, name: str, error: type[KaruiError]) -> Callable[..., Any]:
    _known(f"torchvision:{name}", name, torchvision.models.list_models(), error)

    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    # Without its own, a network for segmentation or detection would fetch the weights of its backbone.
    untrained = dict.fromkeys(key for key in ("weights", "weights_backbone") if key in takes)

    def create(**settings: Any) -> nn.Module:
        return torchvision.models.get_model(name, **{**settings, **untrained})

    return create


_ZOOS: dict[str, Callable[[ModuleType, str, type[KaruiError]], Callable[..., Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def _known(spec: str, name: str, names: list[str], error: type[KaruiError]) -> None:
    require(name in names, f"There is no model '{spec}'.", _closest(name, names), error)


def _closest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    shown = ", ".join(close or sorted(names)[:8])
    return f"Did you mean {' or '.join(close)}?" if close else f"There are: {shown or 'none'}."


def _told(failure: BaseException) -> str:
    first = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {first[0]}" if first else type(failure).__name__


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _folder(spec: str) -> Path:
    where = spec.rpartition(":")[0]
    return Path(where).parent if where.endswith(".py") else Path.cwd()


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules that lie in `folder` be imported, as they are for a program that is started there."""
    importlib.invalidate_caches()  # a file written a moment ago is seen
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
