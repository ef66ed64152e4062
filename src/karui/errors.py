"""Errors that say what was asked, where, and what to do about it.

Every error that karui raises for a person is a `KaruiError`: one clear line and, where there is one, a remedy. The
command line prints both and keeps the traceback for `--debug`.
"""

from __future__ import annotations

from typing import NoReturn


class KaruiError(Exception):
    """A mistake that a person can mend: `message` is one line, `hint` the remedy (may be empty)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip() if hint else message)
        self.message = message
        self.hint = hint


class SettingError(KaruiError):
    """A setting is out of range or unknown."""


class NeedError(KaruiError):
    """A technique needs something (data, labels, training, a teacher) that it was not given."""


class CaptureError(KaruiError):
    """A model's computation cannot be captured as a graph."""


class SurgeryError(KaruiError):
    """A cut or a replacement is not possible, or its proof failed."""


class DataError(KaruiError):
    """A data set cannot be used as given."""


class TrainingError(KaruiError):
    """A training had to stop."""


class DivergedError(TrainingError):
    """A training had to stop as its loss, or its network, is no longer finite."""


class ArtifactError(KaruiError):
    """A saved model is damaged, incomplete, or does not compute what it should."""


class UsageError(KaruiError):
    """The request cannot be understood: a model, a recipe or a name that does not exist."""


def require(condition: bool, message: str, hint: str = "", error: type[KaruiError] = SettingError) -> None:
    """Raise `error` with `message` and `hint` unless `condition` holds.

    Example:
        >>> require(0 <= 0.5 < 1, "ratio is 0.5; give a share in [0, 1)")
    """
    if not condition:
        raise error(message, hint)


def did_you_mean(
    word: str, choices: list[str], what: str, error: type[KaruiError] = UsageError, listing: str = ""
) -> NoReturn:
    """Raise `error` for an unknown `word`, naming the closest of the `choices`; if none is close, `listing` or all."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(close)}?" if close else listing or f"Known: {', '.join(sorted(choices)) or 'none'}."
    )
    raise error(f"{what} '{word}' is not known.", hint)


def told(value: object) -> str:
    """What a value is, for a message: "a tensor of shape (2, 3)", or its class.

    Example:
        >>> told({})
        'a dict'
    """
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"a tensor of shape {tuple(shape)}"
