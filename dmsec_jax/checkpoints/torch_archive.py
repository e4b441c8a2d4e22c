"""Tensors of a PyTorch file, read without PyTorch and without running anything that is in it.

Three layouts: the zip that `torch.save` writes, the zip of a TorchScript module, and the bare pickle that `torch.save` wrote before version 1.6.
In each a pickle describes objects, and raw storages lie beside it. A pickle is a program, so it is run by an unpickler that knows a handful of
harmless names: tensors become descriptions, modules become bags of attributes, what Lightning notes beside the weights (its classes, NumPy's numbers)
becomes nothing at all, everything else is refused. Only then are storages read, and no more of them than the file has bytes.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from dmsec_jax.core.checks import fail
from dmsec_jax.core.files import open_file

MAX_PICKLE = 2**24
"""Bytes of a description; that of ResNeXt-101 takes a tenth of a megabyte."""
MAX_OBJECTS = 10**5
MAX_DEPTH = 64
MAX_RANK = 8
MAX_NAME = 1000
MAX_DIRECTORY = 2**24
"""Bytes of a zip's list of entries, all of which Python keeps as objects; that of Stable Diffusion 1.4 takes a twentieth of a megabyte."""
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
OPERATIONS = [
    "PROTO",
    "STOP",
    "FRAME",
    "MARK",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
    "BINPUT",
    "LONG_BINPUT",
    "BINGET",
    "LONG_BINGET",
    "MEMOIZE",
    "GLOBAL",
    "STACK_GLOBAL",
    "BINPERSID",
    "REDUCE",
    "NEWOBJ",
    "BUILD",
]
"""What PyTorch writes; the other operations of a pickle are refused, among them those that take memory on the word of the file."""
MAX_SHARING = 4
INERT = frozenset(
    ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode", "torch.Size")
)
"""Names of which the files of Stable Diffusion 1.x make use beside their weights; nothing of that name is called here."""
WRITERS = ("pytorch_lightning.", "lightning.")
"""Packages whose classes are the keys of notes, or bags."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
CURE = "ask its author for an intact file, at best a .safetensors one"


class _Refused(Exception):
    """Carries (contract, got); `read` turns it into the error that names the file."""


class _Kind(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Bag(dict):
    """What a TorchScript class or an ordered dict becomes: items and attributes, no behaviour."""

    def __init__(self):  # no arguments: a pickle cannot make it copy anything
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict) and not self:  # a module; an ordered dict that has items keeps only them
            self.update(state)


class _Inert:
    """What a file says of other things than tensors; holds nothing, does nothing."""

    __slots__ = ()

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


class _Call:
    """One harmless function. Fresh for every mention, so that a pickle can spoil only its own copy."""

    __slots__ = ("fn",)

    def __init__(self, fn: Callable):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of the file: dotted name -> read-only array.

    Parameters and buffers have the names of the module's `state_dict`; constants of a TorchScript file are `constants.<i>`.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no PyTorch file, asks for anything but tensors and containers, is inconsistent, or exceeds the bounds.
    """
    with open_file(path) as file:
        try:
            return _read(file)
        except _Refused as error:
            contract, got = error.args
            raise fail(str(path), contract, str(got)[:200], CURE) from None
        except Exception as error:  # a hostile file can make the machines that run it raise anything
            raise fail(
                str(path), "an intact PyTorch file", f"{type(error).__name__}: {str(error)[:200]}", CURE
            ) from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    end = zipfile._EndRecData(file)  # what zipfile.ZipFile would go by, before it lists the entries
    if end is None:
        file.seek(0)
        return _read_legacy(file)
    if end[zipfile._ECD_SIZE] > MAX_DIRECTORY:
        raise _Refused(f"an archive whose list of entries takes {MAX_DIRECTORY} bytes", end[zipfile._ECD_SIZE])
    with zipfile.ZipFile(file) as archive:
        return _read_zip(archive, os.fstat(file.fileno()).st_size)


