"""Importing what a person names: `package.module:name`, `file.py:name`, or a model of timm or torchvision.

Names that can do other things than build a network (the standard library, torch outside torch.nn) are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from karui.errors import KaruiError, UsageError, require

FORMS = "Give package.module:factory, file.py:factory, timm:NAME or torchvision:NAME."
_PRIVATE = "_karui_file_"
"""Begins the name of a module that was read from a file."""
_NOT_FACTORIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "pip", "setuptools"}

SEE = "Mend it there; with --debug the command tells the line."
"""The remedy where foreign code raises."""


def load_callable(spec: str, error: type[KaruiError] = UsageError) -> Callable[..., Any]:
    """The function or class that `package.module:name` or `file.py:name` names.

    Raises:
        UsageError: (or `error`) it cannot be imported or is not there.

    Example:
        >>> load_callable("torch.nn:Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    return find_factory(_absolute(spec, "names no function", error), "", error)


def load_object(spec: str, error: type[KaruiError] = UsageError) -> Any:
    """What `package.module:name` or `file.py:name` names, callable or not.

    Raises:
        UsageError: (or `error`) it cannot be imported or is not there.

    Example:
        >>> load_object("torch.nn:Linear")
        <class 'torch.nn.modules.linear.Linear'>
    """
    module, name = _module(_absolute(spec, "names no object", error), "", error)
    found = getattr(module, name, None)
    if found is None:
        raise error(f"'{spec.rpartition(':')[0]}' has no '{name}'.", _closest(name, _offered(module)))
    return found


def file_of(module: str) -> str:
    """The file behind a module that `file.py:name` has imported; empty for any other module.

    Example:
        >>> file_of("torch.nn")
        ''
    """
    held = sys.modules.get(module)
    return str(held.__file__) if held is not None and module.startswith(_PRIVATE) else ""


def _absolute(spec: str, otherwise: str, error: type[KaruiError]) -> str:
    where, colon, name = spec.rpartition(":")
    require(bool(colon and where and name), f"'{spec}' {otherwise}.", "Write package.module:name.", error)
    if not where.endswith(".py"):
        return spec
    path = Path(where).expanduser().resolve()
    require(path.is_file(), f"There is no file {where}.", "Give the path of a file that there is.", error)
    return f"{path}:{name}"


def find_factory(spec: str, sha256: str, error: type[KaruiError]) -> Callable[..., Any]:
    """The factory that an origin names; `sha256` is of its file, so that a change since is told.

    Raises:
        UsageError: (or `error`) it cannot be imported or is not there.
    """
    where, _, name = spec.rpartition(":")
    if where in ZOOS:
        return ZOOS[where](_import(where, error), name, error)
    module, name = _module(spec, sha256, error)
    factory = getattr(module, name, None)
    if callable(factory):
        return factory
    what = f"has no '{name}'" if factory is None else f"has a '{name}' that cannot be called"
    raise error(f"'{where}' {what}.", _closest(name, [key for key in _offered(module) if callable(vars(module)[key])]))


def _module(spec: str, sha256: str, error: type[KaruiError]) -> tuple[ModuleType, str]:
    """The imported module of `module:name` or `/absolute/file.py:name`, and the name."""
    where, _, name = spec.rpartition(":")
    plain = name.isidentifier() and not any(part.startswith("__") for part in where.split("."))
    require(plain, f"'{spec}' does not name a factory.", FORMS, error)
    if where.endswith(".py"):
        return _import_file(Path(where), sha256, error), name
    allowed = where == "torch.nn" or where.partition(".")[0] not in _NOT_FACTORIES
    require(allowed, f"'{spec}' is no factory of networks.", FORMS, error)
    return _import(where, error), name


def _offered(module: ModuleType) -> list[str]:
    return [key for key in vars(module) if not key.startswith("_")]


def _import(name: str, error: type[KaruiError]) -> ModuleType:
    with importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as failure:
            raise _missing(f"The module '{name}'", name, failure, error) from failure
        except (Exception, SystemExit) as failure:  # importing runs foreign code, which may raise anything
            raise error(f"Importing '{name}' failed: {told_of(failure)}", SEE) from failure


def _missing(what: str, wanted: str, failure: ModuleNotFoundError, error: type[KaruiError]) -> KaruiError:
    lacking = (failure.name or "").partition(".")[0]
    if f"{wanted}.".startswith(f"{failure.name}."):
        if lacking == failure.name:
            return error(f"{what} is not there.", f"Start karui where it lies, or: pip install {lacking}")
        return error(f"{what} is not there: '{lacking}' has no '{(failure.name or '').partition('.')[2]}'.")
    return error(f"{what} needs '{failure.name}', which is not installed.", f"pip install {lacking}")


def moved(path: Path, sha256: str) -> Path:
    """Where a file lies under the working directory, if it is the same one: a project may be moved or cloned."""
    for start in range(1, len(path.parts)):
        here = Path.cwd().joinpath(*path.parts[start:])
        if sha256 and here.is_file() and digest(here) == sha256:
            return here
    return path


class _FromSource(SourceFileLoader):
    """Compiles what the file holds now. Kept bytecode of a file of that size and second may be of another content."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the module."""
        return self.source_to_code(self.get_data(self.get_filename(fullname)), self.path)


def _import_file(path: Path, sha256: str, error: type[KaruiError]) -> ModuleType:
    """The file as a module under a private name that depends on its path alone, so that its classes keep theirs."""
    path = path if path.is_file() else moved(path, sha256)
    if not path.is_file():
        raise error(
            f"The model or its task needs {path}, which is not there any more.",
            "Put the file back or start where it lies now, unchanged; or build the network yourself and give it: "
            "karui.load(folder, base=net).",
        )
    content = digest(path)
    if sha256 and content != sha256:
        warnings.warn(f"{path} has changed since the model was saved; its network may be another one.", stacklevel=2)
    name = f"{_PRIVATE}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    known = sys.modules.get(name)
    if known is not None and vars(known).get("__karui_sha256__") == content:
        return known
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018  (a .py file always has a loader)
    module = importlib.util.module_from_spec(spec)
    vars(module)["__karui_sha256__"] = content
    sys.modules[name] = module
    with importable(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as failure:  # the file is foreign code, which may raise anything
            del sys.modules[name]
            if isinstance(failure, ModuleNotFoundError):
                raise _missing(str(path), path.stem, failure, error) from failure
            raise error(f"Importing {path} failed: {told_of(failure)}", SEE) from failure
    return module


def _timm(timm: ModuleType, name: str, error: type[KaruiError]) -> Callable[..., Any]:
    _known(f"timm:{name}", name, timm.list_models(), error)

    def create(**settings: Any) -> nn.Module:
        return timm.create_model(name, **{**settings, "pretrained": False, "checkpoint_path": ""})

    return create


def _torchvision(torchvision: ModuleType, name: str, error: type[KaruiError]) -> Callable[..., Any]:
    _known(f"torchvision:{name}", name, torchvision.models.list_models(), error)

    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    # Without its own, a network for segmentation or detection would fetch the weights of its backbone.
    untrained = dict.fromkeys(key for key in ("weights", "weights_backbone") if key in takes)

    def create(**settings: Any) -> nn.Module:
        return torchvision.models.get_model(name, **{**settings, **untrained})

    return create


ZOOS: dict[str, Callable[[ModuleType, str, type[KaruiError]], Callable[..., Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
}


def _known(spec: str, name: str, names: list[str], error: type[KaruiError]) -> None:
    require(name in names, f"There is no model '{spec}'.", _closest(name, names), error)


def _closest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    shown, more = ", ".join(sorted(names)[:8]), len(names) - 8
    return f"There are: {shown or 'none'}{f' and {more} others' if more > 0 else ''}."


def told_of(failure: BaseException) -> str:
    """The kind and first line of an error of foreign code."""
    first = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {first[0]}" if first else type(failure).__name__


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules that lie in `folder` be imported, as they are for a program that is started there."""
    importlib.invalidate_caches()  # a file written a moment ago is seen
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
