"""What all benchmarks share: where results go, and how they are printed."""

import dataclasses
import datetime
import functools
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dmsec_jax.core.checks import require
from dmsec_jax.core.files import atomic_file, write_atomically
from dmsec_jax.metrics.extraction import seed_interval
from dmsec_jax.report.result import Row, device, row_over, versions

RESULTS = Path(__file__).parent / "results"


@functools.cache
def revision() -> str:
    """Short hash of the commit, `-dirty` if files differ from it, or `unknown` outside a checkout; as it was when first asked, so a run of hours
    asks at its start: that is the code it has loaded.
    """
    try:
        git = lambda *args: subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Of the host, for example `AMD EPYC, family 25, model 17`: virtual machines of one name can be generations, and a factor of two, apart. Where
    the system does not say (it is not Linux, or not x86), its architecture.
    """
    try:
        lines = path.read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not {"model name", "cpu family", "model"} <= said.keys():
        return platform.processor() or platform.machine()
    return f"{said['model name']}, family {said['cpu family']}, model {said['model']}"


def write(
    bench: str,
    rows: list[Row],
    config: dict,
    seconds: dict[str, float],
    notes: list[str],
    *,
    path: Path | None = None,
    done: bool = True,
) -> Path:
    """Writes one result file and, if the benchmark is done, prints its path and, last, one JSON line.

    Args:
        path: of an earlier call, whose file is replaced: a benchmark that is killed leaves the rows until then.
    """
    now = datetime.datetime.now(datetime.UTC)
    kind = jax.devices()[0].platform
    path = path or RESULTS / bench / kind / f"{now:%Y%m%d-%H%M%S}_{revision()}.json"
    content = {
        "schema": "dmsec-bench",
        "version": 1,
        "bench": bench,
        "git": revision(),
        "date": now.isoformat(timespec="seconds"),
        "device": device() | {"processor": processor()},
        "versions": versions(),
        "config": config,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": notes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    if done:
        print(f"\nresults: {path.relative_to(Path(__file__).parents[1])}")
        print(json.dumps({"bench": bench, "rows": len(rows), "file": str(path.name), "seconds": sum(seconds.values())}))
    return path


def kept(path: Path, settings: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `compute` gives, or gave in an earlier run with the same settings: an interrupted benchmark goes on.

    Raises:
        ValueError: if the file was made with other settings.
    """
    if path.is_file():
        with np.load(path) as stored:
            same = str(stored["settings"]) == settings
            require(same, str(path), "of these settings", "others", "remove it or change --work")
            return {name: stored[name] for name in stored.files if name != "settings"}
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(file, settings=settings, **found)
    return found


def over_seeds(results: list[dict]) -> list[Row]:
    """One row per case and method: the mean over seeds with its interval."""
    groups: dict[str, list[dict]] = {}
    for row in results:
        identity = {name: row[name] for name in ("bench", "metric", "unit", "method", "case")}
        groups.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    rows = []
    for identity, members in groups.items():
        values = [row["value"] for row in members]
        names = json.loads(identity)
        if any(value is None for value in values):  # a method that found no cluster in some run has no AS there
            rows.append(Row(value=None, n=len(values), **names))
        else:
            rows.append(row_over(seed_interval(values), **names))
    return rows


def figure(row: Row) -> str:
    """Value and interval for people; a dash where there is none."""
    if row.value is None:
        return "-"
    return f"{row.value:.3f}" if row.low is None else f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A plain text table with aligned columns."""
    widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
    show = lambda line: "  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    return "\n".join([show(header), show(["-" * width for width in widths]), *map(show, lines)])