def _read_zip(archive: zipfile.ZipFile, available: int) -> dict[str, np.ndarray]:
    names = set(archive.namelist())
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(roots) != 1 or len(names) != len(archive.namelist()):
        raise _Refused("an archive with one data.pkl", f"{len(roots)} of them in {len(archive.namelist())} entries")
    root = roots[0]
    if f"{root}byteorder" in names and archive.open(f"{root}byteorder").read(9) != b"little":
        raise _Refused("stored in little-endian order", "another order")
    found: dict[str, np.ndarray] = {}
    for entry, folder, prefix in (("data", "data", ""), ("constants", "constants", "constants.")):
        if f"{root}{entry}.pkl" not in names:
            continue
        text = archive.open(f"{root}{entry}.pkl").read(MAX_PICKLE + 1)
        tensors = {prefix + name: tensor for name, tensor in _tensors(_load(text))}
        _check_sizes(tensors.values(), available)
        storages = {}
        for storage in {tensor.storage for tensor in tensors.values()}:
            wanted = storage.count * storage.dtype.itemsize
            info = archive.getinfo(f"{root}{folder}/{storage.key}")
            if info.file_size != wanted or info.compress_type != zipfile.ZIP_STORED:
                raise _Refused(
                    f"with {wanted} bytes in storage {storage.key}",
                    f"{info.file_size}, compression {info.compress_type}",
                )
            available -= wanted  # entries may overlap in a hostile zip
            if available < 0:
                raise _Refused("at least as large as its storages", "a smaller file")
            storages[storage] = np.frombuffer(archive.open(info).read(wanted), storage.dtype)
        found |= {name: _view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}
    return found


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Pickles one after the other (magic number, version, system, object, storage keys), then each storage: its count and its elements."""
    size = os.fstat(file.fileno()).st_size
    text = io.BytesIO(file.read(MAX_PICKLE))
    if _Unpickler(text).load() != LEGACY_MAGIC:
        raise _Refused("a PyTorch file", "another pickle")
    _, system = (_Unpickler(text).load() for _ in range(2))
    if system.get("little_endian") is not True:
        raise _Refused("stored in little-endian order", "another order")
    describing = _Unpickler(text)
    tensors = dict(_tensors(describing.load()))
    _check_sizes(tensors.values(), size)
    keys, used = _Unpickler(text).load(), {tensor.storage for tensor in tensors.values()}
    dtypes = {storage.key: storage for storage in describing.storages}  # with those of notes, which are passed over
    if len(describing.storages) != len(dtypes):
        raise _Refused("made of storages with one type each", "a key with two types")
    storages, position = {}, text.tell()
    for key in keys:
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        storage = dtypes.get(key) if isinstance(key, str) else None
        if storage is None or storage.count != count or position + 8 + count * storage.dtype.itemsize > size:
            raise _Refused("made of the storages that it lists", f"another one of {count} elements")
        if storage in used:
            storages[storage] = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
        position += 8 + count * storage.dtype.itemsize
    return {name: _view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _check_sizes(tensors: Iterable[_Tensor], available: int) -> None:
    """Tensors may share storages, as tied weights do, but what reads them must not need a multiple of the file in memory."""
    size = sum(math.prod(tensor.size) * tensor.storage.dtype.itemsize for tensor in tensors)
    if size > MAX_SHARING * available:
        raise _Refused(f"made of tensors that together take at most {MAX_SHARING} times the file", f"{size} bytes")


def _load(text: bytes) -> Any:
    if len(text) > MAX_PICKLE:
        raise _Refused(f"described in at most {MAX_PICKLE} bytes", "more")
    return _Unpickler(io.BytesIO(text)).load()


class _Unpickler(pickle._Unpickler):
    """Python's own machine rather than the C one, whose memo a few bytes can blow up to gigabytes.

    `find_class` is the only door through which a pickle reaches code. Nothing prints or hashes what the file nests: both can take for ever.
    `storages` are those that were mentioned.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: set[_Storage] = set()

    dispatch: ClassVar[dict[int, Callable]] = {
        code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPERATIONS)
    }

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], (key,), (value,))

    def load_setitems(self):
        items = self.pop_mark()
        _set_items(self.stack[-1], items[::2], items[1::2])

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__" or f"{module}.{name}" == "torch.nn.modules.container.ParameterDict":
            return _Bag
        if module.startswith(WRITERS):
            return _Bag
        if f"{module}.{name}" in INERT:
            return _Inert
        if module == "torch" and name in STORAGES:
            return _Kind(STORAGES[name])
        known = {
            "torch._utils._rebuild_tensor_v2": _describe,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": lambda: _Bag(),
            "torch.jit._pickle.restore_type_tag": lambda value, _: value,
        }
        known |= {
            f"torch.jit._pickle.build_{kind}list": lambda items: items for kind in ("int", "double", "bool", "tensor")
        }
        if f"{module}.{name}" not in known:
            raise _Refused("made of tensors and containers", f"a call of {module}.{name}")
        return _Call(known[f"{module}.{name}"])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(storage, _Kind) or not isinstance(key, str) or not _natural(count):
            raise _Refused("made of storages with type, key and size", "something else")
        if len(pid) > 5 and pid[5] is not None:
            raise _Refused("made of whole storages", "a view of one")
        self.storages.add(_Storage(storage.dtype, key, count))
        return _Storage(storage.dtype, key, count)


def _set_items(target: Any, keys: Any, values: Any) -> None:
    """What a class is the key of are its notes, and left out."""
    if not isinstance(target, dict) or not all(map(_is_key, keys)):
        raise _Refused("made of dicts with text or numbers as keys", "another key")
    target.update((key, value) for key, value in zip(keys, values, strict=True) if key is not _Bag)


def _is_key(key: Any) -> bool:
    """Larger numbers can be made to have one hash, and a dict of them takes for ever."""
    return key is _Bag or isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**60)


def _describe(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, bits: Any = None) -> _Tensor:
    """Checks that every element of a tensor lies inside its storage."""
    ok = isinstance(storage, _Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    ok = ok and len(size) == len(stride) <= MAX_RANK and all(map(_natural, (offset, *size, *stride)))
    if not ok:
        raise _Refused("made of tensors with offset, size and strides", "something else")
    if bits:
        raise _Refused("made of tensors that are stored as they are", "one that is negated or conjugated on reading")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or (math.prod(size) and last >= storage.count):
        raise _Refused(
            f"made of tensors inside their storages ({storage.count} elements)",
            f"element {last} of a tensor {list(size)}",
        )
    return _Tensor(storage, offset, size, stride)


def _natural(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**40


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    if not math.prod(tensor.size):
        return np.broadcast_to(np.zeros((), storage.dtype), tensor.size)
    steps = [step * storage.dtype.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.size, steps, writeable=False)


def _tensors(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor in nested containers with its dotted name; a budget, since shared containers may nest to exponential size."""
    stack, seen, names = [("", content, 0)], 0, set()
    while stack:
        name, value, depth = stack.pop()
        seen += len(value) if isinstance(value, dict | list | tuple) else 1
        if depth > MAX_DEPTH or seen > MAX_OBJECTS or len(name) > MAX_NAME:
            raise _Refused(
                f"at most {MAX_OBJECTS} objects with names of {MAX_NAME} characters, {MAX_DEPTH} deep", "more"
            )
        if isinstance(value, _Tensor):
            if name in names:
                raise _Refused("made of tensors with one name each", f"two named {name}")
            names.add(name)
            yield name, value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack.extend((f"{name}.{key}" if name else str(key), item, depth + 1) for key, item in items)
