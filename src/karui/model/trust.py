"""Which callables a stored model may have called: those that build networks, and that did not come with it.

A saved model names its factory, and who wrote the file chose the name and the settings. So a callable must show that
it builds networks, and whatever is called may not have been sent along.
"""

from __future__ import annotations

import functools
import inspect
import sys
import sysconfig
import typing
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from karui.errors import ArtifactError, KaruiError, require
from karui.model.importing import ZOOS, moved
from karui.model.value import Model

NETWORKS = (nn.Module, Model)
_KNOWS_NETWORKS = frozenset({"torch", "torchvision", "timm", "transformers", "karui"})
_REMEDY = "Say what it returns (-> torch.nn.Module); or build the network yourself: karui.load(folder, base=net)."


def require_factory(
    spec: str, factory: Callable[..., Any], settings: Mapping[str, Any], error: type[KaruiError]
) -> None:
    """Refuse what does not show that it builds networks.

    Taken is a class of networks; a function that says it returns one; one that is written, in an installed package,
    beside a class of networks; and, in code of one's own, one in a module that knows torch. What counts is where it is
    written, not where the name was found. To installed code no setting may name a file, as some would read a pickle.

    Raises:
        UsageError: (or `error`) it is none of these.
    """
    if spec.rpartition(":")[0] in ZOOS:
        home, network = None, True
    else:
        made = factory.func if isinstance(factory, functools.partial) else factory
        home = sys.modules.get(str(getattr(made, "__module__", None)))
        network = issubclass(made, nn.Module) if isinstance(made, type) else _gives_network(made) or _of_networks(home)
    require(network, f"Nothing tells that '{spec}' builds networks, so it is not called.", _REMEDY, error)
    if _installed(home):
        named = [text for text in _texts(settings) if "/" in text or "\\" in text or Path(text).exists()]
        what = f"The settings of '{spec}' name a file, {', '.join(map(repr, named))}, which it is not given."
        require(not named, what, "Build the network yourself: karui.load(folder, base=net).", error)


def require_apart(spec: str, folder: Path, settings: Mapping[str, Any], sha256: str = "") -> None:
    """Refuse code, and files that settings name, which lie in the folder of the saved model: they may have been sent.

    Nothing is imported to find that out.

    Raises:
        ArtifactError: something lies there.
    """
    inside = [text for text in _texts(settings) if _within(Path(text), folder)]
    where = spec.rpartition(":")[0]
    if where.endswith(".py"):
        inside += [where] if _within(Path(where), folder) or _within(moved(Path(where), sha256), folder) else []
    else:
        inside += [where] if any(_within(place, folder) for place in _places(where)) else []
    require(
        not inside,
        f"The model is built by '{spec}', and {', '.join(inside)} lies in its own folder; code that comes with a model "
        "is not run.",
        "Keep it elsewhere, or build the network yourself: karui.load(folder, base=net).",
        ArtifactError,
    )


def installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, and is nobody's own code."""
    path = path.resolve()
    libraries = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(map(path.is_relative_to, libraries))


def _installed(home: ModuleType | None) -> bool:
    file = getattr(home, "__file__", None)
    return home is None or file is None or home.__name__.partition(".")[0] == "karui" or installed(Path(file))


def _gives_network(function: Callable[..., Any]) -> bool:
    """Whether a function's annotation says that it returns a network."""
    try:
        given = typing.get_type_hints(inspect.unwrap(function)).get("return")
    except (NameError, TypeError, AttributeError, SyntaxError, ValueError):
        return False
    return isinstance(given, type) and issubclass(given, NETWORKS)


def _of_networks(home: ModuleType | None) -> bool:
    """Whether a module is one of networks: an installed one defines some, one's own at least knows torch."""
    if home is None or home.__name__.partition(".")[0] == "karui":
        return False
    held = list(vars(home).values())
    if _installed(home):
        return any(isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == home.__name__ for v in held)
    origins = (v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in held)
    known = any(str(origin).partition(".")[0] in _KNOWS_NETWORKS for origin in origins)
    return known or any(isinstance(v, type) and issubclass(v, nn.Module) for v in held)


def _texts(value: Any) -> list[str]:
    """Every text within plain values."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) and value else []


def _within(path: Path, folder: Path) -> bool:
    try:
        path, folder = path.expanduser().resolve(), folder.resolve()
        return path.exists() and path.is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):  # no name of a file at all
        return False


def _places(module: str) -> list[Path]:
    """The files and folders that importing a module would read, found without importing anything."""
    found: list[Path] = []
    path, name = [str(Path.cwd()), *sys.path], ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            break
        path = list(spec.submodule_search_locations or ())
        found += [Path(place) for place in ([spec.origin] if spec.origin and spec.has_location else path)]
    return found
