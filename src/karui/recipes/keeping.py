"""What runs have in common: a folder that is ours, records in it, and marks that tell whether a part is done.

A mark is a digest of all that decides a result. A part whose record carries the mark it would have now is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from karui.artifact.describe import task_to_json
from karui.artifact.files import JSON, OURS, read, sealed, unsealed, write_file
from karui.errors import ArtifactError, UsageError, require
from karui.measuring.values import to_json
from karui.model import edit_to_json
from karui.recipes.values import settings
from karui.train.fingerprint import fingerprint

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

FORMAT = 1
RECORD = "run.json"
STEPS, CHECKPOINTS, DENSE, POINTS = "steps", "checkpoints", "dense", "points"
PAGE = "report.html"
OWN = frozenset({*OURS, STEPS, CHECKPOINTS, DENSE, POINTS, RECORD, PAGE})
"""What a run's folder may hold; anything else is somebody's, and the folder is refused."""

Tell = Callable[[str], None]


def quiet(text: str) -> None:
    """Tell nobody."""
    del text


def refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds anything else than a run."""
    held = list(out.iterdir()) if out.is_dir() else []
    strangers = sorted(path.name for path in held if path.name not in OWN and not _cut_off(path.name))
    require(
        not strangers and (not out.exists() or out.is_dir()),
        f"{out} is no folder of a run: it holds {', '.join(strangers[:3]) or 'a file'}.",
        "Give --out a new folder, or the folder of an earlier run.",
        UsageError,
    )


def _cut_off(name: str) -> bool:
    """Whether a file is what a killed process was about to write in place of one of a run."""
    found = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return found is not None and found[1] in OWN


def claim(out: Path, resume: bool) -> None:
    """Make the folder, empty of an earlier run unless that is to go on.

    Its record goes first: a process that is killed in between, or later, leaves none that tells of what is gone.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {out} cannot be made: {error.strerror}.", "Give --out another one.") from error
    for path in out.iterdir():
        if _cut_off(path.name):
            path.unlink()
    if not resume:
        if (out / RECORD).is_file():
            for name in (RECORD, *OURS, PAGE):
                (out / name).unlink(missing_ok=True)
        for name in (STEPS, CHECKPOINTS, POINTS):
            shutil.rmtree(out / name, ignore_errors=True)


def version() -> str:
    """The version of karui."""
    from karui import __version__

    return __version__


def identity_of(model: Model) -> str:
    """A digest of the model: its lineage, its task, and every tensor."""
    told = [*(edit_to_json(edit) for edit in model.lineage), task_to_json(model.task)[0]]
    found = hashlib.sha256(json.dumps(told, default=str).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def told_data(bench: Bench) -> list[str]:
    """What tells one data set from another: every value of those held in memory, a spread of samples of others."""
    return [fingerprint(split) for split in (bench.train, bench.validation, bench.test)]


def digest_of(*parts: Any) -> str:
    """A digest of values that JSON knows, and of the text of others."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


LEARNED_FROM = frozenset({"teacher", "partners", "unlabelled"})
"""Settings that name what a technique learns from, by file. Those that a technique may write itself are not among
them: a record that a killed run has left would undo its own work."""


def contents_of(told: Any, *, named: bool = False) -> list[str]:
    """Digests of the files that settings name as teachers or as data, in order: a changed file is another teacher.

    Args:
        told: plain values, as of a step's settings; looked through at any depth.
        named: whether a text may be the name of a file, as within one of `LEARNED_FROM`.

    Of `file.py:factory` the file counts, not what it reads in turn; of a saved model's folder, its model files.
    """
    if isinstance(told, dict):
        return [one for key, part in told.items() for one in contents_of(part, named=named or key in LEARNED_FROM)]
    if isinstance(told, list | tuple):
        return [one for part in told for one in contents_of(part, named=named)]
    if not (named and isinstance(told, str)):
        return []
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in _files(told)]


def _files(named: str) -> list[Path]:
    """The files behind a text such as `x.onnx`, `folder`, `file.py:factory`, or `npz:pool.npz?key=x`."""
    before, colon, after = named.partition("?")[0].partition(":")
    candidates = [named, before, after] if colon else [named]
    found = next((path for text in candidates if text and (path := Path(text).expanduser()).exists()), None)
    if found is None:
        return []
    return [found] if found.is_file() else sorted(file for file in found.glob("model.*") if file.is_file())


def mark_of(model: Model, bench: Bench, asked: Any) -> str:
    """The mark of a whole run: the model, the data, the seed, how is trained and under what, and what was asked for."""
    acting = [] if bench.influence is None else [fingerprint(bench.influence)]
    return digest_of(FORMAT, identity_of(model), told_data(bench), bench.seed, settings(bench.training), asked, *acting)


def finished(out: Path, mark: str, tell: Tell) -> dict[str, Any] | None:
    """The record of a run of this mark that reached its end; None where there is none, or some of what it tells of is
    gone: the run then goes on with what is left.

    Raises:
        UsageError: a run of another mark reached its end there, or one whose record cannot be read.
    """
    if not (out / RECORD).is_file():
        return None
    done = read_record(out / RECORD)
    require(
        done is not None and done.get("mark") == mark,
        f"{out} holds a finished run of something else (recipe or budget, model, data, seed or training), which would "
        "be lost.",
        "Give --out another folder, or --overwrite in place of --resume to replace it.",
        UsageError,
    )
    assert done is not None  # noqa: S101  (refused above)
    if gone := _gone(out, done):
        tell(f"this run was finished before, and {', '.join(gone[:3])} of it is gone: made anew")
        (out / RECORD).unlink()
        return None
    tell("this run was finished before; nothing is repeated")
    return done


def _gone(out: Path, done: Mapping[str, Any]) -> list[str]:
    """What a record tells of and the folder does not hold: files of the model, and points."""
    points = done.get("budget", {}).get("points", [])
    told = [*done.get("files", {}), *(str(Path(point["folder"]) / JSON) for point in points)]
    return [name for name in told if not (out / name).is_file()]


def left_of_another(out: Path, mine: list[str]) -> str:
    """For a run that goes on: what an unfinished one of something else has left, besides `mine`; "" for nothing."""
    folders = sorted((out / STEPS).iterdir()) if (out / STEPS).is_dir() else []
    others = [path.name for path in folders if path.name not in mine and (path / RECORD).is_file()]
    if not others:
        return ""
    which = ", ".join(others)
    return f"{which} in {out / STEPS}: of another recipe, model, data, seed or training, so not gone on from"


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or it is not, byte for byte, the one that was written."""
    try:
        return unsealed(read(path), path, ordered=True)
    except ArtifactError:
        return None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its digest; a reader sees the old one or the new one. What is not finite becomes null."""
    write_file(path, sealed(to_json(record), ordered=True))


def replayable(model: Model) -> bool:
    """Whether a saved model can be loaded without the network that it was made from."""
    return bool(model.lineage) and model.lineage[0].kind == "origin"
