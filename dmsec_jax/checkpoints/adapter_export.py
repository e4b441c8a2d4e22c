"""Our LoRA written as other programs read it.

diffusers   what `StableDiffusionPipeline.load_lora_weights` reads, and ComfyUI
kohya       what A1111 and ComfyUI read, and diffusers with fewer kinds of layers
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dmsec_jax.checkpoints.adapters import DOTTED, KOHYA, layer_of, torch_layout
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core.checks import require
from dmsec_jax.core.trees import flatten
from dmsec_jax.core.types import Params

LAYOUTS = ("diffusers", "kohya")


def write_lora(
    path: str | Path,
    trainable: Mapping[str, Params],
    ratio: float = 1.0,
    layout: str = "diffusers",
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the trainable tree of `finetune.lora` as a safetensors file.

    Args:
        path: the file; folders on the way are made.
        trainable: part ("unet", "text_encoder") -> tree of `.../down` and `.../up`.
        ratio: alpha / rank of all layers. It is multiplied into `up` for diffusers, so that no reader can miss it; kohya's layout has a place for it.
        layout: one of `LAYOUTS`.
        dtype: "float32", "float16" or "bfloat16".
        metadata: free text for the header.

    Raises:
        ValueError: on another layout, an unknown part, a tree without a LoRA or with anything else, or what `io.write_tensors` refuses.
        OSError: if the file cannot be written.
    """
    require(layout in LAYOUTS, "layout", f"one of {', '.join(LAYOUTS)}", repr(layout), "choose one of them")
    unknown = sorted(trainable.keys() - DOTTED.keys())
    require(not unknown, "trainable", f"made of {', '.join(DOTTED)}", ", ".join(unknown), "put the tree under its part")
    tensors = {}
    kohya = {part: names[0] for part, names in KOHYA.items()}
    if "text_encoder_2" in trainable:
        kohya["text_encoder"] = KOHYA["text_encoder"][1]
    for part, tree in trainable.items():
        for layer, down, up in _layers(tree):
            if layout == "diffusers":
                name = DOTTED[part][0] + layer
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * np.float32(ratio)}
            else:
                name = kohya[part] + layer.replace(".", "_")
                alpha = np.float32(ratio * len(down))
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    require(bool(tensors), "trainable", "a LoRA", "an empty tree", "write the tree that was trained")
    write_tensors(path, tensors, dtype=dtype, metadata={"format": "pt"} | dict(metadata or {}))


def _layers(tree: Params) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(layer, down [r, I] or [r, I, h, w], up [O, r] or [O, r, 1, 1]) in PyTorch's layout."""
    factors = flatten(tree)
    for path, leaf in factors.items():
        place, _, name = path.rpartition("/")
        pair = {"down", "up"} == {factor for factor in ("down", "up") if f"{place}/{factor}" in factors}
        require(pair and name in ("down", "up"), "trainable", "made of down and up", path, "only a LoRA is written")
        if name == "down":
            down, up = np.asarray(leaf), np.asarray(factors[f"{place}/up"])
            up = up[None, None] if down.ndim == 4 else up
            yield layer_of(f"{place}/kernel"), torch_layout(down), torch_layout(up)
