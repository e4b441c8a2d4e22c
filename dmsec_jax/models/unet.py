"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022; Podell et al., "SDXL", 2023. Architecture, config field names
and parameter paths are those of `diffusers.UNet2DConditionModel`.

Parameters are float32; inputs are cast to `cfg.dtype` at the door; norm statistics, softmax and output are float32.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.types import Key, Params
from dmsec_jax.models import conditioning, initial
from dmsec_jax.models.attention import Transformer2D
from dmsec_jax.models.layers import (
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    rematerialised,
    timestep_features,
)

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")

FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""Options of diffusers' `config.json` that have one value here: with another, the same weights mean another network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Field names of diffusers' `config.json`, defaults of SD 1.x; `dtype` (compute) and `remat` are ours.

    `attention_head_dim` is the NUMBER of heads (diffusers' misnomer), for all levels or one per level, finest first.
    `upcast_attention` is kept for the file's sake and changes nothing: softmax is always float32.
    `addition_embed_type="text_time"` is Stable Diffusion XL: the context then carries a pooled embedding and sizes, see `conditioning`;
    `projection_class_embeddings_input_dim` counts both, each size as `addition_time_embed_dim` sinusoidal features.
    `remat="block"` recomputes each residual and transformer block in the backward pass, "none" stores activations.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    dtype: str = "float32"
    remat: str = "none"

    @property
    def factor(self) -> int:
        """Sides of a latent must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled embedding that a context carries; 0 if it carries none."""
        if self.addition_embed_type is None:
            return 0
        return self.projection_class_embeddings_input_dim - conditioning.SIZES * self.addition_time_embed_dim

    @property
    def extra_rows(self) -> int:
        """Rows of a context below its tokens."""
        return conditioning.rows(self.pooled_width, self.cross_attention_dim) if self.addition_embed_type else 0


def init(key: Key, cfg: UNetConfig) -> Params:
    """Random float32 parameters; under `jax.eval_shape` their shapes alone.

    Raises:
        ValueError: on an unknown block type, dtype or remat policy, per-level settings of another length, or widths
            that heads or groups do not divide.
    """
    check_config(cfg)
    z_t = jax.ShapeDtypeStruct((1, cfg.factor, cfg.factor, cfg.in_channels), jnp.float32)
    t, context = (
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 1 + cfg.extra_rows, cfg.cross_attention_dim), jnp.float32),
    )
    return initial.init(key, UNet(cfg), z_t, t, context)


def apply(
    cfg: UNetConfig,
    params: Params,
    z_t: Float[Array, "B h w c"],
    t: Real[Array, "B"],
    context: Float[Array, "B L D"],
) -> Float[Array, "B h w out"]:
    """The network's prediction (noise, or v, as the schedule says), float32.

    Args:
        cfg: hashable, hence a static argument of `jax.jit`.
        params: as `init` makes them.
        z_t: noisy scaled latent; h and w multiples of `cfg.factor`.
        t: index into the schedule.
        context: text embedding, D = `cfg.cross_attention_dim`; for XL as `conditioning.pack` makes it.

    Raises:
        ValueError: on shapes that do not fit `cfg` or each other.
    """
    check_config(cfg)
    check_inputs(cfg, jnp.shape(z_t), jnp.shape(t), jnp.shape(context))
    return UNet(cfg).apply({"params": params}, z_t, t, context)


def per_level(value: int | tuple[int, ...], cfg: UNetConfig) -> tuple[int, ...]:
    """One value per level, from the finest down."""
    return (value,) * len(cfg.block_out_channels) if isinstance(value, int) else tuple(value)


def check_config(cfg: UNetConfig) -> None:
    """Raises ValueError on settings that this architecture does not have."""
    levels = len(cfg.block_out_channels)
    per_level_fields = ("down_block_types", "up_block_types", "attention_head_dim", "transformer_layers_per_block")
    for name in per_level_fields:
        value = getattr(cfg, name)
        ok = isinstance(value, int) or len(value) == levels
        require(ok, name, f"{levels} long like block_out_channels", value, "give one value per level")
    for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        for kind in getattr(cfg, name):
            require(
                kind in known, name, f"made of {' and '.join(known)}", repr(kind), "other blocks are not implemented"
            )
    for channels, heads in zip(cfg.block_out_channels, per_level(cfg.attention_head_dim, cfg), strict=True):
        for divisor, name in ((heads, "attention_head_dim"), (cfg.norm_num_groups, "norm_num_groups")):
            require(
                channels % divisor == 0,
                "block_out_channels",
                f"multiples of {name}={divisor}",
                channels,
                "change one of them",
            )
    kind = cfg.addition_embed_type
    require(kind in (None, "text_time"), "addition_embed_type", "None or 'text_time'", repr(kind), "use another model")
    if kind is not None:
        sizes, whole = cfg.addition_time_embed_dim, cfg.projection_class_embeddings_input_dim
        fits = sizes is not None and whole is not None and whole > conditioning.SIZES * sizes
        got = f"{whole} with addition_time_embed_dim={sizes}"
        contract = f"more than {conditioning.SIZES} times addition_time_embed_dim"
        require(fits, "projection_class_embeddings_input_dim", contract, got, "give both as the model's config does")
    require(
        cfg.dtype in ("float32", "bfloat16"), "dtype", "'float32' or 'bfloat16'", repr(cfg.dtype), "choose one of them"
    )


