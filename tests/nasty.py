"""Fifty of the nastiest files: name -> (reader of `benchmarks.readers`, what the files in its folder hold, words of the refusal).

None of them may take more than a moment or more memory than files of their size; see `test_nasty`. Found by `benchmarks.fuzz`, by reading the
readers, or taken from what has hit other programs (CVE-2025-32434 for the pickles that `weights_only` let pass, fickling's and picklescan's lists).
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

Files = Mapping[str, bytes]


def safe(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, given as text or as its JSON value."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def two(first: object, second: object, size: int = 16) -> bytes:
    return safe({"a": entry(offsets=first), "b": entry(offsets=second)}, bytes(size))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(body: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """A PyTorch file around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", program(body), compression)
        for key, value in entries.items():
            archive.writestr(key, value, compression)
    return file.getvalue()


def storage(kind: str = "FloatStorage", key: str = "0", count: bytes = b"K\x06") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + count + b"tQ"


def tensor(size: bytes = b"K\x02K\x03\x86", stride: bytes = b"K\x03K\x01\x86", **where: bytes) -> bytes:
    rest = b"\x89" + name("collections", "OrderedDict") + b")RtR"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(**where) + b"K\x00" + size + stride + rest


def crowded() -> bytes:
    """A zip whose list of entries is said to take a gigabyte."""
    content = bytearray(zipped(b"N"))
    content[-10:-6] = struct.pack("<I", 2**30)
    return bytes(content)


