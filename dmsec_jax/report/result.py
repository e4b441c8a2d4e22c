"""`result.json`: what was run, on what, with which outcome; one tidy row per measured figure."""

import dataclasses
import datetime
import importlib.metadata
import math
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

import dmsec_jax
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.config import from_dict
from dmsec_jax.core.files import read_json, remove, write_json
from dmsec_jax.metrics.extraction import Interval

SCHEMA = "dmsec-result"
VERSION = 1
FILE = "result.json"
PICTURE = re.compile(r"pictures/([a-z0-9-]+/)?[a-z0-9-]+\.png")
"""Names that our reports give to pictures; what else an earlier `result.json` lists may come from a stranger and is not ours to remove."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure.

    Attributes:
        bench, metric, method: names; DESIGN's table lists them.
        value: the figure; None or NaN where it could not be measured.
        low, high: 95 % interval, both or neither.
        n: number of seeds, graphs or pictures behind the interval.
        unit: what `value` counts, for example "share" or "seconds".
        case: the settings that identify the row, scalars only.

    Raises:
        ValueError: on an empty name, half an interval, low above high, negative n, or a case that is not flat.
    """

    bench: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    unit: str
    method: str
    case: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        where = f"row {self.bench}/{self.metric}/{self.method}"
        named = all((self.bench, self.metric, self.unit, self.method))
        require(named, where, "named in full", "an empty name", "give bench, metric, unit and method")
        require(self.n >= 0, f"n of {where}", "at least 0", self.n, "count what was measured")
        numbers = (self.value, self.low, self.high)
        plain = not any(isinstance(number, bool) for number in numbers)
        require(plain, where, "made of numbers", f"{numbers}", "write 0.0 and 1.0")
        known = [_finite(bound) is not None for bound in (self.low, self.high)]
        half = f"low {self.low}, high {self.high}"
        require(known[0] == known[1], where, "with a whole interval or none", half, "give both bounds")
        require(not all(known) or self.low <= self.high, where, "with low <= high", half, "swap them")
        flat = all(isinstance(k, str) and isinstance(v, str | int | float | None) for k, v in self.case.items())
        require(flat, f"case of {where}", "a flat mapping of scalars", repr(self.case)[:200], "name each setting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one command writes; `write` and `read` put it into and take it from `result.json`.

    Attributes:
        method: the method in question, for example "finextract".
        command: the command line, ready to be pasted.
        config: plain values, as `core.config.to_dict` gives.
        seeds: name -> integer.
        inputs: label -> SHA-256 of the file or folder, hexadecimal.
        seconds: stage -> wall time.
        rows: the figures.
        pictures: path relative to the file's folder, with "/" -> what it shows.
        details: anything that is no figure, as JSON values.
        notes: sentences that a reader of the figures must know.
        versions, device, date: filled in for this machine and moment.

    Raises:
        ValueError: on a digest that is none, a negative time, a seed that is no integer, or a picture outside the folder.
    """

    method: str
    command: str
    config: dict
    seeds: dict
    inputs: dict
    seconds: dict
    rows: tuple[Row, ...]
    pictures: dict = dataclasses.field(default_factory=dict)
    details: dict = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict = dataclasses.field(default_factory=lambda: versions())
    device: dict = dataclasses.field(default_factory=lambda: device())
    date: str = dataclasses.field(default_factory=lambda: now())

    def __post_init__(self):
        for label, digest in self.inputs.items():
            ok = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
            require(bool(ok), f"inputs[{label!r}]", "a SHA-256 digest", repr(digest)[:80], "hash the file or folder")
        for stage, value in self.seconds.items():
            ok = isinstance(value, int | float) and value >= 0
            require(ok, f"seconds[{stage!r}]", "a time of at least 0", repr(value), "measure with time.monotonic")
        for name, seed in self.seeds.items():
            require(type(seed) is int, f"seeds[{name!r}]", "an integer", repr(seed), "write the integer, not the key")
        for name in self.pictures:
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
            require(inside, f"pictures[{name!r}]", "a path inside the folder", name, "write it relative, with '/'")


def row_over(interval: Interval, **names: Any) -> Row:
    """The row of an interval of `metrics.extraction`; bounds that are not finite (one picture, one run) become None."""
    low, high = _finite(interval.low), _finite(interval.high)
    if low is None or high is None:
        low = high = None
    return Row(value=_finite(interval.value), low=low, high=high, n=int(interval.n), **names)


def write(path: str | Path, result: Result) -> None:
    """Writes `result.json`, all of it or nothing. NaN and infinity become null, and a note says where they stood.

    Raises:
        ValueError: if something in `config`, `details` or a row is no JSON value.
        OSError: if it cannot be written; an older file then stays as it was.
    """
    write_json(path, to_json(result))


def replace(folder: str | Path, result: Result) -> None:
    """Writes `result.json` into a folder, then removes the pictures of an earlier one there, which would pass for those of this one.

    Raises:
        ValueError, OSError: as `write`.
    """
    folder = Path(folder)
    before = earlier(folder)
    write(folder / FILE, result)
    if before is not None:
        drop(folder, {name for name in before.pictures if PICTURE.fullmatch(name)} - set(result.pictures))


def earlier(folder: str | Path) -> Result | None:
    """What an earlier run left in `folder`; None where there is nothing, or it is not ours."""
    try:
        return read(Path(folder) / FILE)
    except (OSError, ValueError):
        return None


def drop(folder: str | Path, names: Iterable[str]) -> None:
    """Removes files below `folder`, but not links, nor what lies behind one."""
    folder = Path(folder)
    for name in names:
        path = folder / name
        if path.is_file() and path.resolve() == folder.resolve() / name:
            remove(path)


def read(path: str | Path) -> Result:
    """Reads what `write` wrote; tuples in `config` and `details` come back as lists.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is no JSON, of another schema or version, incomplete, or holds an unknown key, a value of the
            wrong type, NaN or infinity.
    """
    values = read_json(path)
    found = (values.pop("schema", None), values.pop("version", None))
    cure = "read it with the version of dmsec_jax that wrote it"
    require(found == (SCHEMA, VERSION), str(path), f"of schema {SCHEMA} {VERSION}", f"{found[0]} {found[1]}", cure)
    lost: list[str] = []
    _plain(values, "", lost)
    require(not lost, str(path), "free of NaN and infinity", "; ".join(lost[:3]), "write null instead")
    return from_dict(Result, values, str(path))


def to_json(result: Result) -> dict[str, Any]:
    """The object that `write` writes: JSON values only, every number finite."""
    lost: list[str] = []
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    values = {name: _plain(value, name, lost) for name, value in fields.items() if name != "notes"}
    notes = [*result.notes, *lost]
    return {"schema": SCHEMA, "version": VERSION, **values, "notes": notes}


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that a result depends on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "dmsec_jax": dmsec_jax.__version__, **installed}


def device() -> dict[str, Any]:
    """Platform, kind and number of the devices in use."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _plain(value: Any, where: str, lost: list[str]) -> Any:
    """`value` as JSON; where a number is not finite, None, with a sentence in `lost`."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}" if where else str(key), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", lost) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{where} was {value}, written as null")
        return None
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise fail(where, "a JSON value", type(value).__name__, "turn it into numbers, text, lists or mappings")
