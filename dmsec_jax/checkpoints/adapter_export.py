"""Our LoRA, OFT and changes of whole weights, written as other programs read them.

LoRA      diffusers   what `StableDiffusionPipeline.load_lora_weights` reads, and ComfyUI
          kohya       what A1111 and ComfyUI read, and diffusers with fewer kinds of layers
OFT       PEFT        a folder that `peft.PeftModel.from_pretrained` puts on a network of diffusers; A1111 and ComfyUI rotate outputs, ours rotates
                      inputs, so that for them the difference of the kernels is written
any       kohya       that difference, `diff`, which A1111 and ComfyUI read
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.checkpoints.adapters import DOTTED, KOHYA, layer_of, torch_layout
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import atomic_folder, write_json
from dmsec_jax.core.trees import flatten
from dmsec_jax.core.types import Params

LAYOUTS = ("diffusers", "kohya")
OFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


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


def write_oft(
    folder: str | Path,
    trainable: Params,
    cayley: str = "reference",
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the trainable tree of `finetune.oft` of one network as PEFT's `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        folder: made where it is not there; one for each network.
        trainable: tree of `.../generator` [blocks, side, side], constrained already where a radius was set.
        cayley: the convention that it was trained with.
        dtype, metadata: as of `write_lora`.

    Raises:
        ValueError: on a tree without OFT or with anything else, layers of different numbers of blocks, or a folder of something else.
        OSError: if a file cannot be written.
    """
    tensors, layers, counts = {}, [], set()
    for path, leaf in flatten(trainable).items():
        place, _, name = path.rpartition("/")
        require(name == "generator", "trainable", "made of generators", path, "only OFT is written in this layout")
        blocks = np.asarray(leaf, np.float32)
        skew = (blocks - blocks.transpose(0, 2, 1)) / 2 * (1 if cayley == "reference" else -1)
        rows, columns = np.triu_indices(skew.shape[1], 1)
        layers.append(layer_of(f"{place}/kernel"))
        tensors[f"base_model.model.{layers[-1]}.oft_R.weight"] = skew[:, rows, columns]
        counts.add(len(blocks))
    require(len(counts) == 1, "trainable", "OFT with one number of blocks", sorted(counts), "write the trained tree")
    config: dict[str, Any] = {"peft_type": "OFT", "r": counts.pop(), "oft_block_size": 0, "target_modules": layers}
    config |= {"use_cayley_neumann": False, "coft": False, "block_share": False, "bias": "none", "task_type": None}
    notes = {"format": "pt"} | dict(metadata or {})
    weights, description = OFT_FILES
    with atomic_folder(folder, description) as part:
        write_tensors(part / weights, tensors, dtype=dtype, metadata=notes)
        write_json(part / description, config)


def write_difference(
    path: str | Path,
    base: Mapping[str, Params],
    tuned: Mapping[str, Params],
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes what a fine-tuning changed in the kernels of the UNet and the text encoders, as large as these kernels are.

    Args:
        base, tuned: part -> parameters; kernels that are equal are left out.
        dtype, metadata: as of `write_lora`.

    Raises:
        ValueError: if no kernel differs, or something else does, for which this layout has no place (lists it).
        OSError: if the file cannot be written.
    """
    prefixes = {
        part: names[-1] if part == "text_encoder" and "text_encoder_2" in base else names[0]
        for part, names in KOHYA.items()
    }
    tensors, others = {}, []
    for part, tree in tuned.items():
        before = flatten(base[part])
        for name, leaf in flatten(tree).items():
            change = np.asarray(leaf, np.float32) - np.asarray(before[name], np.float32)
            if not change.any():
                continue
            if part in prefixes and name.endswith("/kernel"):
                tensors[f"{prefixes[part]}{layer_of(name).replace('.', '_')}.diff"] = torch_layout(change)
            else:
                others.append(f"{part}/{name}")
    require(not others, "tuned", "different in kernels alone", ", ".join(others[:20]), "write the whole model")
    require(bool(tensors), "tuned", "different from the base model", "equal kernels", "write another model")
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
