"""Origin: the first edit of a lineage, which builds the network by calling the factory that it came from.

Loading a saved model imports and calls the factory that its origin names, as running the factory's own program would.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from karui.errors import ArtifactError, KaruiError, UsageError, require
from karui.model.edits import edit
from karui.model.importing import FORMS, SEE, digest, find_factory, importable, told_of
from karui.model.trust import installed, require_factory
from karui.model.value import Model


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
            UsageError: (or `error`) the factory cannot be found, does not show that it builds networks, fails, or gives
                something else.
        """
        factory = _found(self.factory, self.settings, self.sha256, error)
        with importable(_folder(self.factory)):
            try:
                built = factory(**self.settings)
            except KaruiError:
                raise
            except (Exception, SystemExit) as failure:  # a factory is foreign code and may raise anything
                raise error(f"The factory '{self.factory}' failed: {told_of(failure)}", SEE) from failure
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
        UsageError: the spec has another form, what it names cannot be imported, is not there, or does not show that it
            builds networks; or the settings do not fit.

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
        spec, sha256 = f"{path}:{name}", digest(path)
    try:
        json.dumps(settings)
    except TypeError as error:
        raise UsageError(f"The settings of '{spec}' cannot be saved as JSON: {error}.") from error
    _found(spec, settings, sha256, UsageError)
    return Origin(spec, settings, sha256)


def _found(spec: str, settings: dict[str, Any], sha256: str, error: type[KaruiError]) -> Callable[..., Any]:
    """The factory, which builds networks by all that can be seen, and takes these settings."""
    where = spec.rpartition(":")[0]
    own = not where.endswith(".py") or not installed(Path(where))
    require(own, f"{where} belongs to an installed package.", "Give package.module:factory.", error)
    factory = find_factory(spec, sha256, error)
    require_factory(spec, factory, settings, error)
    _check_call(spec, factory, settings, error)
    return factory


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


def _folder(spec: str) -> Path:
    where = spec.rpartition(":")[0]
    return Path(where).parent if where.endswith(".py") else Path.cwd()
