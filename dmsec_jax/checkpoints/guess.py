"""Which base model an adapter is for: its shapes tell, and where they do not, what its trainer noted."""

import re
from collections.abc import Mapping

import numpy as np

from dmsec_jax.checkpoints.adapters import split_key
from dmsec_jax.checkpoints.changes import side_of

XL = 2048
"""Width of the text that Stable Diffusion XL is conditioned on."""
DEEP = re.compile(r"transformer_blocks[._][1-9]\d*[._]")
"""Only the transformers of Stable Diffusion XL have a second layer."""
TWO_ENCODERS = re.compile(r"lora_te[12]_|text_encoder_2\.")
KEYS_OF_TEXT = re.compile(r".*attn2[._]to_k")
INPUTS_OF_ENCODER = re.compile(r"(lora_te_|text_encoder\.|text_model\.).*(self_attn[._][qkv]_proj|mlp[._]fc1)")
NOTES = ("ss_base_model_version", "modelspec.architecture")
"""Entries of the metadata that say it: sd_v1, sd_v2_v, sdxl_base_v1-0; stable-diffusion-v1, stable-diffusion-xl-v1-base."""
WORDS = (("xl", XL), ("v2", 1024), ("v1", 768))


def text_width(state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[int, str] | None:
    """The width of the text that the base model's UNet is conditioned on, and what says so: "its shapes" or an entry of the metadata.

    None if nothing says it, or things contradict each other.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in state.items():
        layer, factor = split_key(key) or ("", "")
        layers.setdefault(layer, {})[factor] = tensor
    found = {width for layer, factors in layers.items() if (width := _told(layer, factors)) is not None}
    if found:
        return (found.pop(), "its shapes") if len(found) == 1 else None
    for note in NOTES:
        for word, width in WORDS:
            if word in metadata.get(note, "").lower():
                return width, note
    return None


def _told(layer: str, factors: Mapping[str, np.ndarray]) -> int | None:
    if TWO_ENCODERS.match(layer) or DEEP.search(layer):
        return XL
    if KEYS_OF_TEXT.fullmatch(layer) or INPUTS_OF_ENCODER.fullmatch(layer):
        return _inputs(factors)
    return None


def _inputs(factors: Mapping[str, np.ndarray]) -> int | None:
    """Width of what a linear layer is given."""
    matrices = {name: tensor for name, tensor in factors.items() if tensor.ndim >= 2}
    second = lambda *names: next((matrices[name].shape[1] for name in names if name in matrices), None)
    if (whole := second("down", "hada_w1_b", "diff")) is not None:
        return whole
    if "oft_R" in matrices:
        return len(matrices["oft_R"]) * side_of(matrices["oft_R"])
    sides = second("lokr_w1", "lokr_w1_b"), second("lokr_w2", "lokr_w2_b")
    return None if None in sides else sides[0] * sides[1]
