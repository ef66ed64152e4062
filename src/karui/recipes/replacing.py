"""A finished run in the folder that another is to go to: kept, unless its replacement was asked for."""

from __future__ import annotations

from pathlib import Path

from karui.errors import UsageError, require


def refuse_finished(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder with a finished run. Needs no torch: a wrong command costs nothing.

    Args:
        out: the folder of the run that is to come.
        resume: whether it goes on with what is there; whether that is the same run is found out later.
        overwrite: whether it replaces what is there.

    Raises:
        UsageError: there is a finished run, which would be lost; or both are given.
    """
    require(
        resume or overwrite or not (out / "run.json").is_file(),
        f"{out} holds a finished run, which would be lost.",
        "Give --out another folder, --overwrite to replace it, or --resume where it is the same run.",
        UsageError,
    )
    require(
        not (resume and overwrite),
        "--resume and --overwrite are both given.",
        "Give --resume to go on with the same run, --overwrite to replace it.",
        UsageError,
    )
