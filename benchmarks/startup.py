"""How long the command line takes to answer: each command against a bare `import typer, rich`, in turns, in one run.

The aim: `karui list` and `karui --help` in at most three times the bare import. Help is laid out by typer with rich's
Markdown, which takes as long as the bare import; a list is plain text.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from _common import run_installed

BARE = [sys.executable, "-c", "import typer, rich"]
COMMANDS = {
    "--help": ["--help"],
    "list": ["list"],
    "list --json": ["list", "--json"],
    "show": ["show", "l1_filter_pruning"],
}
LIMITED = ("--help", "list", "list --json")
ROUNDS = 21
LIMIT = 3.0


def seconds(command: list[str]) -> float:
    """Time of one start to its end."""
    started = time.perf_counter()
    run_installed(command)
    return time.perf_counter() - started


def main() -> int:
    """Measure, print, keep; 1 where a command is over the limit."""
    contestants = {"bare": BARE, **{name: [sys.executable, "-m", "karui", *words] for name, words in COMMANDS.items()}}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for command in contestants.values():
        seconds(command)  # the first start reads, and compiles, files that later ones find
    for number in range(ROUNDS):
        order = list(contestants)
        for name in order if number % 2 == 0 else reversed(order):
            times[name].append(seconds(contestants[name]))
    rows = {}
    for name in COMMANDS:
        ratios = sorted(a / b for a, b in zip(times[name], times["bare"], strict=True))
        rows[name] = {
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(times[name]) / statistics.median(times["bare"]),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
        low, high = rows[name]["ratio_quartiles"]
        print(f"{name:12} {rows[name]['seconds']:.3f} s, {rows[name]['ratio']:.2f}x bare ({low:.2f} to {high:.2f})")
    told = {"bare_seconds": statistics.median(times["bare"]), "limit": LIMIT, "rounds": ROUNDS, "commands": rows}
    results = Path(__file__).parents[1] / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(any(rows[name]["ratio"] > LIMIT for name in LIMITED))


if __name__ == "__main__":
    sys.exit(main())
