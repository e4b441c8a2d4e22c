"""Building blocks shared by the networks: convolution, normalisation, time embedding, residual block, re-sampling.

All arrays are NHWC. Parameters are float32; `dtype` is the compute dtype of products, statistics stay float32.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dmsec_jax.core.checks import require

Padding = tuple[tuple[int, int], tuple[int, int]]


def _plain_conv(x, kernel, stride: int, padding: Padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


NARROW, TINY, WIDE_MAP = 16, 4, 1024
"""Channels, channels, and positions of the maps that `column_groups` takes together."""


def column_groups(x: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Padding) -> int:
    """How many neighbouring columns of the result XLA:CPU computes at once, as if they were channels: 1 unless channels are so few that it
    would leave its fast path. Measured in benchmarks/LOG.md.

    Args:
        x, kernel: shapes.
    """
    (_, height, width, _), (rows, columns, inside, outside) = x, kernel
    height, width = height + sum(padding[0]) - rows + 1, width + sum(padding[1]) - columns + 1
    narrow = stride == 1 and columns > 1 and max(inside, outside) <= NARROW and height * width >= WIDE_MAP
    count = 1 if not narrow else 8 if outside <= TINY else 4 if inside <= TINY else 2
    return count if width % count == 0 else 1


def _by_column_groups(x, kernel, *, padding: Padding, count: int):
    """Stride 1: output channels are (position in the group, channel), each with the kernel at its place in a wider window."""
    outside = kernel.shape[-1]
    shifted = [jnp.pad(kernel, ((0, 0), (j, count - 1 - j), (0, 0), (0, 0))) for j in range(count)]
    dimensions = ("NHWC", "HWIO", "NHWC")
    wide = jnp.concatenate(shifted, -1)
    out = jax.lax.conv_general_dilated(x, wide, (1, count), padding, dimension_numbers=dimensions)
    return out.reshape(*out.shape[:2], -1, outside)


def _fast_conv(x, kernel, stride: int, padding: Padding):
    count = column_groups(x.shape, kernel.shape, stride, padding)
    plain = partial(_plain_conv, stride=stride, padding=padding)
    if count == 1:
        return plain(x, kernel)
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_by_column_groups, padding=padding, count=count), default=plain
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x, kernel, stride: int = 1, padding: Padding = ((1, 1), (1, 1))):
    """Two-dimensional convolution that is fast for few channels on CPU, and whose gradients stay fast there inside `scan`, `fori_loop`, `cond`.

    XLA:CPU lowers the stock gradient convolutions of called computations to a naive loop (up to 20 times slower). Here the input
    gradient is a plain forward convolution with the flipped kernel, and on CPU the kernel gradient is one matrix product per tap.

    Args:
        x: [B, H, W, C].
        kernel: [kh, kw, C, D].
        stride: the same for both axes.
        padding: ((top, bottom), (left, right)), zeros.

    Returns:
        [B, H', W', D].
    """
    return _fast_conv(x, kernel, stride, padding)


def _conv_fwd(x, kernel, stride, padding):
    return _fast_conv(x, kernel, stride, padding), (x, kernel)


MANY = 64
"""Channels from which the kernel gradient reads the activations once, transposed, and shifts the output gradient instead (benchmarks/LOG.md)."""
CACHE_FLOATS = 2**17
LARGE_MAP = 2**15
"""The kernel gradient of large maps (floats per image) goes over chunks of images whose activations stay in a core's cache."""


def _kernel_grad_taps(x, kernel, g, *, stride, padding):
    """dW[i, j] = x[shifted by (i, j)]^T g: one matrix product per kernel tap, over chunks of images that fit the cache."""
    if (
        stride == 1
        and min(x.shape[3], g.shape[3]) >= MANY
        and all(max(p) < k for p, k in zip(padding, kernel.shape[:2], strict=True))
    ):
        return _shifted(x, g, size=kernel.shape[:2], padding=padding).astype(kernel.dtype)
    batch, per_image = x.shape[0], x.shape[1] * x.shape[2] * max(x.shape[3], g.shape[3])
    chunk = max((m for m in range(1, batch + 1) if batch % m == 0 and m * per_image <= CACHE_FLOATS), default=1)
    taps = partial(_taps, size=kernel.shape[:2], stride=stride, padding=padding)
    if chunk == batch or per_image < LARGE_MAP:  # small maps: the loop costs more than it saves
        return taps(x, g).astype(kernel.dtype)
    split = lambda a: a.reshape(batch // chunk, chunk, *a.shape[1:])
    add = lambda total, part: (total + taps(*part), None)
    total, _ = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (split(x), split(g)))
    return total.astype(kernel.dtype)


