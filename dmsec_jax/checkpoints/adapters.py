"""LoRA and its relatives as people share them, read strictly onto the parameter tree, and our own, written for other programs.

A key is `<layer>.<factor>`. How layers are spelt (here `to_q` of the UNet, and of the text encoder):

    PEFT           unet.down_blocks.0 ... attn1.to_q.lora_A.weight             text_encoder.text_model.encoder ... q_proj.lora_A.weight
    old diffusers  unet.down_blocks.0 ... attn1.processor.to_q_lora.down.weight  text_encoder ... self_attn.to_q_lora.down.weight
    kohya          lora_unet_down_blocks_0 ... attn1_to_q.lora_down.weight     lora_te_text_model_encoder ... q_proj.lora_down.weight

Kohya's files for Stable Diffusion XL number the UNet's blocks as latent diffusion does: lora_unet_input_blocks_4_1 ... attn1_to_q; its second text
encoder is text_encoder_2 or lora_te2.

The scale alpha / rank stands in a tensor `<layer>.alpha`, in the header's metadata, or in PEFT's `adapter_config.json` beside the file; where
there is none it is 1.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.checkpoints import changes, ldm, links, mapping
from dmsec_jax.checkpoints.adapter_scales import CONFIG, Scales, read_scales
from dmsec_jax.checkpoints.changes import Change, Shape
from dmsec_jax.checkpoints.io import PICKLES, read_metadata, read_tensors
from dmsec_jax.checkpoints.mapping import Partial, Problem
from dmsec_jax.checkpoints.torch_archive import read as read_archive
from dmsec_jax.core import spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.trees import flatten, unflatten
from dmsec_jax.core.types import Params

DOTTED = {
    "unet": ("unet.", ""),
    "text_encoder": ("text_encoder.text_model.", "text_encoder.", "text_model.", ""),
    "text_encoder_2": ("text_encoder_2.",),
}
"""What stands before a layer's name in PEFT and diffusers; nothing where the file is of one network."""
KOHYA = {
    "unet": ("lora_unet_", "oft_unet_"),
    "text_encoder": ("lora_te_text_model_", "lora_te1_text_model_"),
    "text_encoder_2": ("lora_te2_",),
}
OLD = (
    (r"(.+)\.processor\.to_out_lora", r"\1.to_out.0"),
    (r"(.+)\.processor\.(to_[qkv])_lora", r"\1.\2"),
    (r"(.+\.self_attn)\.to_(q|k|v|out)_lora", r"\1.\2_proj"),
)
"""Layers as diffusers named them before 0.22, and their names now."""
FACTORS = (
    (r"(?:lora\.|lora_|lora_linear_layer\.)?(down|up|mid)\.weight", None),
    (r"lora_A(?:\.default)?\.weight", "down"),
    (r"lora_B(?:\.default)?\.weight", "up"),
    (r"(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|alpha|dora_scale|oft_blocks|rescale|diff)", None),
    (r"(oft_R)(?:\.default)?\.weight", None),
    (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", "lora_magnitude_vector"),
)
"""Spellings of factors, and what they are called here (None: as in the group)."""
PEFT = "base_model.model."
"""What PEFT puts before every key that it saves itself."""
NAMES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
LAYOUTS = {
    "kohya": r"(lora_(unet|te[12]?)|oft_unet)_",
    "old diffusers": r".*(_lora|\.lora|lora_linear_layer)\.(down|up)\.",
    "PEFT": r"",
}
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
NOT_AN_ADAPTER = "name the file of a LoRA, LoCon, LoHa, LoKr, DoRA or OFT for Stable Diffusion 1.x, 2.x or XL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a file says: part ("unet", "text_encoder") -> path of a kernel in our tree -> its change."""

    changes: Mapping[str, Mapping[str, Change]]
    layout: str
    metadata: Mapping[str, str]


def read_adapter(path: str | Path, targets: Mapping[str, Params], partial: Partial | None = None) -> Adapter:
    """Reads an adapter for the networks `targets`: part -> tree of anything with `.shape`.

    Args:
        path: a .safetensors file, a PyTorch file, or the folder that diffusers or PEFT saved it in.
        targets: of the base model; the kernels of "unet" and the text encoders are what can be changed, other parts are not looked at.
        partial: leave to pass over layers that are not complete or do not fit, and a record of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on a damaged file; one that holds nothing for these networks, or anything else than complete, finite changes of their
            kernels (one error that lists every missing, unused, mis-shaped, doubly given or otherwise wrong key); or if its scale is unknown.
    """
    path = find_file(Path(path))
    state, metadata = read_state(path)
    found, problems = compare(state, targets, read_scales(path, metadata), str(path))
    if partial is not None and found:
        partial.problems += problems
        problems = []
    if problems:
        raise mapping.complaint(str(path), "complete changes of kernels of the base model", problems, NOT_AN_ADAPTER)
    return Adapter(changes=found, layout=layout_of(state), metadata=metadata)


def merge(params: Mapping[str, Params], adapter: Adapter, strength: float = 1.0) -> dict[str, Params]:
    """The networks with the changes in their kernels, float32 NumPy arrays where something changed.

    Args:
        params: part -> parameters; those that the adapter was read for, and perhaps others, which stay.
        strength: multiplies what the adapter does: 0 is the base model, 1 as trained.
    """
    merged = dict(params)
    for part, own in adapter.changes.items():
        flat = flatten(params[part])
        for path, change in own.items():
            kernel = np.asarray(spread.to_host(flat[path]), np.float32)
            moved = changes.changed(torch_layout(kernel).reshape(torch_shape(kernel.shape)), change, strength)
            flat[path] = _ours(moved, kernel.ndim)
        merged[part] = unflatten(flat)
    return merged


def low_rank(adapter: Adapter, targets: Mapping[str, Params]) -> dict[str, Params]:
    """The changes kept apart: part -> tree of `.../down` and `.../up`, the trainable tree of `finetune.lora.lora(1)`, whose scale is 1 whatever the
    factors' rank; each layer's own scale is multiplied into `up`.

    Raises:
        ValueError: if some changes are not plain LoRA (lists them); those can only be merged.
    """
    trees = {}
    for part, own in adapter.changes.items():
        others = [path for path, change in own.items() if change.family != "LoRA" or change.magnitude is not None]
        require(not others, f"the adapter's {part}", "plain LoRA", f"another kind at {', '.join(others)}", "merge it")
        flat, shapes = {}, flatten(targets[part])
        for path, change in own.items():
            shape = tuple(shapes[path].shape)
            up, down = changes.low_rank(change.factors, torch_shape(shape))
            layer = path.removesuffix("/kernel")
            flat[f"{layer}/down"] = _ours(down, len(shape))
            flat[f"{layer}/up"] = np.ascontiguousarray(up.T) * np.float32(change.ratio)
        trees[part] = unflatten(flat)
    return trees


def find_file(path: Path) -> Path:
    """The adapter's file, `path` itself or inside the folder `path`, out of which no link may lead."""
    if not path.is_dir():
        return path
    there = [path / name for name in NAMES if (path / name).is_file()]
    require(len(there) == 1, str(path), f"a folder with one of {', '.join(NAMES)}", len(there), "name the file itself")
    links.require_inside(path)
    return there[0]


def read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors or PyTorch file; nothing in it is executed."""
    if path.suffix in PICKLES:
        return read_archive(path), {}
    return read_tensors(path), read_metadata(path)


def is_adapter(keys: Collection[str]) -> bool:
    """Whether tensors of these names are an adapter, at least in part."""
    return any(split_key(key) is not None for key in keys)


def layout_of(keys: Collection[str]) -> str:
    """How the layers of an adapter are spelt."""
    return next(name for name, pattern in LAYOUTS.items() if any(re.match(pattern, key) for key in keys))


def compare(
    state: Mapping[str, np.ndarray], targets: Mapping[str, Params], scales: Scales, name: str
) -> tuple[dict[str, dict[str, Change]], list[Problem]]:
    """The changes that a state dict holds, and what is wrong with it; arguments as of `read_adapter`, which raises instead."""
    peft = any(key.startswith(PEFT) for key in state) and not any(key.endswith(".alpha") for key in state)
    require(
        bool(scales.tables) or not peft, name, f"beside PEFT's {CONFIG}, which holds its scale", "none", "copy it there"
    )
    spelt, kernels = _spellings(targets), {part: flatten(tree) for part, tree in targets.items()}
    layers: dict[tuple[str, str], dict[str, str]] = {}
    problems: list[Problem] = []
    for key, tensor in state.items():
        layer, factor = split_key(key) or ("", "")
        place = spelt.get(layer)
        if place is None:
            problems.append(("unused", f"{key} {list(tensor.shape)}"))
        elif factor in layers.setdefault(place, {}):
            problems.append(("given twice", f"{key} and {layers[place][factor]}"))
        elif tensor.dtype.kind not in "fV":
            problems.append(("not floating point", f"{key} {tensor.dtype}"))
        else:
            layers[place][factor] = key
    if not state:
        problems.append(("missing", "any tensor"))
    found: dict[str, dict[str, Change]] = {}
    for (part, path), keys in layers.items():
        tensors = {factor: np.array(state[key], np.float32) for factor, key in keys.items()}
        kernel = torch_shape(kernels[part][path].shape)
        wrong = list(_wrong(tensors, keys, kernel))
        if not wrong and "oft_R" in tensors:
            wrong = list(_peft_oft_wrong(tensors["oft_R"], keys["oft_R"], kernel, scales.of(part)))
        if not wrong:
            found.setdefault(part, {})[path] = _change(tensors, kernel, scales, part, path)
        problems += wrong
    return found, problems


def _wrong(tensors: Mapping[str, np.ndarray], keys: Mapping[str, str], kernel: Shape) -> Iterator[Problem]:
    """What is wrong with the tensors of one layer."""
    factors = tensors.keys() - {"alpha", *MAGNITUDES}
    families = sorted({changes.family_of(factor) for factor in factors})
    where = next(iter(keys.values()))
    if len(families) != 1:
        yield "incomplete" if not families else "of several families", f"{where} and what belongs to it: {families}"
        return
    parts = changes.needed(families[0], factors)
    yield from (("missing", f"{factor} beside {where}") for factor in parts if factor not in factors)
    yield from (("unused", keys[factor]) for factor in factors - set(parts))
    if factors != set(parts):
        return
    for factor, shape in changes.misfits({factor: tensors[factor] for factor in parts}, kernel).items():
        yield "mis-shaped", f"{keys[factor]} {list(tensors[factor].shape)}, expected {shape}"
    for factor, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            yield "not finite", keys[factor]
    if families == ["OFT"]:
        yield from _oft_wrong(tensors, keys)
    elif "alpha" in tensors and not (tensors["alpha"].size == 1 and tensors["alpha"].item() > 0):
        yield "not a positive number", f"{keys['alpha']} {list(tensors['alpha'].shape)}"
    for factor in tensors.keys() & set(MAGNITUDES):
        if changes.magnitude_shape(factor, tensors[factor].shape, kernel) is None:
            yield "mis-shaped", f"{keys[factor]} {list(tensors[factor].shape)}, expected [{kernel[0]}, 1]"
    if tensors.keys() >= set(MAGNITUDES):
        yield "given twice", " and ".join(keys[factor] for factor in MAGNITUDES)


def _oft_wrong(tensors: Mapping[str, np.ndarray], keys: Mapping[str, str]) -> Iterator[Problem]:
    """OFT's alpha bounds the blocks, and programs differ in what it is multiplied by: it is read where it bounds nothing, or is 0."""
    if "oft_R" in tensors:  # PEFT's; an alpha beside it has no meaning
        yield from (("unused", keys[factor]) for factor in tensors.keys() & {"alpha"})
        return
    blocks, alpha = tensors["oft_blocks"], tensors.get("alpha", np.zeros(1))
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        return  # mis-shaped, which is said elsewhere
    size = np.linalg.norm(blocks - blocks.swapaxes(-1, -2))
    if alpha.size != 1 or not (alpha.item() == 0 or alpha.item() >= size):
        yield "a constraint that programs read differently", f"{keys['alpha']}, with blocks of norm {size:.4g}"


def _peft_oft_wrong(upper: np.ndarray, key: str, kernel: Shape, table: Mapping[str, Any]) -> Iterator[Problem]:
    """The same numbers mean another rotation under other settings."""
    if table.get("peft_type") != "OFT":
        yield "without PEFT's configuration of it", key
    elif len(upper) == 1 and not table["block_share"] and changes.side_of(upper) != math.prod(kernel[1:]):
        yield "one block for all, which its configuration does not say", key


def _change(tensors: Mapping[str, np.ndarray], kernel: Shape, scales: Scales, part: str, path: str) -> Change:
    factors = {factor: tensor for factor, tensor in tensors.items() if factor not in ("alpha", *MAGNITUDES)}
    if "oft_R" in factors:
        return Change("OFT", factors, 1.0, None, scales.of(part)["terms"])
    rank = changes.rank(factors)
    if "alpha" in tensors:
        ratio = 1.0 if rank is None else tensors["alpha"].item() / rank
    else:
        ratio = scales.ratio(part, layer_of(path), rank)
    magnitude = None
    for name in tensors.keys() & set(MAGNITUDES):
        magnitude = tensors[name].reshape(changes.magnitude_shape(name, tensors[name].shape, kernel))
    return Change(changes.family_of(next(iter(factors))), factors, ratio, magnitude)


def split_key(key: str) -> tuple[str, str] | None:
    """Layer in today's spelling, and factor, of a key; None if it is no adapter's."""
    for pattern, factor in FACTORS:
        if match := re.fullmatch(r"(.+?)\." + pattern, key):
            layer = match[1].removeprefix(PEFT)
            for old, new in OLD:
                if renamed := re.fullmatch(old, layer):
                    layer = renamed.expand(new)
            return layer, match[2] if factor is None else factor
    return None


def _spellings(targets: Mapping[str, Params]) -> dict[str, tuple[str, str]]:
    """Every way to write a layer -> its part and the path of its kernel."""
    spelt: dict[str, tuple[str, str]] = {}
    blocks = ldm.blocks_of(targets["unet"]) if "unet" in targets else None
    for part in DOTTED.keys() & targets.keys():
        for path in flatten(targets[part]):
            if path.endswith("/kernel"):
                layer = layer_of(path)
                names = [prefix + layer for prefix in DOTTED[part]]
                spoken = [layer] if part != "unet" else {layer, ldm.unet_name(f"{layer}.weight", blocks)[:-7]}
                names += [prefix + name.replace(".", "_") for prefix in KOHYA[part] for name in spoken]
                assert not spelt.keys() & set(names), f"two layers are spelt {names}"
                spelt |= dict.fromkeys(names, (part, path))
    return spelt


def layer_of(path: str) -> str:
    """The name of a kernel's layer in diffusers and transformers, without what stands before it in a file."""
    return mapping.key_of(path, mapping.Rules()).removesuffix(".weight")


def torch_shape(shape: Shape) -> Shape:
    """[I, O] or [h, w, I, O] -> [O, I, h, w]."""
    window, (inputs, outputs) = shape[:-2] or (1, 1), shape[-2:]
    return (outputs, inputs, *window)


def torch_layout(kernel: np.ndarray) -> np.ndarray:
    """[I, O] -> [O, I], [h, w, I, O] -> [O, I, h, w]."""
    return np.transpose(kernel, (3, 2, 0, 1)) if kernel.ndim == 4 else kernel.T


def _ours(kernel: np.ndarray, rank: int) -> np.ndarray:
    """[O, I, h, w] -> [h, w, I, O], or [I, O] for a linear layer."""
    ours = np.transpose(kernel, (2, 3, 1, 0)) if rank == 4 else kernel[:, :, 0, 0].T
    return np.ascontiguousarray(ours, np.float32)
