"""The table of the matrix: one row per model, as Parquet and CSV, and as lines of JSON-like rows in memory.

Columns of integers and text are discrete: the same plan on the same machine gives the same, bit for bit. The cost of a row is in `COST`.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dmsec_jax.core.checks import fail
from dmsec_jax.core.files import write_atomically
from dmsec_jax.report import result

Row = dict[str, str | int | float]
COST = ("seconds_preparing", "seconds_training", "seconds_asking", "compilations")
"""Processor time, and programs that were compiled on the way: what the machine did, no result."""


def row(name: str, identity: dict, arrays: dict[str, np.ndarray]) -> Row:
    """One model: its hash, its settings, digests of its inputs, its figures and its cost."""
    parts = {kind: {} for kind in ("digest", "figure", "cost")}
    for key, value in arrays.items():
        kind, _, column = key.partition("/")
        if kind in parts:
            parts[kind][column] = value.item()
    return {"cell": name, **identity, **parts["digest"], **parts["figure"], **parts["cost"]}


def cost_row(rows: Sequence[Row]) -> result.Row:
    """Processor time of all models, whenever they were trained."""
    hours = sum(row[name] for row in rows for name in COST if name.startswith("seconds")) / 3600
    return result.Row(
        bench="matrix", metric="processor_time", method="all models", value=hours, n=len(rows), unit="hours", case={}
    )


def write(stem: Path, rows: Sequence[Row]) -> None:
    """`<stem>.csv` and `<stem>.parquet`, each whole or not at all.

    Raises:
        ImportError: without pyarrow, after the CSV was written.
    """
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    write_atomically(stem.with_suffix(".csv"), text.getvalue().encode())
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        message = f"{stem}.csv is written; for Parquet install pyarrow: pip install -e '.[parquet]'"
        raise ImportError(message) from error
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), stream, compression="zstd")
    write_atomically(stem.with_suffix(".parquet"), stream.getvalue())


def read(path: Path) -> list[Row]:
    """The rows of a `.csv` or `.parquet` that `write` wrote."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    if path.suffix != ".csv":
        raise fail(str(path), "a .csv or .parquet of the matrix", path.suffix, "check that it is the right file")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {name: _kind([one[name] for one in rows]) for name in rows[0]}
    return [{name: kinds[name](value) for name, value in one.items()} for one in rows]


def discrete(rows: Iterable[Row]) -> list[Row]:
    """The rows without floats and cost: what a second run must give exactly."""
    keep = lambda name, value: name not in COST and not isinstance(value, float)
    return [{name: value for name, value in one.items() if keep(name, value)} for one in rows]


def differing(rows: Iterable[Row], others: Iterable[Row]) -> dict[str, str]:
    """Hash of each model of `rows` that the other table has not, or tells apart in a discrete column -> what is different."""
    theirs, found = {row["cell"]: row for row in discrete(others)}, {}
    for mine in discrete(rows):
        other = theirs.get(mine["cell"], {})
        columns = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        if columns:
            changes = (f"{name} {mine.get(name)}, was {other.get(name)}" for name in columns)
            found[mine["cell"]] = "; ".join(changes) if other else "is not there"
    return found


def _kind(values: list[str]) -> type:
    """The narrowest of int, float and str that takes every value; floats are written with a point or an exponent."""
    for kind in (int, float):
        try:
            for value in values:
                kind(value)
        except ValueError:
            continue
        return kind
    return str
