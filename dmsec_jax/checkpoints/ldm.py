"""What latent diffusion's own code calls the parameters that diffusers and transformers call otherwise.

Its files hold three networks under one roof: the UNet under `model.diffusion_model.`, the autoencoder under `first_stage_model.`, the text encoder
under `cond_stage_model.transformer.` (CLIP, in transformers' names; NovelAI leaves `text_model.` out) or `cond_stage_model.model.` (OpenCLIP).
Stable Diffusion XL has both, under `conditioner.embedders.`. Blocks are numbered through, so names depend on the whole tree.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dmsec_jax.checkpoints import mapping
from dmsec_jax.checkpoints.mapping import Rules, key_of
from dmsec_jax.core.trees import flatten
from dmsec_jax.core.types import Params
from dmsec_jax.models.clip import TextConfig

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.q_proj": "attn.q",  # q, k and v are one tensor in the file: see `split`
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
}


class Blocks(NamedTuple):
    """What the numbers of a UNet's blocks depend on: residual blocks per level, and the upward levels with attention."""

    layers: int
    attending: frozenset[str]


def blocks_of(target: Params) -> Blocks:
    """Of a UNet's parameter tree."""
    resnets = [name for name in target["down_blocks_0"] if name.startswith("resnets_")]
    ups = [name for name in target if name.startswith("up_blocks_")]
    return Blocks(len(resnets), frozenset(name[10:] for name in ups if "attentions_0" in target[name]))


def unet_rules(target: Params) -> Rules:
    """The spelling below `UNET`."""
    blocks = blocks_of(target)
    return Rules(names=_names(target, lambda key: unet_name(key, blocks)))


def ema_rules(target: Params) -> Rules:
    """The spelling below `EMA`, the running average of the UNet, where names have lost their dots."""
    blocks = blocks_of(target)
    names = _names(target, lambda key: f"diffusion_model.{unet_name(key, blocks)}".replace(".", ""))
    return Rules(names=names, ignored=("decay", "num_updates"))


def vae_rules(target: Params) -> Rules:
    """The spelling below `VAE`; what attention multiplies with may be 1x1 convolutions."""
    levels = sum(name.startswith("up_blocks_") for name in target["decoder"])
    return Rules(names=_names(target, lambda key: _vae_name(key, levels)))


def open_clip_rules(cfg: TextConfig, target: Params) -> Rules:
    """The spelling below `OPEN_CLIP`, after `split`; the last layer and the projection are not used by Stable Diffusion 2."""
    last = rf"transformer\.resblocks\.{cfg.num_hidden_layers}\..+"
    return Rules(
        names=_names(target, _open_clip_name), ignored=(last, r"text_projection\.weight", "logit_scale", "attn_mask")
    )


def open_clip_xl_rules(target: Params) -> Rules:
    """The spelling below `OPEN_CLIP_XL`, after `split`: the whole encoder and its projection."""
    names = _names(target, lambda key: _open_clip_name(key.removeprefix("text_model.")))
    return Rules(names=names, ignored=("logit_scale", "attn_mask"))


CLIP_RULES = mapping.TEXT_ENCODER
"""The spelling below `CLIP`."""


def split(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """OpenCLIP's `attn.in_proj_weight` and `_bias` as three views each, and its projection, which it multiplies from the right, as a layer's weight.

    What cannot be split stays, and is then complained about.
    """
    parts = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", key)
        if key == "text_projection":
            parts["text_projection.weight"] = tensor.T
        elif match and tensor.ndim and len(tensor) % 3 == 0:
            thirds = np.split(tensor, 3)
            parts |= {f"{match[1]}{name}.{match[2]}": third for name, third in zip("qkv", thirds, strict=True)}
        else:
            parts[key] = tensor
    return parts


def join(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split`."""
    joined = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn\.)([qkv])\.(weight|bias)", key)
        if key == "text_projection.weight":
            joined["text_projection"] = tensor.T
        elif match is None:
            joined[key] = tensor
        elif match[2] == "q":
            joined[f"{match[1]}in_proj_{match[3]}"] = np.concatenate(
                [state[f"{match[1]}{n}.{match[3]}"] for n in "qkv"]
            )
    return joined


def _names(target: Params, rename: Callable[[str], str]) -> dict[str, str]:
    """Name in the file -> key of diffusers, for every leaf of the tree."""
    keys = [key_of(path, Rules()) for path in flatten(target)]
    names = {rename(key): key for key in keys}
    assert len(names) == len(keys), "two parameters have one name"
    return names


def unet_name(key: str, blocks: Blocks) -> str:
    """Latent diffusion's name of a parameter, from diffusers'."""
    steps = blocks.layers + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
        side, level, kind, index, rest = match.groups()
        place = int(level) * steps + int(index) + (side == "down")
        block = f"{'input' if side == 'down' else 'output'}_blocks.{place}"
        return f"{block}.0.{_renamed(rest, UNET_RESNET)}" if kind == "resnets" else f"{block}.1.{rest}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
        return f"input_blocks.{(int(match[1]) + 1) * steps}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", key):
        level = int(match[1])
        place = 2 if match[1] in blocks.attending else 1
        return f"output_blocks.{level * steps + blocks.layers}.{place}.conv.{match[2]}"
    if match := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", key):
        return f"middle_block.{2 * int(match[1])}.{_renamed(match[2], UNET_RESNET)}"
    first = {
        "mid_block.attentions.0": "middle_block.1",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    return _renamed(key, first)


def _vae_name(key: str, levels: int) -> str:
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", key):
        return f"encoder.down.{match[1]}.{_vae_block(match[2])}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", key):
        return f"decoder.up.{levels - 1 - int(match[1])}.{_vae_block(match[2])}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.([01])\.(.+)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_vae_block(match[3])}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", key):
        return f"{match[1]}.mid.attn_1.{_renamed(match[2], VAE_ATTENTION)}"
    return key.replace(".conv_norm_out.", ".norm_out.")


def _vae_block(rest: str) -> str:
    rest = re.sub(r"^resnets\.(\d+)\.", r"block.\1.", rest).replace("conv_shortcut.", "nin_shortcut.")
    return rest.replace("downsamplers.0.conv.", "downsample.conv.").replace("upsamplers.0.conv.", "upsample.conv.")


def _open_clip_name(key: str) -> str:
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", key):
        return f"transformer.resblocks.{match[1]}.{_renamed(match[2], TEXT_LAYER)}"
    if key == "embeddings.position_embedding.weight":
        return "positional_embedding"
    return _renamed(key, {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"})


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """The key with its layer's name, all but `weight` or `bias`, replaced; unchanged if the table lacks it."""
    for old, new in table.items():
        if key.startswith(f"{old}."):
            return f"{new}.{key.removeprefix(f'{old}.')}"
    return key
