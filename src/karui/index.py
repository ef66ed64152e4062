"""What the source files offer, read without importing them.

A technique is found because its file lies in a room and carries a `Card` written as literals. Reading the syntax tree
keeps `karui list` and `--help` fast (torch is not imported), and lets a room export its techniques without a list that
somebody would have to edit.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOMS = ("architectures", "lowrank", "distill", "quantize", "search", "sparsify", "structured", "convolution", "survey")
DEPARTURE = "DEPARTURE:"
KINDS: dict[str, str] = {
    "build": "builds a network from nothing but the task",
    "replace": "replaces layers of a trained network",
    "cut": "scores units and cuts them out",
    "influence": "acts while a network trains",
    "data": "makes data, then trains on it",
    "trainings": "runs several trainings",
    "forward": "computes the same network in another way",
    "reader": "reads results; changes no network",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a technique: its name, type and default as written, and its line of the docstring."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A technique as its source file tells it.

    `card` holds the literal arguments of its `Card`, and `source` the whole file, which is parsed only when more is
    asked for: a list of all techniques needs their cards alone, and has to answer at once.
    """

    room: str
    module: str
    name: str
    card: dict[str, Any]
    source: str = field(repr=False)

    @property
    def text(self) -> str:
        """The file's docstring."""
        return ast.get_docstring(ast.parse(self.source)) or ""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings, in the order of the class."""
        found = (node for node in ast.parse(self.source).body if isinstance(node, ast.ClassDef))
        return next((_settings(node) for node in found if node.name == self.name), ())

    @property
    def slug(self) -> str:
        """Its name in recipes and on the command line."""
        return self.card["slug"]

    @property
    def path(self) -> str:
        """Its import path, `package.module:Class`."""
        return f"{self.module}:{self.name}"

    @property
    def departures(self) -> tuple[str, ...]:
        """Where it departs from the paper, and why."""
        blocks = self.text.split(DEPARTURE)[1:]
        return tuple(" ".join(block.split("\n\n")[0].split()) for block in blocks)

    def load(self) -> type:
        """The class itself (this imports its module)."""
        return getattr(importlib.import_module(self.module), self.name)


@cache
def techniques() -> tuple[Entry, ...]:
    """Every technique of every room, by survey number and slug."""
    root = Path(__file__).parent
    found = [
        entry
        for room in ROOMS
        for file in sorted((root / room).glob("*.py"))
        if not file.name.startswith("_")
        for entry in _read(room, file)
    ]
    return tuple(sorted(found, key=lambda entry: (entry.card["survey"], entry.slug)))


def _read(room: str, file: Path) -> list[Entry]:
    source = file.read_text(encoding="utf-8")
    module = f"karui.{room}.{file.stem}"
    return [Entry(room=room, module=module, name=name, card=card, source=source) for name, card in _cards(source)]


def _cards(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and card of each technique in a file, read without parsing the rest of it."""
    found = []
    for mark in re.finditer(r"^@(technique\(.*?)^(?:@\w[^\n]*\n)*class (\w+)", source, re.MULTILINE | re.DOTALL):
        decorator = ast.parse(mark[1].strip(), mode="eval").body
        call = decorator.args[0] if isinstance(decorator, ast.Call) else None
        if isinstance(call, ast.Call):
            found.append((mark[2], {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}))
    return found


def _settings(node: ast.ClassDef) -> tuple[Setting, ...]:
    told = _told(ast.get_docstring(node) or "")
    return tuple(
        Setting(
            name=line.target.id,
            type=ast.unparse(line.annotation),
            default=_default(line.value),
            text=told.get(line.target.id, ""),
        )
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(line.annotation)
    )


def _default(value: ast.expr | None) -> str:
    """A default as a person would write it: an empty mapping is not told by its factory."""
    if isinstance(value, ast.Call) and value.keywords and value.keywords[0].arg == "default_factory":
        factory = ast.unparse(value.keywords[0].value)
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory, f"{factory}()")
    return "" if value is None else ast.unparse(value)


def _told(docstring: str) -> dict[str, str]:
    """The lines under "Settings:" of a class docstring, by name."""
    told: dict[str, str] = {}
    name, inside = "", False
    for line in docstring.splitlines():
        if line.strip() == "Settings:":
            inside = True
        elif inside and not line.strip():
            break
        elif inside:
            head, _, rest = line.strip().partition(":")
            if head.isidentifier() and line.startswith("    ") and not line.startswith("        "):
                name, told[head] = head, rest.strip()
            elif name:
                told[name] += f" {line.strip()}"
    return told


def room(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room's package: each technique's class, imported when it is asked for.

    Example:
        >>> get, names = room("karui.sparsify")
        >>> "L1Filters" in names()
        True
    """
    short = package.rpartition(".")[2]

    def names() -> list[str]:
        return sorted(entry.name for entry in techniques() if entry.room == short)

    def get(name: str) -> Any:
        for entry in techniques():
            if entry.room == short and entry.name == name:
                return entry.load()
        raise AttributeError(f"'{package}' has no technique '{name}'; it has: {', '.join(names()) or 'none yet'}")

    return get, names


def lazy(package: str, exports: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names (name -> module) are imported when they are asked for."""

    def get(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(exports[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return get, names
