"""Edits: the replayable steps of a model's lineage.

An edit changes the *structure* of a module: a saved model is its lineage, replayed on the original network, and the
weights that are then read into it. So an edit is data (it goes to JSON and back), its replay looks at no weights and
runs no graph analysis that could decide otherwise the next time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import nn

from karui.errors import ArtifactError, did_you_mean


@runtime_checkable
class Edit(Protocol):
    """One step of a lineage: a frozen dataclass of JSON values with a `kind`."""

    kind: ClassVar[str]

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module | None:
        """Repeat the structural change; may edit `module` in place, and returns the module to go on with.

        `module` is None only for the first edit of a lineage, the `Origin`. Values of parameters do not matter.
        """
        ...

    def describe(self) -> str:
        """One line for a person: what was done."""
        ...


_KINDS: dict[str, type] = {}

E = TypeVar("E", bound=type)


def edit(cls: E) -> E:
    """Class decorator: make an edit known by its `kind`, so that a saved lineage can name it."""
    _KINDS[cls.kind] = cls
    return cls


def edit_to_json(step: Edit) -> dict[str, Any]:
    """The edit as JSON values, with its kind."""
    fields = dataclasses.fields(step)  # pyright: ignore[reportArgumentType]
    return {"kind": step.kind, **{f.name: getattr(step, f.name) for f in fields}}


def edit_from_json(values: dict[str, Any]) -> Edit:
    """The edit that `edit_to_json` wrote.

    Raises:
        UsageError: the kind is not known to this version.
        ArtifactError: the values do not fit the kind.
    """
    values = dict(values)
    kind = values.pop("kind", "")
    if kind not in _KINDS:
        did_you_mean(str(kind), list(_KINDS), "Edit kind", ArtifactError)
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise ArtifactError(f"The saved edit '{kind}' does not fit this version of karui: {error}.") from error


@edit
@dataclasses.dataclass(frozen=True)
class Note:
    """A step that changes values only: a training, a rescaling. Replays as nothing; told in the report."""

    kind: ClassVar[str] = "note"
    text: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module | None:
        """Nothing to repeat: the weights carry the change."""
        del example
        return module

    def describe(self) -> str:
        """The note itself."""
        return self.text