def legacy(count: int) -> bytes:
    """The layout before 1.6, with a storage of so many elements."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    big = b"\x8a\x08" + count.to_bytes(8, "little")
    body = tensor(count=big, size=big + b"\x85", stride=b"K\x01\x85")
    return head + program(body) + pickle.dumps(["0"], 2) + count.to_bytes(8, "little") + bytes(24)


def index(**places: object) -> Files:
    good = safe({"a": entry()}, bytes(8))
    return {"m.safetensors.index.json": json.dumps({"weight_map": places}).encode(), "s.safetensors": good}


def lora(down: np.ndarray, metadata: Mapping[str, str] | None = None, **more: np.ndarray) -> bytes:
    tensors = {
        "lora_unet_conv_in.lora_down.weight": down,
        "lora_unet_conv_in.lora_up.weight": np.ones((8, 2, 1, 1), "<f4"),
    }
    tensors |= {f"lora_unet_conv_in.{key}": value for key, value in more.items()}
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for key, array in tensors.items():
        header[key] = entry(array.shape, (position, position + array.nbytes))
        position += array.nbytes
    return safe(header, b"".join(array.tobytes() for array in tensors.values()))


DOWN = np.ones((2, 4, 3, 3), "<f4")
VOCABULARY = {chr(i): i for i in range(33, 100)}
PE, ADAPTER, TORCH = "safetensors", "adapter", "torch archive"
INTACT, PICKLE = "a safetensors file", "must be made of tensors and containers"
SPIRAL = b"]" + b"q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(30))
BIG = tensor(count=b"J\x00\x00\x00\x01", size=b"J\x00\x00\x00\x01\x85", stride=b"K\x01\x85")
COLLIDING = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 40000))
MANY = b"](" + tensor() + b"q\x09" + b"h\x09" * 10**4 + b"e"
ALIASES = b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(20))
PATTERN = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 1}})
TOWER = {"sample_size": 8} | {
    "block_out_channels": [2**20] * 16,
    "layers_per_block": 8,
    "transformer_layers_per_block": 24,
}
TOWER |= {"down_block_types": ["CrossAttnDownBlock2D"] * 16, "up_block_types": ["CrossAttnUpBlock2D"] * 16}

NASTY: dict[str, tuple[str, bytes | Files, str]] = {
    # ------------------------------------------------------------------------------------------------ safetensors
    "nothing": (PE, b"", "an empty file"),
    "a length of 2^63": (PE, (2**63).to_bytes(8, "little") + b"{}", "claims a header of 9223372036854775808"),
    "a length one too long": (PE, safe({}, length=3), INTACT),
    "a header beyond 16 MiB": (PE, safe(b"{}" + b" " * 2**24), INTACT),
    "no UTF-8": (PE, safe(b'{"\xff": 1}'), "JSON header, got 'utf-8' codec"),
    "UTF-16": (PE, safe('{"a": {}}'.encode("utf-16")), "JSON header"),
    "brackets": (PE, safe(b"[" * 10**6), "JSON header"),
    "nested tables": (PE, safe(b'{"a":' * 10**5), "JSON header"),
    "a number of a million digits": (PE, safe(b'{"a": ' + b"9" * 10**6 + b"}"), "JSON header"),
    "two tensors of one name": (PE, safe(b'{"a": 1, "a": 1}'), "a name occurs twice"),
    "two offsets of one tensor": (PE, safe(b'{"a": {"shape": [0], "shape": [9]}}'), "a name occurs twice"),
    "overlapping tensors": (PE, two((0, 8), (4, 12), 12), "free of gaps and overlaps"),
    "the same bytes twice": (PE, two((0, 8), (0, 8), 8), "free of gaps and overlaps"),
    "a gap": (PE, two((0, 8), (12, 20), 20), "free of gaps and overlaps"),
    "outside the file": (PE, two((0, 8), (8, 2**40)), "8 bytes within the 16 bytes of data"),
    "backwards": (PE, two((0, 8), (16, 8)), "within"),
    "below zero": (PE, two((0, 8), (-8, 0)), "of natural shape and offsets"),
    "true for one": (PE, safe({"a": entry([True], [0, 4])}, bytes(4)), "of natural shape and offsets"),
    "a product that wraps": (PE, safe({"a": entry([2**32, 2**32], [0, 0])}), "73786976294838206464 bytes"),
    "nothing times very much": (PE, safe({"a": entry([0, 2**62, 2**62], [0, 8])}, bytes(8)), "0 bytes within"),
    "nine axes": (PE, safe({"a": entry([1] * 9, [0, 4])}, bytes(4)), "of natural shape and offsets"),
    "a dtype that is a list": (PE, safe({"a": entry(dtype=["F32"])}, bytes(8)), "dtype of tensor 'a'"),
    "numbers for metadata": (PE, safe({"__metadata__": {"a": 1}}), "made of strings"),
    "bytes beyond the last tensor": (PE, safe({"a": entry()}, bytes(9)), "8 bytes of data long, got 9 bytes"),
    "a pickle by another name": (PE, program(name("os", "system") + text("true") + b"\x85R"), "a pickle under another"),
    # ------------------------------------------------------------------------------------------------ pickles and zips
    "os.system": (TORCH, zipped(name("posix", "system") + text("true") + b"\x85R"), PICKLE),
    "eval": (TORCH, zipped(name("builtins", "eval") + text("1") + b"\x85R"), PICKLE),
    "runpy": (TORCH, zipped(name("runpy", "_run_code") + text("1") + b"\x85R"), PICKLE),
    "getattr by STACK_GLOBAL": (TORCH, zipped(text("builtins") + text("getattr") + b"\x93"), PICKLE),
    "INST": (TORCH, zipped(b"(" + text("true") + b"ios\nsystem\n"), "got KeyError"),
    "OBJ": (TORCH, zipped(b"(" + name("torch", "FloatStorage") + b"o"), "got KeyError"),
    "an extension code": (TORCH, zipped(b"\x82\x01"), "got KeyError"),
    "dotted names": (TORCH, zipped(b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93"), PICKLE),
    "TorchScript's own loader": (TORCH, zipped(name("torch.storage", "_load_from_bytes") + b")R"), PICKLE),
    "exponential nesting": (TORCH, zipped(SPIRAL), "objects"),
    "itself inside itself": (TORCH, zipped(b"]q\x00h\x00a"), "deep"),
    "keys of one hash": (TORCH, zipped(b"}(" + COLLIDING + b"u"), "text or numbers as keys"),
    "a text of 2 GB": (TORCH, zipped(b"X" + struct.pack("<I", 2**31)), "an intact PyTorch file"),
    "bytes of a terabyte": (TORCH, zipped(b"\x96" + struct.pack("<Q", 2**40)), "got KeyError"),
    "a bomb of a description": (TORCH, zipped(bytes(2**25), zipfile.ZIP_DEFLATED), "described in at most"),
    "a bomb of a storage": (TORCH, zipped(BIG, zipfile.ZIP_DEFLATED, **{"x/data/0": bytes(2**26)}), "compression 8|4 times the file"),
    "a storage elsewhere": (TORCH, zipped(tensor(key="../../../etc/passwd"), **{"../../etc/passwd": b"x" * 24}), "got KeyError"),
    "one storage ten thousand times": (TORCH, zipped(MANY, **{"x/data/0": bytes(24)}), "together take at most 4 times"),
    "a list of entries of a gigabyte": (TORCH, crowded(), "list of entries"),
    "a storage of 2^56 elements": (TORCH, legacy(2**56), "offset, size and strides|storages with type"),
    # ------------------------------------------------------------------------------------------------ JSON, words and text
    "a shard elsewhere": ("shard index", index(a="../s.safetensors"), "files beside it"),
    "an absolute shard": ("shard index", index(a="/etc/passwd.safetensors"), "files beside it"),
    "a shard that is a list": ("shard index", index(a=["s.safetensors"]), "a table of tensor to file name"),
    "an aliased bomb": ("config of latent diffusion", ALIASES, "a config of latent diffusion"),
    "YAML that calls": ("config of latent diffusion", b"!!python/object/apply:os.system ['true']", "a config of latent diffusion"),
    "a pattern that never ends": (ADAPTER, lora(DOWN, {"lora_adapter_metadata": PATTERN}), "a table of layer to number"),
    "NaN in an adapter": (ADAPTER, lora(DOWN * np.nan), "not finite"),
    "an alpha below zero": (ADAPTER, lora(DOWN, alpha=-np.ones(1, "<f4")), "not a positive number"),
    "a UNet of a million channels and sixteen levels": ("unet/config.json", json.dumps(TOWER).encode(), "depth must be at most 200 blocks"),
    "a text encoder of any depth": ("text_encoder/config.json", b'{"num_hidden_layers": 1e400}', "num_hidden_layers"),
    "ids of nothing": ("tokenizer vocabulary", json.dumps(VOCABULARY | {"b": 10**30}).encode(), "vocabulary ids"),
    "merges of three": ("tokenizer merges", b"#version: 0.2\na b c\n", "merges of two tokens"),
}  # fmt: skip
"""Which are a few more than fifty."""
