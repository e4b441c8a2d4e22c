"""Products of a network counted from its configuration, by hand: what its programs are held against.

A multiplication and an addition count two. Convolutions and matrix products count, nothing else does.
"""

from typing import NamedTuple

from dmsec_jax.models import splash, unet, vae


class Count(NamedTuple):
    """Floating-point operations of one forward pass for one example."""

    weights: float = 0.0
    """Products with weights."""
    projections: float = 0.0
    """Those of them with the projections of attention, which LoRA adapts."""
    short: float = 0.0
    """Attention over few positions."""
    long: float = 0.0
    """Attention that the TPU kernel does, in whose cost the compiler sees nothing."""

    def __add__(self, other: "Count") -> "Count":
        return Count(*map(sum, zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Count":
        return Count(*(part * times for part in self))

    @property
    def total(self) -> float:
        return self.weights + self.short + self.long

    def forward(self) -> "Work":
        return Work(self.weights + self.short, self.long, self.total)

    def backward(self, trained: float = 0.0) -> "Work":
        """Forward, again block by block in the backward pass, gradients of the inputs, and those of weights with `trained` products.

        Attention has two products, its gradients four; the kernel's two passes back do seven.
        """
        visible = 3 * self.weights + 4 * self.short + trained
        return Work(visible, (1 + 1 + 3.5) * self.long, 2 * self.weights + 3 * (self.short + self.long) + trained)


class Work(NamedTuple):
    """Floating-point operations of a step for one example."""

    visible: float
    """What the compiler should count."""
    hidden: float
    """In kernels."""
    useful: float
    """All, without recomputation."""

    def __mul__(self, times: float) -> "Work":
        return Work(*(part * times for part in self))


def attention(n: int, m: int, width: int, heads: int) -> Count:
    """Two products of N queries and M keys of `width` over all heads."""
    work = 4.0 * n * m * width
    return Count(long=work) if splash.worthwhile(n, m, heads) else Count(short=work)


def conv(side: int, width_in: int, width_out: int, size: int = 3) -> Count:
    """Of a map with `side` x `side` outputs."""
    return Count(2.0 * side * side * size * size * width_in * width_out)


def dense(rows: int, width_in: int, width_out: int) -> Count:
    """Of `rows` vectors."""
    return Count(2.0 * rows * width_in * width_out)


def projection(rows: int, width_in: int, width_out: int) -> Count:
    """A dense layer of attention."""
    work = 2.0 * rows * width_in * width_out
    return Count(work, work)


def resnet(side: int, width_in: int, width_out: int, time: int = 0) -> Count:
    """Two convolutions, with the time embedding in between."""
    shortcut = conv(side, width_in, width_out, 1) if width_in != width_out else Count()
    return conv(side, width_in, width_out) + conv(side, width_out, width_out) + shortcut + dense(1, time, width_out)


def transformer(side: int, width: int, heads: int, depth: int, tokens: int, context: int) -> Count:
    """A Transformer2D: projections, and blocks of self-attention, cross-attention and feed-forward."""
    n = side * side
    one = projection(n, width, width) * 4 + attention(n, n, width, heads)
    one += projection(n, width, width) * 2 + projection(tokens, context, width) * 2
    one += attention(n, tokens, width, heads)
    one += dense(n, width, 8 * width) + dense(n, 4 * width, width)
    return dense(n, width, width) * 2 + one * depth


def unet_forward(cfg: unet.UNetConfig, side: int, tokens: int) -> Count:
    """The denoising network on a latent of `side` x `side`."""
    widths, time = cfg.block_out_channels, 4 * cfg.block_out_channels[0]
    heads, depths = (unet.per_level(v, cfg) for v in (cfg.attention_head_dim, cfg.transformer_layers_per_block))
    block = lambda side, level: transformer(
        side, widths[level], heads[level], depths[level], tokens, cfg.cross_attention_dim
    )
    levels = len(widths)
    total = dense(1, widths[0], time) + dense(1, time, time) + conv(side, cfg.in_channels, widths[0])
    if cfg.addition_embed_type is not None:
        total += dense(1, cfg.projection_class_embeddings_input_dim, time) + dense(1, time, time)
    skips, now = [widths[0]], widths[0]
    for level, kind in enumerate(cfg.down_block_types):
        for _ in range(cfg.layers_per_block):
            total += resnet(side, now, widths[level], time)
            now = widths[level]
            if kind.startswith("Cross"):
                total += block(side, level)
            skips.append(now)
        if level < levels - 1:
            side //= 2
            total += conv(side, now, now)
            skips.append(now)
    total += resnet(side, now, now, time) * 2 + block(side, levels - 1)
    for i, kind in enumerate(cfg.up_block_types):
        level = levels - 1 - i
        for _ in range(cfg.layers_per_block + 1):
            total += resnet(side, now + skips.pop(), widths[level], time)
            now = widths[level]
            if kind.startswith("Cross"):
                total += block(side, level)
        if level:
            side *= 2
            total += conv(side, now, now)
    return total + conv(side, now, cfg.out_channels)


def vae_encode(cfg: vae.VAEConfig, side: int) -> Count:
    """The encoder on a picture of `side` x `side`."""
    widths = cfg.block_out_channels
    total, now = conv(side, cfg.in_channels, widths[0]), widths[0]
    for level, width in enumerate(widths):
        for _ in range(cfg.layers_per_block):
            total += resnet(side, now, width)
            now = width
        if level < len(widths) - 1:
            side //= 2
            total += conv(side, now, now)
    n = side * side
    total += resnet(side, now, now) * 2 + dense(n, now, now) * 4 + attention(n, n, now, 1)
    return (
        total
        + conv(side, now, 2 * cfg.latent_channels)
        + conv(side, 2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
    )