def check_inputs(cfg: UNetConfig, z_t: tuple[int, ...], t: tuple[int, ...], context: tuple[int, ...]) -> None:
    """Raises ValueError on shapes that do not fit `cfg` or each other."""
    latent = f"[B, h, w, {cfg.in_channels}]"
    require(
        len(z_t) == 4 and z_t[-1] == cfg.in_channels,
        "z_t",
        latent,
        f"shape {z_t}",
        "pass NHWC latents of this model's VAE",
    )
    divisible = z_t[1] % cfg.factor == 0 and z_t[2] % cfg.factor == 0
    require(
        divisible, "z_t", f"of height and width divisible by {cfg.factor}", f"shape {z_t}", "crop or resize the picture"
    )
    require(t == z_t[:1], "t", f"[B] = [{z_t[0]}]", f"shape {t}", "use jnp.full((B,), t)")
    fits = len(context) == 3 and context[0] == z_t[0] and context[2] == cfg.cross_attention_dim
    cure = "use the text encoder that belongs to this UNet, and one row per latent"
    if not fits or context[1] <= cfg.extra_rows:
        length = f"L > {cfg.extra_rows}" if cfg.extra_rows else "L"
        raise fail("context", f"[{z_t[0]}, {length}, {cfg.cross_attention_dim}]", f"shape {context}", cure)


class UNet(nn.Module):
    """(z_t [B, h, w, c], t [B], context [B, L, D]) -> [B, h, w, out] float32."""

    cfg: UNetConfig

    @nn.compact
    def __call__(self, z_t, t, context):
        cfg, widths = self.cfg, self.cfg.block_out_channels
        heads, depths = per_level(cfg.attention_head_dim, cfg), per_level(cfg.transformer_layers_per_block, cfg)
        levels = len(widths)
        waves = partial(timestep_features, flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift)
        time = TimestepEmbedding(4 * widths[0], cfg.dtype, name="time_embedding")(waves(t, widths[0]))
        if cfg.addition_embed_type is not None:
            context, pooled, sizes = conditioning.unpack(context, cfg.pooled_width)
            sizes = waves(sizes.reshape(-1), cfg.addition_time_embed_dim).reshape(len(pooled), -1)
            besides = jnp.concatenate([pooled.astype(jnp.float32), sizes], -1)
            time += TimestepEmbedding(4 * widths[0], cfg.dtype, name="add_embedding")(besides)
        context = context.astype(cfg.dtype)
        x = Conv(widths[0], dtype=cfg.dtype, name="conv_in")(z_t.astype(cfg.dtype))
        skips = [x]
        for i, kind in enumerate(cfg.down_block_types):
            attends = kind == "CrossAttnDownBlock2D"
            block = DownBlock(cfg, widths[i], heads[i], depths[i] * attends, i < levels - 1, name=f"down_blocks_{i}")
            x, outputs = block(x, time, context)
            skips += outputs
        x = MidBlock(cfg, widths[-1], heads[-1], depths[-1], name="mid_block")(x, time, context)
        for i, kind in enumerate(cfg.up_block_types):
            level, attends = levels - 1 - i, kind == "CrossAttnUpBlock2D"
            block = UpBlock(cfg, widths[level], heads[level], depths[level] * attends, level > 0, name=f"up_blocks_{i}")
            skips, used = skips[: -cfg.layers_per_block - 1], skips[-cfg.layers_per_block - 1 :]
            x = block(x, used, time, context)
        x = GroupNorm(cfg.norm_num_groups, cfg.norm_eps, cfg.dtype, True, name="conv_norm_out")(x)
        return Conv(cfg.out_channels, dtype=cfg.dtype, name="conv_out")(x).astype(jnp.float32)


class DownBlock(nn.Module):
    """Residual blocks, each followed by a transformer if `depth` > 0, then halving; also returns the skips."""

    cfg: UNetConfig
    features: int
    heads: int
    depth: int
    downsample: bool

    @nn.compact
    def __call__(self, x, time, context):
        outputs = []
        for i in range(self.cfg.layers_per_block):
            x = resnet(self.cfg, self.features, f"resnets_{i}")(x, time)
            if self.depth:
                x = transformer(self.cfg, self.heads, self.depth, f"attentions_{i}")(x, context)
            outputs.append(x)
        if self.downsample:
            x = Downsample(self.features, dtype=self.cfg.dtype, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """A transformer between two residual blocks."""

    cfg: UNetConfig
    features: int
    heads: int
    depth: int

    @nn.compact
    def __call__(self, x, time, context):
        x = resnet(self.cfg, self.features, "resnets_0")(x, time)
        x = transformer(self.cfg, self.heads, self.depth, "attentions_0")(x, context)
        return resnet(self.cfg, self.features, "resnets_1")(x, time)


class UpBlock(nn.Module):
    """Residual blocks that join one skip each, last first; each followed by a transformer if `depth` > 0; doubling."""

    cfg: UNetConfig
    features: int
    heads: int
    depth: int
    upsample: bool

    @nn.compact
    def __call__(self, x, skips, time, context):
        for i, skip in enumerate(reversed(skips)):
            x = resnet(self.cfg, self.features, f"resnets_{i}")(jnp.concatenate([x, skip], -1), time)
            if self.depth:
                x = transformer(self.cfg, self.heads, self.depth, f"attentions_{i}")(x, context)
        return Upsample(self.features, self.cfg.dtype, name="upsamplers_0")(x) if self.upsample else x


def resnet(cfg: UNetConfig, features: int, name: str) -> nn.Module:
    """A residual block of this network."""
    block = rematerialised(ResnetBlock, cfg.remat)
    return block(features, cfg.norm_num_groups, cfg.norm_eps, cfg.dtype, name=name)


def transformer(cfg: UNetConfig, heads: int, depth: int, name: str) -> nn.Module:
    """A transformer block of this network."""
    build = partial(
        rematerialised(Transformer2D, cfg.remat),
        groups=cfg.norm_num_groups,
        linear_projection=cfg.use_linear_projection,
    )
    return build(heads, depth, dtype=cfg.dtype, name=name)