def _taps(x, g, *, size, stride, padding):
    (kh, kw), c = size, x.shape[-1]
    _, h, w, d = g.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    flat = g.reshape(-1, d)
    taps = []
    for i in range(kh):
        for j in range(kw):
            window = padded[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
            taps.append(jnp.dot(window.reshape(-1, c).T, flat, preferred_element_type=jnp.float32))
    return jnp.stack(taps).reshape(kh, kw, c, d)


def _shifted(x, g, *, size, padding):
    """dW[i, j] = x^T g[shifted by (-i, -j)], stride 1: x is transposed once for all products, which XLA would do in each without the barrier."""
    (kh, kw), (_, h, w, c), d = size, x.shape, g.shape[-1]
    around = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(size, padding, strict=True)]
    padded = jnp.pad(g, ((0, 0), *around, (0, 0)))
    flat = jax.lax.optimization_barrier(x.reshape(-1, c).T)
    window = lambda i, j: padded[:, kh - 1 - i : kh - 1 - i + h, kw - 1 - j : kw - 1 - j + w].reshape(-1, d)
    taps = [jnp.dot(flat, window(i, j), preferred_element_type=jnp.float32) for i in range(kh) for j in range(kw)]
    return jnp.stack(taps).reshape(kh, kw, c, d)


def _kernel_grad_native(x, kernel, g, *, stride, padding):
    return jax.vjp(lambda k: _plain_conv(x, k, stride, padding), kernel)[1](g)[0]


def _input_grad(g, kernel, *, size: tuple[int, int], stride: int, padding: Padding):
    """The output gradient, with s - 1 zeros between neighbours if the stride is s, convolved with the flipped kernel."""
    gaps = (0, 0, stride - 1)
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), gaps, gaps, (0, 0, 0)))
    pads = []
    for axis, (k, n) in enumerate(zip(kernel.shape[:2], size, strict=True)):
        low = k - 1 - padding[axis][0]
        pads.append((low, n + k - 1 - low - spread.shape[1 + axis]))
    return _fast_conv(spread, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, tuple(pads))


