"""safetensors files from strangers, read with bounds, and our own, written atomically.

A safetensors file is `u64 header length | JSON header | data`. Everything that the header claims is checked against the
size of the file before any memory is taken, so a hostile file costs an error and nothing else. Pickles are never
opened: loading one runs code that its author chose.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import MAX_JSON, atomic_file, open_file

MAX_RANK = 8
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
"""The dtypes that are read and written; any other is refused by name."""
FLOATS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
INTACT = "download it again or ask its author for an intact safetensors file"
SAFE = "ask its author for a .safetensors file, or convert it to one on a machine that has nothing to lose"


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, as read-only views of the mapped file: nothing is loaded before it is used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on a pickle, and on a file that is empty, truncated, inconsistent, or holds a dtype not in `DTYPES`.
    """
    entries, start = _read_header(Path(path))
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    data = np.asarray(np.memmap(path, np.uint8, "r", offset=start, shape=(end,))) if end else np.empty(0, np.uint8)
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        tensors[name] = data[first:last].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def forget(view: np.ndarray) -> None:
    """Gives back the memory of what has been read of a mapped file, a view of which this is; it is read again where it is needed again."""
    base: Any = view
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free-text metadata in the header of a safetensors file; raises like `read_tensors`."""
    return _read_header(Path(path))[0].get("__metadata__", {})


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Any],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays to a safetensors file, atomically and converting one tensor at a time.

    Args:
        path: the file; folders on the way are made.
        tensors: name -> NumPy or JAX array.
        dtype: "float32", "float16" or "bfloat16" for the floating-point tensors; None keeps theirs.
        metadata: free text for the header.

    Raises:
        ValueError: on an unsupported dtype, or a finite value that float16 cannot hold.
        OSError: if the file cannot be written; nothing is left behind.
    """
    kinds = {name: stored_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # largest first keeps every tensor aligned
    codes = {kind: code for code, kind in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        shape = [int(n) for n in np.shape(tensors[name])]
        size = math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": codes[kinds[name]], "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = _cast(name, np.asarray(tensors[name]), kinds[name])
            file.write(array.reshape(-1).view(np.uint8).data)


def stored_dtype(name: str, tensor: Any, dtype: str | None) -> np.dtype:
    """The dtype in which `write_tensors` stores this tensor; raises ValueError if the format has none for it."""
    require(dtype is None or dtype in FLOATS, "dtype", f"one of {', '.join(FLOATS)}", repr(dtype), "choose one of them")
    own = np.dtype(tensor.dtype).newbyteorder("=")
    floating = own in FLOATS.values() or own == np.float64
    if floating and dtype is not None:
        return FLOATS[dtype]
    require(own in DTYPES.values(), f"tensor {name}", f"one of {', '.join(DTYPES)}", own, "convert it first")
    return own


def _cast(name: str, array: np.ndarray, kind: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=kind)
    if kind == np.float16 and array.dtype != kind and np.isinf(cast).any() and np.isfinite(array[np.isinf(cast)]).any():
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise fail(
            f"tensor {name}", "at most 65504 for float16", f"{largest:.4g}", 'write it as "bfloat16" or "float32"'
        )
    return cast


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The checked header, and the position in the file where the data starts."""
    if path.suffix in PICKLES:
        raise fail(str(path), "a safetensors file", f"a pickle ({path.suffix}), which can run code", SAFE)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 10 or length < 2 or length > min(MAX_JSON, size - 8):
            raise fail(str(path), "a safetensors file", _describe(head, size, length), INTACT)
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise fail(str(path), "a safetensors file with a JSON header", str(error)[:200], INTACT) from error
    require(isinstance(header, dict), f"header of {path}", "a JSON object", type(header).__name__, INTACT)
    metadata = header.get("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    require(texts, f"__metadata__ of {path}", "made of strings", repr(metadata)[:200], INTACT)
    _check_entries(path, {name: entry for name, entry in header.items() if name != "__metadata__"}, size - 8 - length)
    return header, 8 + length


def _check_entries(path: Path, entries: Mapping[str, Any], available: int) -> None:
    """Each tensor has a known dtype and as many bytes as its shape says; together they fill the data exactly."""
    spans = []
    for name, entry in entries.items():
        what = f"tensor {name[:200]!r} of {path}"
        ok = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        require(ok, what, "described by dtype, shape and data_offsets", repr(entry)[:200], INTACT)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in DTYPES):
            raise fail(f"dtype of {what}", f"one of {', '.join(DTYPES)}", repr(dtype)[:50], "convert it to float16")
        ok = _naturals(shape) and len(shape) <= MAX_RANK and _naturals(offsets) and len(offsets) == 2
        require(ok, what, "of natural shape and offsets", f"shape {shape}, offsets {offsets}"[:300], INTACT)
        need = DTYPES[dtype].itemsize * math.prod(shape)
        first, last = offsets
        ok = first <= last <= available and last - first == need
        require(ok, what, f"{need} bytes within the {available} bytes of data", f"offsets {offsets}"[:300], INTACT)
        spans.append((first, last))
    position = 0
    for first, last in sorted(spans):
        got = f"a tensor at {first} instead of {position}"
        require(first == position, str(path), "free of gaps and overlaps", got, INTACT)
        position = last
    require(position == available, str(path), f"{position} bytes of data long", f"{available} bytes", INTACT)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _describe(head: bytes, size: int, length: int) -> str:
    """What a file that is no safetensors file seems to be."""
    if size == 0:
        return "an empty file"
    if head.startswith(b"PK") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "a pickle under another name, which can run code"
    if head.startswith(b"version"):
        return "a Git LFS pointer instead of the file it stands for"
    if head[:1] == b"<":
        return "a web page"
    return f"a file of {size} bytes that claims a header of {length}"
