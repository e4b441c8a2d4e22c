"""Vision transformers whose class token describes a picture: CLIP's image tower and DINO's ViT.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021; Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021.

The weights are not ours to ship: `checkpoints.feature_networks` reads the user's own. Parameter paths are those of
`transformers.CLIPVisionModel` for both, its spelling of `pre_layrnorm` included.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Image, Key, Params
from dmsec_jax.models import clip, initial
from dmsec_jax.models.clip import TowerConfig
from dmsec_jax.models.layers import unit
from dmsec_jax.models.preprocessing import CLIP, IMAGENET, Preprocessing, preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """Field names of `transformers.CLIPVisionConfig`, defaults of CLIP ViT-L/14; the last two are ours.

    `first_norm`: a norm before the first layer (CLIP); `patch_bias`: of the convolution that cuts patches (DINO).
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    first_norm: bool = True
    patch_bias: bool = False

    @property
    def patches(self) -> int:
        """Along a side."""
        return self.image_size // self.patch_size


DINO_S16 = VisionConfig(
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=6,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    first_norm=False,
    patch_bias=True,
)
"""ViT-S/16 of DINO (`dino_deitsmall16_pretrain.pth`)."""
LAST = 4
"""Layers whose class tokens DINO's authors join for their linear evaluation of ViT-S."""


class VisionOutput(NamedTuple):
    """Float32: tokens after the last layer, without norm; the class token after each layer, through the final norm."""

    last_hidden: Float[Array, "B N D"]
    classes: Float[Array, "B layers D"]


def init(key: Key, cfg: VisionConfig) -> Params:
    """Random float32 parameters.

    Raises:
        ValueError: on sizes that do not divide, or an unknown activation or dtype.
    """
    check(cfg)
    image = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
    return initial.init(key, VisionModel(cfg), image)


def check(cfg: VisionConfig) -> None:
    """Raises ValueError on settings that this architecture does not have."""
    clip.check_config(cfg)
    whole = cfg.image_size % cfg.patch_size == 0
    require(whole, "image_size", f"a multiple of patch_size={cfg.patch_size}", cfg.image_size, "change one")


def apply(cfg: VisionConfig, params: Params, x: Image) -> VisionOutput:
    """Tokens of input that is already preprocessed, `image_size` pixels high and wide; the `..._features` take pictures.

    Raises:
        ValueError: on another size, or what `check` refuses.
    """
    check(cfg)
    side, shape = cfg.image_size, jnp.shape(x)
    require(shape[1:] == (side, side, 3), "x", f"[B, {side}, {side}, 3]", f"shape {shape}", "use preprocess")
    return VisionModel(cfg).apply({"params": params}, x)


def clip_preprocessing(cfg: VisionConfig) -> Preprocessing:
    """CLIP's: shorter side to the network's size, bicubic."""
    return Preprocessing(cfg.image_size, cfg.image_size, *CLIP, "cubic")


def dino_preprocessing(cfg: VisionConfig) -> Preprocessing:
    """DINO's evaluation: shorter side to 8/7 of the network's size (256 for 224), bicubic."""
    return Preprocessing(cfg.image_size * 8 // 7, cfg.image_size, *IMAGENET, "cubic")


def dino_features(cfg: VisionConfig, params: Params, image: Image, *, last: int = 1) -> Float[Array, "B D"]:
    """Class tokens of the `last` layers side by side, of unit length, of pictures [B, H, W, 3] in [-1, 1].

    One is what "DINO similarity" compares; `LAST` is DINO's linear evaluation.
    """
    found = apply(cfg, params, preprocess(image, dino_preprocessing(cfg))).classes[:, -last:]
    return unit(rearrange(found, "b n d -> b (n d)"))


class VisionModel(nn.Module):
    """x [B, H, W, 3] -> `VisionOutput`."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        x = Embeddings(cfg, name="embeddings")(x)
        if cfg.first_norm:
            x = clip.layer_norm(cfg, "pre_layrnorm")(x)
        x, states = clip.Encoder(cfg, name="encoder")(x.astype(cfg.dtype))
        classes = jnp.stack([state[:, 0] for state in states[1:]], axis=1)
        classes = clip.layer_norm(cfg, "post_layernorm")(classes)
        return VisionOutput(x.astype(jnp.float32), classes.astype(jnp.float32))


class Embeddings(nn.Module):
    """The class token and linear images of the patches, row by row, plus learnt positions; added in float32."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        patches = Patches(cfg, name="patch_embedding")(x)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,), jnp.float32)
        first = jnp.broadcast_to(first, (x.shape[0], 1, cfg.hidden_size))
        table = nn.Embed(cfg.patches**2 + 1, cfg.hidden_size, name="position_embedding")
        return jnp.concatenate([first, patches], axis=1) + table(jnp.arange(cfg.patches**2 + 1))


class Patches(nn.Module):
    """A convolution whose stride is its size, as one matrix product: kernel [p, p, 3, D]."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, x):
        cfg, p = self.cfg, self.cfg.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, p, 3, cfg.hidden_size), jnp.float32)
        flat = rearrange(x, "b (i p) (j q) c -> b (i j) (p q c)", p=p, q=p)
        out = flat @ kernel.reshape(-1, cfg.hidden_size)
        if cfg.patch_bias:
            out = out + self.param("bias", nn.initializers.zeros, (cfg.hidden_size,), jnp.float32)
        return out
