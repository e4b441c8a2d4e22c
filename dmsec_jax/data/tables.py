"""Tables of numbers with named columns, from files and from data frames, checked so that an error names the column and the cure.

    .csv, .tsv, .txt   a header, then numbers; separated by comma, semicolon or tab
    .parquet           needs pyarrow
    .npy               [N, V]; columns are called x0, x1, ...

An empty cell, NA, NaN, null and None are missing values.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import open_file

MISSING = {"", "na", "nan", "n/a", "null", "none", "?"}
SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".npy")
MIN_ROWS, MIN_COLUMNS = 10, 3


class Table(NamedTuple):
    """Column names, and values in which NaN is missing."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "N V"]


def read(path: str | Path) -> Table:
    """Reads a file by its suffix.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: on another suffix, an empty file, columns that are not numbers (named), rows of another length, or names twice.
        ImportError: with the cure, on Parquet without pyarrow.
    """
    path = Path(path)
    require(path.suffix.lower() in SUFFIXES, str(path), f"one of {', '.join(SUFFIXES)}", path.suffix, "convert it")
    if path.suffix.lower() == ".npy":
        with open_file(path) as file:
            try:
                return of(np.load(file, allow_pickle=False))
            except (ValueError, EOFError, MemoryError, BadZipFile) as error:  # a header may claim any size
                raise fail(str(path), "an array of numbers [N, V]", str(error)[:200], "save it with np.save") from error
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)


def of(data: Any, names: tuple[str, ...] | None = None) -> Table:
    """A table of an array [N, V], or of a data frame (pandas, polars or alike), whose column names are kept.

    Raises:
        ValueError: on another shape, columns that are not numbers (named), or names twice.
    """
    if hasattr(data, "columns"):
        names = tuple(map(str, data.columns))
        columns = [np.asarray(data[name]) for name in data.columns]
    else:
        array = np.asarray(data)
        require(array.ndim == 2, "data", "[N, V]", f"shape {array.shape}", "one row per observation")
        columns = list(array.T)
        names = tuple(f"x{i}" for i in range(len(columns))) if names is None else tuple(map(str, names))
    known = len(names) == len(columns)
    require(known, "names", f"one for each of {len(columns)} columns", len(names), "name every column")
    return _table(names, [_numbers(column) for column in columns])


def without_missing(table: Table) -> Table:
    """The table without the rows in which a value is missing."""
    return table._replace(values=table.values[~np.isnan(table.values).any(axis=1)])


def check(table: Table) -> None:
    """Requires what a graph can be learnt from.

    Raises:
        ValueError: on fewer than `MIN_COLUMNS` columns or `MIN_ROWS` rows, missing or infinite values, columns without variation, and columns that
            say the same; each names the columns.
    """
    names, values = table
    rows, columns = values.shape
    cure = "of two columns the data tell only whether they are correlated"
    require(columns >= MIN_COLUMNS, "data", f"of at least {MIN_COLUMNS} columns", columns, cure)
    missing = np.isnan(values).sum(axis=0)
    listed = ", ".join(f"{names[i]} ({missing[i]} of {rows})" for i in np.flatnonzero(missing))
    require(not missing.any(), "data", "complete", f"missing values in {listed}", "fill them in or drop those rows")
    infinite = np.isinf(values).any(axis=0)
    require(
        not infinite.any(), "data", "finite", f"infinity in {_named(names, infinite)}", "correct or drop those rows"
    )
    require(rows >= MIN_ROWS, "data", f"of at least {MIN_ROWS} rows", rows, "collect more")
    constant = np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(axis=0)
    got = f"no variation in {_named(names, constant)}"
    require(not constant.any(), "data", "varying in every column", got, "leave those columns out")
    same = np.abs(np.triu(np.corrcoef(values, rowvar=False), 1)) > 1 - 1e-7
    pairs = "; ".join(f"{names[i]} and {names[j]}" for i, j in np.argwhere(same)[:5])
    require(not same.any(), "data", "of columns that differ", f"duplicates: {pairs}", "leave one of each pair out")


def _read_text(path: Path) -> Table:
    with open_file(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise fail(str(path), "text in UTF-8", str(error)[:200], "save it as UTF-8") from error
    header, *rows = _cells(text, path)
    names = tuple(name.strip() for name in header.cells)
    odd = next((row for row in rows if len(row.cells) != len(names)), None)
    got = "" if odd is None else f"{len(odd.cells)} on line {odd.line}"
    require(odd is None, str(path), f"of {len(names)} cells in every row", got, "correct that line")
    header_is_data = all(_number(name) is not None for name in names)
    require(not header_is_data, str(path), "headed by column names", ", ".join(names)[:80], "add a line of names")
    _check_names(names)
    numbers = lambda row: [np.nan if (x := _number(cell)) is None else x for cell in row.cells]
    values = np.array([numbers(row) for row in rows], np.float64)
    wrong = []
    for j, name in enumerate(names):
        bad = next((row.cells[j] for row in rows if _number(row.cells[j]) is None), None)
        wrong += [] if bad is None else [f"{name} ({bad.strip()[:20]!r})"]
    _check_numbers(wrong)
    return Table(names, values.reshape(len(rows), len(names)))


class _Row(NamedTuple):
    line: int
    """Of the file, from 1, where it ends."""
    cells: list[str]


def _cells(text: str, path: Path) -> list[_Row]:
    """The rows of a text, blank lines left out; at least two."""
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    reader = csv.reader(lines, delimiter=max(",;\t", key=first.count))
    try:
        rows = [_Row(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        cure = "look for a quote that is not closed"
        raise fail(str(path), "a table of cells", f"{error} up to line {reader.line_num}", cure) from error
    require(len(rows) > 1, str(path), "a header and rows", f"{len(rows)} lines", "check that it is the right file")
    return rows


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow to be read; pip install pyarrow, or save it as CSV") from error
    try:
        table = parquet.read_table(path)
    except OSError as error:
        raise fail(str(path), "a Parquet file", str(error)[:200], "check that it is the right file") from error
    numbers = [_numbers(np.asarray(column.to_numpy())) for column in table.columns]
    names = tuple(table.column_names)
    return _table(names, numbers)


def _table(names: tuple[str, ...], columns: list[np.ndarray | None]) -> Table:
    _check_names(names)
    _check_numbers([name for name, column in zip(names, columns, strict=True) if column is None])
    return Table(names, np.stack(columns, axis=1) if columns else np.zeros((0, 0)))


def _number(cell: str) -> float | None:
    """NaN for a missing value, None for text."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _numbers(column: np.ndarray) -> Float[np.ndarray, "N"] | None:
    """The column as float64, None if it is not made of numbers."""
    try:
        return column.astype(np.float64) if column.dtype.kind in "biufO" else None
    except (TypeError, ValueError):
        return None


def _check_names(names: tuple[str, ...]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "columns", "named differently", f"twice {', '.join(twice)[:200]}", "rename them")
    require(all(names), "columns", "named", "an empty name", "give every column a name")


def _check_numbers(wrong: list[str]) -> None:
    cure = "leave them out, or encode them as numbers"
    require(not wrong, "data", "made of numbers", f"text in {', '.join(wrong)[:300]}", cure)


def _named(names: tuple[str, ...], where: np.ndarray) -> str:
    return ", ".join(names[i] for i in np.flatnonzero(where))
