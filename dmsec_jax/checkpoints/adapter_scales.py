"""What an adapter is multiplied by, alpha / rank, and how its tensors are meant, as diffusers and PEFT write it down beside them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import read_json

METADATA = "lora_adapter_metadata"
"""Entry of a safetensors header in which diffusers keeps PEFT's configuration, as JSON."""
CONFIG = "adapter_config.json"
"""PEFT's file beside `adapter_model.safetensors`."""
KINDS = ("LORA", "LOHA", "LOKR", "OFT")
CURE = "download it again, or ask its author for the whole adapter"


class Scales(NamedTuple):
    """PEFT's configuration of each part ("" for all of them); empty if nothing is written down."""

    tables: Mapping[str, Mapping[str, Any]]

    def of(self, part: str) -> Mapping[str, Any]:
        """The configuration of one part; empty if nothing is written down."""
        return self.tables.get(part, self.tables.get("", {}))

    def ratio(self, part: str, layer: str, rank: int | None) -> float:
        """alpha / rank of a layer, 1 if nothing is written down. `rank` is None for a product of whole factors, which is multiplied all the same."""
        table = self.of(part)
        rank = rank or _named(table.get("rank_pattern", {}), layer) or table.get("r")
        if not table or table["peft_type"] == "OFT" or rank is None:
            return 1.0
        alpha = _named(table["alpha_pattern"], layer) or table["alpha"]
        return alpha / (math.sqrt(rank) if table["use_rslora"] else rank)


def _named(pattern: Mapping[str, float], layer: str) -> float | None:
    """The first entry that ends the layer's name."""
    return next((value for name, value in pattern.items() if f".{layer}".endswith(f".{name}")), None)


def config_beside(path: Path) -> Path | None:
    """PEFT's configuration of an adapter's file, if it has one."""
    beside = path.with_name(CONFIG)
    return beside if path.name.startswith("adapter_model.") and beside.is_file() else None


def read_scales(path: Path, metadata: Mapping[str, str]) -> Scales:
    """What the header's metadata, or else PEFT's configuration beside the file, says.

    Raises:
        ValueError: if it is damaged, or describes something else than a LoRA, LoHa, LoKr or OFT whose scales are given layer by layer.
    """
    beside = config_beside(path)
    if METADATA in metadata:
        name = f"{METADATA} of {path}"
        try:
            values = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise fail(name, "JSON", str(error)[:200], CURE) from error
        require(isinstance(values, dict), name, "one JSON object", type(values).__name__, CURE)
    elif beside is not None:
        name, values = str(beside), read_json(beside)
    else:
        return Scales({})
    parts = {key.partition(".")[0] for key in values if key.endswith(".lora_alpha")}
    cut = lambda part: {key.removeprefix(f"{part}."): v for key, v in values.items() if key.startswith(f"{part}.")}
    return Scales({part: _table(cut(part), name) for part in parts} if parts else {"": _table(values, name)})


def _table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = values.get("peft_type", "LORA")
    require(kind in KINDS, f"{name}: peft_type", f"one of {', '.join(KINDS)}", repr(kind)[:100], "no other is read")
    for key, value in {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "coft": False}.items():
        found = values.get(key, value)
        require(found == value, f"{name}: {key}", repr(value), repr(found)[:100], "this kind of adapter is not read")
    if kind == "OFT":
        return {"peft_type": kind, **_rotation(values, name)}
    key = "lora_alpha" if kind == "LORA" else "alpha"
    alpha, rank, rslora = values.get(key), values.get("r"), values.get("use_rslora", False)
    require(_positive(alpha), f"{name}: {key}", "a positive number", repr(alpha)[:100], CURE)
    require(rank is None or _positive(rank), f"{name}: r", "a positive number", repr(rank)[:100], CURE)
    require(isinstance(rslora, bool), f"{name}: use_rslora", "true or false", repr(rslora)[:100], CURE)
    patterns = {which: values.get(which) or {} for which in ("alpha_pattern", "rank_pattern")}
    for which, pattern in patterns.items():
        plain = isinstance(pattern, dict) and all(
            isinstance(layer, str) and layer.replace(".", "").replace("_", "").isalnum() and _positive(value)
            for layer, value in pattern.items()
        )
        require(plain, f"{name}: {which}", "a table of layer to number", repr(pattern)[:200], "name whole layers")
    return {"peft_type": kind, "alpha": alpha, "r": rank, "use_rslora": rslora, **patterns}


def _rotation(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How PEFT makes a rotation; `terms` is None where it inverts a matrix, else how far it expands the inverse."""
    series, terms = values.get("use_cayley_neumann", True), values.get("num_cayley_neumann_terms", 5)
    shared = values.get("block_share", False)
    flags = isinstance(series, bool) and isinstance(shared, bool)
    got = f"{series!r} and {shared!r}"[:100]
    require(flags, f"{name}: use_cayley_neumann and block_share", "true or false", got, CURE)
    few = type(terms) is int and 1 <= terms <= 32
    require(few, f"{name}: num_cayley_neumann_terms", "in [1, 32]", repr(terms)[:100], CURE)
    return {"terms": terms if series else None, "block_share": shared}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**40
