"""How long a row's program takes to trace and compile: with an empty folder for the persistent cache, and in a second process with that folder."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.throughput import timing
from dmsec_jax.report.result import Row

CACHES = ("empty", "filled")
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def measure(name: str, repeats: int, threads: int) -> list[Row]:
    """Medians over `repeats` pairs of processes."""
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for cache in CACHES:
                for metric, seconds in _child(name, folder).items():
                    taken.setdefault((metric, cache), []).append(seconds)
    op, shape, batch = name.split("/")
    rows = []
    for (metric, cache), seconds in taken.items():
        case = {"op": op, "shape": shape, "batch": int(batch), "cache": cache, "threads": threads}
        middle = timing.median(np.array(seconds))
        names = {"bench": "growth", "metric": metric, "unit": "seconds", "method": "ours", "n": repeats, "case": case}
        rows.append(Row(value=middle.value, low=middle.low, high=middle.high, **names))
    return rows


def _child(name: str, folder: str) -> dict[str, float]:
    """Metric -> seconds, of a process with this cache."""
    env = os.environ | KEEP_ALL | {"JAX_COMPILATION_CACHE_DIR": folder}
    command = [sys.executable, "-m", "benchmarks.throughput.compiling", name]
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str) -> None:
    """Builds one row and prints what that took."""
    from benchmarks.throughput import cases, rows

    (build,) = rows.chosen((name,), (int(name.rpartition("/")[2]),)).values()
    ours = cases.build(build())
    print(json.dumps({"compile_seconds": ours.compile_seconds, "trace_seconds": ours.trace_seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
