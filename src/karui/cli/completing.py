"""Shell completion of what people type most: names of techniques, architectures, data and chapters.

A shell asks on every press of a key, so only the catalogue is read; nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

DATA = ("digits", "folder:", "npz:")
PLACES = ("timm:", "torchvision:")
TASKS = ("classification", "regression")


def _matching(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]


def papers(incomplete: str) -> list[tuple[str, str]]:
    """Slugs and numbers of the survey's papers, each with the paper's title."""
    from karui.survey import catalogue

    names = [(name, row.title) for row in catalogue() for name in (row.slug, str(row.survey))]
    return list(dict.fromkeys(pair for pair in names if pair[0].startswith(incomplete)))


def chapters(incomplete: str) -> list[tuple[str, str]]:
    """Chapters of the survey, with their titles."""
    from karui.survey import CHAPTERS

    return [(name, title) for name, title in CHAPTERS.items() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """TOML files, or techniques; after a `+` the next technique, after a `:` or `,` the settings not given yet."""
    from karui.index import techniques

    before, plus, last = incomplete.rpartition("+")
    slug, colon, given = last.partition(":")
    entries = {entry.slug: entry for entry in techniques()}
    if colon and slug in entries:
        done, comma, start = given.rpartition(",")
        kept = {part.partition("=")[0] for part in done.split(",")}
        head = f"{before}{plus}{slug}:{done}{comma}"
        names = [setting.name for setting in entries[slug].settings if setting.name not in kept]
        return [f"{head}{name}=" for name in _matching(names, start)]
    found = [f"{before}{plus}{name}" for name in _matching(entries, last)]
    return found if plus else [*found, *_files(incomplete, ".toml")]


def models(incomplete: str) -> list[str]:
    """Architectures by name, files and directories of Python, and where public models come from."""
    from karui.architectures import factories

    return [*_matching((*factories(), *PLACES), incomplete), *_files(incomplete, ".py")]


def data(incomplete: str) -> list[str]:
    """Kinds of data; after `folder:` and `npz:` the paths there are."""
    kind, colon, path = incomplete.partition(":")
    if colon and kind in {"folder", "npz"}:
        return [f"{kind}:{found}" for found in _files(path, ".npz" if kind == "npz" else None)]
    return _matching(DATA, incomplete)


def tasks(incomplete: str) -> list[str]:
    """The tasks that have a name."""
    return _matching(TASKS, incomplete)


def _files(start: str, suffix: str | None) -> list[str]:
    """Directories, with a slash, and files of a suffix, whose path begins like this."""
    folder, _, name = start.rpartition("/")
    place = Path(folder or ("/" if start.startswith("/") else "."))
    head = start[: len(start) - len(name)]
    held = sorted(place.iterdir()) if place.is_dir() else []
    return [
        f"{head}{path.name}{'/' if path.is_dir() else ''}"
        for path in held
        if path.name.startswith(name) and not (path.name.startswith(".") and not name)
        if path.is_dir() or (suffix is not None and path.suffix == suffix)
    ]
