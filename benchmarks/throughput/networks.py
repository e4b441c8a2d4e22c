"""Rows of single networks: the UNet forward and with gradients, the autoencoder's encoder with its gradient, the text encoder."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.cases import HOW, Case
from benchmarks.throughput.shapes import MIDDLE
from benchmarks.torch_baselines import networks, passes
from dmsec_jax import pipeline
from dmsec_jax.checkpoints import configs, mapping
from dmsec_jax.core import spread
from dmsec_jax.functions import Functions
from dmsec_jax.models import presets, unet

PROMPT = "a twemoji icon of a red heart"


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One UNet on both sides."""

    shape: str
    cfg: unet.UNetConfig
    params: dict
    module: Callable[[], object]
    """A copy of the module, to be prepared."""
    side: int
    tokens: int

    def inputs(self, batch: int, side: int | None = None) -> tuple:
        """(z_t, t, context, cotangent) in NumPy; latents of another `side` if that is given."""
        rng, channels, side = np.random.default_rng(0), self.cfg.in_channels, side or self.side
        normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        z_t, t = normal(batch, side, side, channels), rng.integers(0, 1000, batch)
        return z_t, t, normal(batch, self.tokens, self.cfg.cross_attention_dim), normal(*z_t.shape)


@functools.cache
def embedded() -> tuple[pipeline.Pipeline, networks.Models]:
    """The embedded model on both sides."""
    base = pipeline.load()
    return base, networks.load(base.folder)


def fresh() -> networks.Models:
    """The embedded model's modules, to be prepared in another way than the last."""
    return copy.deepcopy(embedded()[1])


@functools.cache
def denoiser(shape: str) -> Denoiser:
    """`embedded`, `middle`, or `sd15` at 256 px with random weights."""
    if shape == "embedded":
        base, models = embedded()
        cfg = base.configs.unet
        return Denoiser(shape, cfg, base.params["unet"], lambda: copy.deepcopy(models.unet), cfg.sample_size, 24)
    cfg = {"middle": MIDDLE, "sd15": presets.SD15.unet}[shape]
    module = networks.described("UNet2DConditionModel", configs.write_config(cfg, configs.UNET))
    target = jax.eval_shape(functools.partial(unet.init, cfg=cfg), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, mapping.to_tree(networks.state(module), mapping.UNET, target))
    return Denoiser(shape, cfg, params, lambda: module, 32, 77)


def unet_forward(shape: str, batch: int, side: int | None = None) -> Case:
    """The UNet's prediction."""
    net = denoiser(shape)
    z_t, t, context, _ = net.inputs(batch, side)
    apply = functools.partial(unet.apply, net.cfg)
    peers = {name: lambda how=how: passes.forward(net.module(), z_t, t, context, how=how) for name, how in HOW.items()}
    names = {"op": "unet-forward", "shape": shape, "batch": batch}
    args = (net.params, *map(jnp.asarray, (z_t, t, context)))
    return Case(
        fn=apply, args=args, rows=(1, 2, 3), named=lambda out: {"prediction": np.asarray(out)}, peers=peers, **names
    )


def unet_input_gradient(shape: str, batch: int) -> Case:
    """Gradient with respect to the latents."""
    net = denoiser(shape)
    z_t, t, context, cotangent = net.inputs(batch)

    def gradient(params, z_t, t, context, cotangent):
        return jax.vjp(lambda z: unet.apply(net.cfg, params, z, t, context), z_t)[1](cotangent)[0]

    build = lambda how: passes.input_gradient(net.module(), z_t, t, context, cotangent, how=how)
    peers = {name: lambda how=how: build(how) for name, how in HOW.items()}
    args = (net.params, *map(jnp.asarray, (z_t, t, context, cotangent)))
    named = lambda out: {"gradient": np.asarray(out)}
    names = {"op": "unet-input-gradient", "shape": shape, "batch": batch}
    return Case(fn=gradient, args=args, rows=(1, 2, 3, 4), named=named, peers=peers, **names)


def unet_weight_gradient(shape: str, batch: int) -> Case:
    """Gradient with respect to every weight."""
    net = denoiser(shape)
    z_t, t, context, cotangent = net.inputs(batch)

    def gradient(params, z_t, t, context, cotangent):
        def on(axis_name):
            *inputs, own = spread.own_rows((z_t, t, context, cotangent), axis_name)
            grads = jax.vjp(lambda p: unet.apply(net.cfg, p, *inputs), params)[1](own)[0]
            return spread.summed(grads, axis_name)

        return spread.each(on, None, batch)

    def build(how):
        run = passes.weight_gradient(net.module(), z_t, t, context, cotangent, how=how)
        tree = lambda found: mapping.to_tree(found, mapping.UNET, net.params)

        def wrapped():
            outcome = run()
            return {"weights": lambda: tree(outcome["state"]())}

        return wrapped

    peers = {name: lambda how=how: build(how) for name, how in HOW.items()}
    args = (net.params, *map(jnp.asarray, (z_t, t, context, cotangent)))
    named = lambda out: {"weights": out}
    names = {"op": "unet-weight-gradient", "shape": shape, "batch": batch}
    return Case(fn=gradient, args=args, rows=(), named=named, peers=peers, **names)


def vae_encode_gradient(batch: int) -> Case:
    """Gradient of the posterior's mean with respect to the pixels."""
    base, _ = embedded()
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (batch, base.pixels, base.pixels, 3)).astype(np.float32)
    cotangent = rng.standard_normal((batch, *base.latent_shape)).astype(np.float32)

    def gradient(params, image, cotangent):
        return jax.vjp(lambda x: base.functions.encode_fn(params, x)[0], image)[1](cotangent)[0]

    build = lambda how: passes.encode_gradient(fresh().vae, image, cotangent, how=how)
    return Case(
        op="vae-encode-gradient",
        shape="embedded",
        batch=batch,
        fn=gradient,
        args=(base.params["vae"], *map(jnp.asarray, (image, cotangent))),
        rows=(1, 2),
        named=lambda out: {"gradient": np.asarray(out)},
        peers={name: lambda how=how: build(how) for name, how in HOW.items()},
    )


def text_encoder(batch: int) -> Case:
    """Hidden states of prompts."""
    base, _ = embedded()
    functions: Functions = base.functions
    ids = base.tokenizer.encode([PROMPT] * batch)
    peers = {name: lambda how=how: passes.text(fresh().text, ids, how=how) for name, how in HOW.items()}
    return Case(
        op="text-encoder",
        shape="embedded",
        batch=batch,
        fn=functions.text_fn,
        args=(base.params["text_encoder"], jnp.asarray(ids)),
        rows=(1,),
        named=lambda out: {"hidden": np.asarray(out)},
        peers=peers,
    )


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows."""
    ops = {
        "unet-forward": unet_forward,
        "unet-input-gradient": unet_input_gradient,
        "unet-weight-gradient": unet_weight_gradient,
    }
    for op, make in ops.items():
        shapes = [("embedded", batch) for batch in batches] + [("middle", 1), ("middle", 4), ("sd15", 1), ("sd15", 2)]
        for shape, batch in shapes:
            yield op, shape, batch, functools.partial(make, shape, batch)
    for op, make in {"vae-encode-gradient": vae_encode_gradient, "text-encoder": text_encoder}.items():
        for batch in batches:
            yield op, "embedded", batch, functools.partial(make, batch)
