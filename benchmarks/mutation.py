"""Damaged versions of files: bytes at random, and JSON whose values become nasty while its syntax stays whole."""

import copy
import json
import random
from typing import Any

NUMBERS = (0, -1, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, -(2**63), 10**400)
VALUES = (
    *NUMBERS,
    0.5,
    float("nan"),
    float("inf"),
    1e308,
    None,
    True,
    "",
    "\x00",
    "../../etc/passwd",
    "/dev/zero",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    [0] * 1000,
    {"": ""},
    "F32",
    "BF16",
    "I64",
    "LORA",
    "v_prediction",
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x80\x02",
    b"PK\x03\x04",
    b"{",
    b"[",
    b'"',
    b"\xed\xa0\x80",
    b"(",
    b"t",
    b"R",
    b"Q",
    b".",
)


def mutate(rng: random.Random, seed: bytes, other: bytes, header: int) -> bytes:
    """A damaged version of `seed`.

    Args:
        other: a file from which pieces may come.
        header: of a safetensors file 8, the bytes of the length before the JSON; of a JSON file 0; of another -1.
    """
    if header >= 0 and rng.random() < 0.7:
        changed = _json(rng, seed, header)
        if changed is not None:
            return changed
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        _bytes(rng, data, other)
    return bytes(data)


def _bytes(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 4, 8, 40, 400))
    match rng.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at : at + length]
        case 2:
            del data[at:]
        case 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 3, 50))
        case 4:
            piece = rng.randrange(len(other) + 1)
            data[at : at + rng.choice((0, length))] = other[piece : piece + length]
        case 5:
            data[at : at + length] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, rng.choice(("little", "big")))[:length]
        case _:
            data[at : at + rng.choice((0, 1))] = rng.choice(BYTES)


def _json(rng: random.Random, seed: bytes, header: int) -> bytes | None:
    """With some values, names or entries of the JSON changed; None if there is no JSON."""
    end = 8 + int.from_bytes(seed[:8], "little") if header else len(seed)
    try:
        value = json.loads(seed[header:end].decode())
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(rng, value)
    text = json.dumps(value).encode()
    if rng.random() < 0.03:
        depth = rng.choice((100, 10**4, 10**5))
        text = b'{"x":' * depth + text
    if rng.random() < 0.05:
        text = text[:-1] + b',"x":1,"x":2' + text[-1:]
    return (len(text).to_bytes(8, "little") if header else b"") + text + seed[end:]


def _changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[name]
            case 1:
                value[rng.choice((str(rng.choice(VALUES)), f"{name}.0", name[:-1], "__metadata__"))] = copy.deepcopy(
                    value[name]
                )
            case 2:
                value[name], value[next(iter(value))] = value[next(iter(value))], value[name]
            case _:
                value[name] = _changed(rng, value[name])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at]
        value[at] = _changed(rng, value[at])
        return value
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, value, -2 * value))
    return copy.deepcopy(rng.choice(VALUES))
