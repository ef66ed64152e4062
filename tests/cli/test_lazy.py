"""Commands are loaded when they are called: nothing that help or a list has no use for is imported."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import typer

from karui.cli.app import Commands, app, run
from karui.cli.lazy import PlainCommand


@pytest.mark.parametrize("name", list(Commands.COMMANDS))
def test_a_command_is_described_as_its_function_says(name: str):
    command = Commands.COMMANDS[name]
    module, _, function = command.place.partition(":")
    text = inspect.getdoc(getattr(importlib.import_module(module), function))
    assert text is not None
    assert text.splitlines()[0] == command.help


@pytest.mark.parametrize("name", list(Commands.COMMANDS))
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]):
    assert run([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Usage: karui {name} " in told
    assert "--help" in told


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json"], ["list", "-c", "search"], ["show", "12"]]
)
def test_light_commands_load_neither_pydantic_nor_the_other_commands(arguments: list[str]):
    code = (
        f"import sys; from karui.cli.app import run; run({arguments});"
        "print([m for m in sys.modules if m == 'pydantic' or m.startswith('karui.recipes') or "
        "m in ('karui.cli.compressing', 'karui.cli.profiling', 'karui.cli.planning')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("plain", [True, False])
def test_plain_commands_read_their_words_as_typer_does(plain: bool):
    told: list[tuple[str | None, str, bool]] = []
    alone = typer.Typer(add_completion=False)

    def command(word: str, chapter: str | None = None, json: bool = typer.Option(False, "--json")) -> None:
        told.append((chapter, word, json))

    alone.command(cls=PlainCommand if plain else None)(command)
    parser = typer.main.get_command(alone)
    for words in (["a"], ["a", "--json"], ["--chapter", "c", "a"], ["--chapter=c", "--json", "--", "--a"], [""]):
        parser.main(words, standalone_mode=False)
    assert told == [(None, "a", False), (None, "a", True), ("c", "a", False), ("c", "--a", True), (None, "", False)]
    for words in ([], ["a", "b"], ["a", "--chapter"], ["a", "--wrong"]):
        with pytest.raises(Exception, match="Missing|unexpected extra|requires an argument|No such option"):
            parser.main(words, standalone_mode=False)


def test_a_command_with_a_typing_error_is_suggested(capsys: pytest.CaptureFixture[str]):
    assert run(["comprss"]) == 2
    assert "Did you mean 'compress'?" in capsys.readouterr().err
    assert isinstance(typer.main.get_command(app), Commands)