def _input_grad_phases(g, kernel, *, size: tuple[int, int], stride: int, padding: Padding):
    """The same without products with zeros: rows i of the input with one (i + padding) mod s see taps s apart, so that all s x s such phases are
    channels of one small convolution (Shi et al. 2016), here of 16 products in place of 36 for a 3x3 kernel of stride 2."""
    (kh, kw, _, _), s = kernel.shape, stride
    rows, columns = -(-kh // s), -(-kw // s)
    taps = jnp.pad(kernel, ((0, rows * s - kh), (0, columns * s - kw), (0, 0), (0, 0)))
    taps = rearrange(taps, "(m s) (n r) c d -> m n d (s r c)", s=s, r=s)[::-1, ::-1]
    first = [low // s for low, _ in padding]
    last = [(n - 1 + low) // s for n, (low, _) in zip(size, padding, strict=True)]
    pads = [(rows - 1 - first[0], last[0] + 1 - g.shape[1]), (columns - 1 - first[1], last[1] + 1 - g.shape[2])]
    out = rearrange(_plain_conv(g, taps, 1, tuple(pads)), "b h w (s r c) -> b (h s) (w r) c", s=s, r=s)
    top, left = (low % s for low, _ in padding)
    return out[:, top : top + size[0], left : left + size[1]]


def _conv_bwd(stride, padding, residuals, g):
    x, kernel = residuals
    options = {"size": x.shape[1:3], "stride": stride, "padding": padding}
    dx = (
        _input_grad(g, kernel, **options)
        if stride == 1
        else jax.lax.platform_dependent(
            g, kernel, cpu=partial(_input_grad_phases, **options), default=partial(_input_grad, **options)
        )
    )
    dk = jax.lax.platform_dependent(
        x,
        kernel,
        g,
        cpu=partial(_kernel_grad_taps, stride=stride, padding=padding),
        default=partial(_kernel_grad_native, stride=stride, padding=padding),
    )
    return dx, dk


conv.defvjp(_conv_fwd, _conv_bwd)


class Conv(nn.Module):
    """Convolution with square kernel; a 1x1 kernel is a matrix product. Parameters `kernel` [k, k, C, D] and `bias` [D]."""

    features: int
    size: int = 3
    stride: int = 1
    padding: Padding | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        k = self.size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if k == 1 and self.stride == 1:
            return x @ kernel[0, 0] + bias.astype(self.dtype)
        padding = self.padding or ((k // 2, k // 2), (k // 2, k // 2))
        return conv(x, kernel, self.stride, padding) + bias.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(x, scale, bias, groups: int, epsilon: float, activate: bool):
    """Normalisation of each group of channels of each example, then SiLU if `activate`, in float32.

    Its gradient keeps the input and the statistics; what automatic differentiation keeps beside them costs more to write than to compute again.

    Args:
        x: [B, P, C], any floating dtype.
        scale, bias: [C].
    """
    return _group_norm_fwd(x, scale, bias, groups, epsilon, activate)[0]


def _group_mean(per_channel, groups: int):
    """[B, C] -> [B, 1, C]: the mean of each group, at all of its channels."""
    batch, channels = per_channel.shape
    mean = per_channel.reshape(batch, groups, -1).mean(-1, keepdims=True)
    return jnp.broadcast_to(mean, (batch, groups, channels // groups)).reshape(batch, 1, channels)


def _group_norm_fwd(x, scale, bias, groups, epsilon, activate):
    values = x.astype(jnp.float32)
    mean = _group_mean(values.mean(1), groups)
    inverse = jax.lax.rsqrt(_group_mean(jnp.square(values - mean).mean(1), groups) + epsilon)
    y = (values - mean) * (scale * inverse) + bias
    return nn.silu(y) if activate else y, (x, scale, bias, mean, inverse)


def _group_norm_bwd(groups, epsilon, activate, kept, g):
    x, scale, bias, mean, inverse = kept
    normal = (x.astype(jnp.float32) - mean) * inverse
    if activate:
        y = normal * scale + bias
        gate = nn.sigmoid(y)
        g = g * (gate * (1 + y * (1 - gate)))
    along_bias, along_scale = g.sum(1), (g * normal).sum(1)  # [B, C]
    positions = x.shape[1]
    level, tilt = (_group_mean(part * scale, groups) / positions for part in (along_bias, along_scale))
    dx = inverse * (g * scale - level - normal * tilt)
    return dx.astype(x.dtype), along_scale.sum(0), along_bias.sum(0)


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)


class GroupNorm(nn.Module):
    """Group normalisation over (H, W, C / groups) of [B, ..., C] with float32 statistics, then SiLU if `activate`. Parameters `scale`, `bias` [C]."""

    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    activate: bool = False

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"channels must be a multiple of the number of norm groups {self.groups}, got {channels}; "
                "change block_out_channels or norm_num_groups"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        flat = x.reshape(x.shape[0], -1, channels)
        out = group_norm(flat, scale, bias, self.groups, self.epsilon, self.activate)
        return out.reshape(x.shape).astype(self.dtype)


def timestep_features(t, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0, max_period: float = 1e4):
    """Sinusoidal features of the time step: [B] -> [B, width] float32 (Vaswani et al. 2017, with diffusers' options)."""
    half = width // 2
    exponent = -jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    features = jnp.concatenate(parts, -1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the time features: `linear_1`, SiLU, `linear_2`."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features):
        hidden = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(features))
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)


class ResnetBlock(nn.Module):
    """norm-SiLU-conv twice, with the time embedding added in between and a 1x1 shortcut where the width changes."""

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time=None):  # x: [B, H, W, C], time: [B, D] or None
        norm = partial(GroupNorm, self.groups, self.epsilon, self.dtype, activate=True)
        hidden = Conv(self.features, dtype=self.dtype, name="conv1")(norm(name="norm1")(x))
        if time is not None:
            hidden += nn.Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        hidden = Conv(self.features, dtype=self.dtype, name="conv2")(norm(name="norm2")(hidden))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + hidden


class Downsample(nn.Module):
    """Stride-2 convolution `conv`; the UNet pads one on each side, the autoencoder only below and to the right."""

    features: int
    padding: Padding = ((1, 1), (1, 1))
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


@jax.custom_vjp
def doubled(x):
    """Nearest-neighbour doubling of [B, H, W, C]; its gradient is three additions, where XLA:CPU would reduce over an axis of two twice."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _doubled_bwd(_, g):
    b, h, w, c = g.shape
    parts = g.reshape(b, h // 2, 2, w // 2, 2, c)
    at = lambda i, j: parts[:, :, i, :, j]
    return (at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1),)


doubled.defvjp(lambda x: (doubled(x), None), _doubled_bwd)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then convolution `conv`."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, dtype=self.dtype, name="conv")(doubled(x))


def unit(x):
    """Rows [..., D] of unit length; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def rematerialised(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """The class under a config's `remat`: "block" recomputes it in the backward pass, "none" stores its activations.

    Name its instances, since remat changes automatic names.

    Raises:
        ValueError: on another policy.
    """
    require(remat in ("none", "block"), "remat", "'none' or 'block'", repr(remat), "choose one of them")
    return nn.remat(module) if remat == "block" else module
