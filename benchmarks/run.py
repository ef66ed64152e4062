"""Run the benchmarks: `python benchmarks/run.py [NAME ...]`; without a name, all of them, one after the other.

Each is a script of its own that compares interleaved, in one run, and writes `results/NAME.json`. One that lacks its
data or an optional package says so and exits with status 0.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main(names: list[str]) -> int:
    """Run the named scripts; 1 if any of them failed."""
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
