"""Plain values as TOML text; the standard library reads TOML and does not write it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def value(plain: Any) -> str:
    r"""One value, on one line.

    Example:
        >>> value({"lr": 0.1, "steps": [1, 2], "name": 'a "b"'})
        '{ lr = 0.1, steps = [1, 2], name = "a \\"b\\"" }'
    """
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, float):
        return repr(plain) if math.isfinite(plain) else str(plain)
    if isinstance(plain, int):
        return str(plain)
    if isinstance(plain, str):
        # TOML's basic strings escape as JSON's do, but for the delete character, which JSON leaves bare.
        return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(plain, Mapping):
        inside = ", ".join(f"{key(name)} = {value(item)}" for name, item in plain.items())
        return f"{{ {inside} }}" if inside else "{}"
    return f"[{', '.join(map(value, plain))}]"


def key(name: str) -> str:
    """A key: bare where TOML allows it, quoted otherwise."""
    return name if _BARE.fullmatch(name) else value(name)


def table(head: str, plain: Mapping[str, Any]) -> str:
    """A table with its head line.

    Example:
        >>> print(table("[[step]]", {"technique": "tucker2"}), end="")
        [[step]]
        technique = "tucker2"
    """
    return "".join([f"{head}\n", *(f"{key(name)} = {value(item)}\n" for name, item in plain.items())])
