"""Variational autoencoder of Stable Diffusion (AutoencoderKL; Kingma & Welling 2014, Rombach et al. 2022).

Latents here are unscaled: multiply by `scaling_factor` before diffusion, divide before decoding (the pipeline does both).
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dmsec_jax.core.checks import require
from dmsec_jax.models import initial
from dmsec_jax.models.attention import attention
from dmsec_jax.models.layers import Conv, Downsample, GroupNorm, ResnetBlock, Upsample, rematerialised


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Architecture, with the field names of diffusers' `config.json`; `dtype` (compute) and `remat` are ours.

    `remat="block"` recomputes each residual block in the backward pass, "none" stores activations.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512
    mid_block_add_attention: bool = True
    dtype: str = "float32"
    remat: str = "none"

    @property
    def factor(self) -> int:
        """Pixels per latent along one axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class AttentionBlock(nn.Module):
    """Single-head self-attention over positions, with group norm and residual."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        height, channels = x.shape[1], x.shape[-1]
        dense = lambda name: nn.Dense(channels, dtype=self.dtype, name=name)
        tokens = rearrange(GroupNorm(self.groups, 1e-6, self.dtype, name="group_norm")(x), "b h w c -> b (h w) c")
        q, k, v = (dense(name)(tokens)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        out = dense("to_out_0")(attention(q, k, v)[:, :, 0])
        return x + rearrange(out, "b (h w) c -> b h w c", h=height)


def _resnet(cfg: VAEConfig):
    """ResnetBlock with the config's options bound, to be named at the call."""
    return partial(
        rematerialised(ResnetBlock, cfg.remat), groups=cfg.norm_num_groups, epsilon=1e-6, dtype=jnp.dtype(cfg.dtype)
    )


class DownBlock(nn.Module):
    features: int
    cfg: VAEConfig
    downsample: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.cfg.layers_per_block):
            x = _resnet(self.cfg)(self.features, name=f"resnets_{i}")(x)
        if self.downsample:
            x = Downsample(self.features, ((0, 1), (0, 1)), jnp.dtype(self.cfg.dtype), name="downsamplers_0")(x)
        return x


class UpBlock(nn.Module):
    features: int
    cfg: VAEConfig
    upsample: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.cfg.layers_per_block + 1):
            x = _resnet(self.cfg)(self.features, name=f"resnets_{i}")(x)
        if self.upsample:
            x = Upsample(self.features, jnp.dtype(self.cfg.dtype), name="upsamplers_0")(x)
        return x


class MidBlock(nn.Module):
    features: int
    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        x = _resnet(self.cfg)(self.features, name="resnets_0")(x)
        if self.cfg.mid_block_add_attention:
            x = AttentionBlock(self.cfg.norm_num_groups, jnp.dtype(self.cfg.dtype), name="attentions_0")(x)
        return _resnet(self.cfg)(self.features, name="resnets_1")(x)


class Encoder(nn.Module):
    cfg: VAEConfig

    @nn.compact
    def __call__(self, x):
        cfg, dtype, widths = self.cfg, jnp.dtype(self.cfg.dtype), self.cfg.block_out_channels
        x = Conv(widths[0], dtype=dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            x = DownBlock(width, cfg, i < len(widths) - 1, name=f"down_blocks_{i}")(x)
        x = MidBlock(widths[-1], cfg, name="mid_block")(x)
        x = GroupNorm(cfg.norm_num_groups, 1e-6, dtype, True, name="conv_norm_out")(x)
        return Conv(2 * cfg.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    cfg: VAEConfig

    @nn.compact
    def __call__(self, z):
        cfg, dtype, widths = self.cfg, jnp.dtype(self.cfg.dtype), self.cfg.block_out_channels[::-1]
        x = Conv(widths[0], dtype=dtype, name="conv_in")(z)
        x = MidBlock(widths[0], cfg, name="mid_block")(x)
        for i, width in enumerate(widths):
            x = UpBlock(width, cfg, i < len(widths) - 1, name=f"up_blocks_{i}")(x)
        x = GroupNorm(cfg.norm_num_groups, 1e-6, dtype, True, name="conv_norm_out")(x)
        return Conv(cfg.out_channels, dtype=dtype, name="conv_out")(x)


class _Autoencoder(nn.Module):
    cfg: VAEConfig

    def setup(self):
        dtype = jnp.dtype(self.cfg.dtype)
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)
        self.quant_conv = Conv(2 * self.cfg.latent_channels, size=1, dtype=dtype)
        self.post_quant_conv = Conv(self.cfg.latent_channels, size=1, dtype=dtype)

    def encode(self, image):
        mean, logvar = jnp.split(self.quant_conv(self.encoder(image)).astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latent):
        return self.decoder(self.post_quant_conv(latent)).astype(jnp.float32)

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


def init(key, cfg: VAEConfig):
    """Random parameters, nested dict of float32; call under `jax.eval_shape` for shapes only.

    Raises:
        ValueError: on an unknown remat policy.
    """
    image = jax.ShapeDtypeStruct((1, 2 * cfg.factor, 2 * cfg.factor, cfg.in_channels), jnp.float32)
    return initial.init(key, _Autoencoder(cfg), image)


def encode(cfg: VAEConfig, params, image):
    """Mean and log-variance of the posterior q(latent | image), unscaled.

    Args:
        image: [B, H, W, 3] in [-1, 1], H and W multiples of `cfg.factor`.

    Returns:
        (mean, logvar), each [B, H / factor, W / factor, latent_channels] float32; logvar is clipped to [-30, 20] as in diffusers.

    Raises:
        ValueError: on another number of channels, if H or W is not a multiple of `cfg.factor`, or on an unknown remat policy.
    """
    require(
        image.ndim == 4
        and image.shape[-1] == cfg.in_channels
        and image.shape[1] % cfg.factor == 0
        and image.shape[2] % cfg.factor == 0,
        "image",
        f"[B, H, W, {cfg.in_channels}] with H and W multiples of {cfg.factor}",
        f"shape {image.shape}",
        "resize or crop it first",
    )
    return _Autoencoder(cfg).apply({"params": params}, image, method="encode")


def decode(cfg: VAEConfig, params, latent):
    """Image [B, H, W, 3] (about [-1, 1], not clipped) of unscaled latents [B, h, w, latent_channels]."""
    require(
        latent.ndim == 4 and latent.shape[-1] == cfg.latent_channels,
        "latent",
        f"[B, h, w, {cfg.latent_channels}]",
        f"shape {latent.shape}",
        "use the latents of this autoencoder",
    )
    return _Autoencoder(cfg).apply({"params": params}, latent, method="decode")


def sample_posterior(key, mean, logvar):
    """One draw of q(latent | image) by reparameterisation; all arrays [B, h, w, c]."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
