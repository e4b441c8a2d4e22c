"""What a LoRA is multiplied by, alpha / rank, as diffusers and PEFT write it down beside the tensors."""

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
CURE = "download it again, or ask its author for the whole adapter"


class Scales(NamedTuple):
    """PEFT's configuration of each part ("" for all of them); empty if nothing is written down."""

    tables: Mapping[str, Mapping[str, Any]]

    def ratio(self, part: str, layer: str, rank: int) -> float:
        """alpha / rank of a layer, 1 if nothing is written down."""
        table = self.tables.get(part, self.tables.get(""))
        if table is None:
            return 1.0
        own = [alpha for name, alpha in table["alpha_pattern"].items() if f".{layer}".endswith(f".{name}")]
        alpha = own[0] if own else table["lora_alpha"]
        return alpha / (math.sqrt(rank) if table["use_rslora"] else rank)


def read_scales(path: Path, metadata: Mapping[str, str]) -> Scales:
    """What the header's metadata, or else PEFT's configuration beside the file, says.

    Raises:
        ValueError: if it is damaged, or describes something else than a LoRA whose scales are given layer by layer.
    """
    beside = path.with_name(CONFIG)
    if METADATA in metadata:
        name = f"{METADATA} of {path}"
        try:
            values = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise fail(name, "JSON", str(error)[:200], CURE) from error
        require(isinstance(values, dict), name, "one JSON object", type(values).__name__, CURE)
    elif path.name.startswith("adapter_model.") and beside.is_file():
        name, values = str(beside), read_json(beside)
    else:
        return Scales({})
    parts = {key.partition(".")[0] for key in values if key.endswith(".lora_alpha")}
    cut = lambda part: {key.removeprefix(f"{part}."): v for key, v in values.items() if key.startswith(f"{part}.")}
    return Scales({part: _table(cut(part), name) for part in parts} if parts else {"": _table(values, name)})


def _table(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind, alpha, rslora = values.get("peft_type", "LORA"), values.get("lora_alpha"), values.get("use_rslora", False)
    patterns = values.get("alpha_pattern") or {}
    require(kind == "LORA", f"{name}: peft_type", "'LORA'", repr(kind)[:100], "only LoRA is read in this layout")
    for key, value in {"bias": "none", "fan_in_fan_out": False, "lora_bias": False}.items():
        found = values.get(key, value)
        require(found == value, f"{name}: {key}", repr(value), repr(found)[:100], "this kind of LoRA is not read")
    require(_positive(alpha), f"{name}: lora_alpha", "a positive number", repr(alpha)[:100], CURE)
    require(isinstance(rslora, bool), f"{name}: use_rslora", "true or false", repr(rslora)[:100], CURE)
    plain = isinstance(patterns, dict) and all(
        isinstance(key, str) and key.replace(".", "").replace("_", "").isalnum() and _positive(value)
        for key, value in patterns.items()
    )
    require(plain, f"{name}: alpha_pattern", "a table of layer to number", repr(patterns)[:200], "name whole layers")
    return {"lora_alpha": alpha, "use_rslora": rslora, "alpha_pattern": patterns}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**40
