"""The command line. Nothing but typer is imported until a command needs it, so that help and lists answer at once."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 1 a goal was missed, 2 wrong usage, 3 a fault."""
    from karui.cli.app import run

    raise SystemExit(run(arguments))
