"""Commands that cost nothing until they are called: of the others the names and the lines of help are enough.

Typer would have every command's module imported, and make every option of every command, to run one of them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from karui.cli import screen


@dataclass(frozen=True)
class Command:
    """A command by its place, `module:function`, and the first line of its help.

    `plain`: all its arguments are texts and flags, so nothing has to be converted.
    """

    place: str
    help: str
    plain: bool = False

    def load(self, name: str) -> Any:
        """The command itself, for the parser."""
        module, _, function = self.place.partition(":")
        alone = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
        decorate = alone.command(name, cls=PlainCommand if self.plain else LoadedCommand)
        decorate(getattr(importlib.import_module(module), function))
        return typer.main.get_command(alone)


class LazyGroup(TyperGroup):
    """The group of all commands: lists them from what `COMMANDS` tells, and loads the one that is called."""

    COMMANDS: ClassVar[dict[str, Command]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, command in self.COMMANDS.items():
            self.add_command(TyperCommand(name, help=command.help), name)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before the command's name, and help."""
        parameters = super().get_params(ctx)
        for parameter in parameters:
            # Typer's own flags (help, completion) have no default, and to convert None it loads pydantic.
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that was asked for, in full; the ones that help and suggestions read have a name and a line."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.COMMANDS[name].load(name), rest


class LoadedCommand(TyperCommand):
    """A command whose results are alone on stdout."""

    def invoke(self, ctx: Any) -> Any:
        """Run it; what networks and data sets print on the way goes to stderr."""
        with screen.results_alone():
            return super().invoke(ctx)


class PlainCommand(LoadedCommand):
    """A command whose arguments are texts and flags.

    Typer converts every argument with pydantic, which takes longer to load than typer, rich and the catalogue together.
    A text needs no conversion; whatever else comes up (help, something missing, completion) goes the usual way.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fill `ctx.params` from the words of the command line."""
        given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        given = {name: value for name, value in given.items() if isinstance(value, str | bool)}
        known = {parameter.name for parameter in self.params}
        lacking = any(parameter.required and parameter.name not in given for parameter in self.params)
        if rest or lacking or ctx.resilient_parsing or not known.issuperset(given):
            return super().parse_args(ctx, args)
        ctx.params.update({p.name: given.get(p.name, p.default) for p in self.params if p.name is not None})
        ctx.args = []
        return []
