"""Run the benchmarks: `python benchmarks/run.py [NAME ...]`; without a name, all of them, one after the other.

Each is a script of its own that compares interleaved, in one run, and writes `results/NAME.json`. One that lacks its
data or an optional package says so and exits with status 0. `python benchmarks/run.py --digest` runs none of them: it
words the lines that `karui show` tells anew, from the results that are kept.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"


def digests() -> dict[Path, str]:
    """What each file of results should hold, with the lines for `karui show` worded as its benchmark words them now."""
    sys.path.insert(0, str(HERE))
    told = {}
    for file in sorted(RESULTS.glob("*.json")):
        script = HERE / f"{file.stem}.py"
        if script.is_file() and "\ndef measured(" in script.read_text("utf-8"):
            values = json.loads(file.read_text("utf-8"))
            values["measured"] = importlib.import_module(file.stem).measured(values)
            told[file] = json.dumps(values, indent=1) + "\n"
    return told


def main(names: list[str]) -> int:
    """Run the named scripts; 1 if any of them failed."""
    if names == ["--digest"]:
        for file, text in digests().items():
            file.write_text(text, "utf-8")
        return 0
    known = sorted(file.stem for file in HERE.glob("*.py") if file.stem != "run" and not file.stem.startswith("_"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        status = subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode
        print(f"== {name}: {'failed' if status else 'done'} after {time.perf_counter() - started:.0f} s", flush=True)
        failed += [name] * bool(status)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
