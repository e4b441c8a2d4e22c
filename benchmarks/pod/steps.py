"""The compiled steps of the methods as this library runs them, with shapes in place of arrays and a place on the mesh for each."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.pod import counts
from benchmarks.pod.counts import Work
from dmsec_jax import discovery, parallel, pipeline
from dmsec_jax.causal import sem, skeleton
from dmsec_jax.core import pgd
from dmsec_jax.diffusion import schedule
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, Examples
from dmsec_jax.finetune.lora import lora
from dmsec_jax.methods import advdm, bayes_dm, cgi_dm, finextract, spot
from dmsec_jax.models import presets, skeleton_net, unet, vae

TOKENS = 77
MODELS = {"SD 1.5": presets.SD15, "SDXL": presets.SDXL}
GRAPHS = "graphs"
"""The model of the steps of causal discovery."""


class Setting(NamedTuple):
    """What is compiled: networks, pixels, rows for all devices together, and weights as they are kept."""

    model: str
    pixels: int
    """Of a picture's side; of `GRAPHS` the variables."""
    rows: int
    weights: str = "float32"

    def preset(self, remat: str) -> presets.Preset:
        chosen = MODELS[self.model]
        compute = lambda cfg: dataclasses.replace(cfg, dtype="bfloat16", remat=remat)
        return dataclasses.replace(chosen, unet=compute(chosen.unet), vae=compute(chosen.vae))


class Program(NamedTuple):
    """A step ready to be lowered."""

    run: Callable[..., Any]
    args: tuple
    """Shapes with their sharding."""
    donated: tuple[int, ...]
    out_shardings: Any
    """None: the compiler's choice."""
    repeats: int
    """Trips of the loop around everything, whose body the compiler counts once."""
    work: Work | None
    """Of one example and one trip; None where loops within loops hide what is computed from the compiler."""
    plan: frozenset[str]
    """Kinds of collectives that belong there."""


Build = Callable[[Setting, Mesh], Program]
ALONE: frozenset[str] = frozenset()
SUMS = frozenset({"all-reduce", "reduce-scatter"})
GATHERS = SUMS | {"all-gather"}
SCHEDULE = schedule.ScheduleConfig()


def shapes(tree: Any, where: Any, dtype: str | None = None) -> Any:
    """Leaves of `jax.eval_shape` with a sharding, one for all or a tree of them."""
    one = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)
    if isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, where), tree)
    return jax.tree.map(one, tree, where)


def network(preset: presets.Preset) -> Any:
    return jax.eval_shape(partial(unet.init, cfg=preset.unet), jax.random.key(0))


def key_of(mesh: Mesh) -> Any:
    return shapes(jax.eval_shape(lambda: jax.random.key(0)), parallel.replicated(mesh))


def latents(setting: Setting, preset: presets.Preset, mesh: Mesh) -> tuple[Any, int]:
    """(rows of latents, their side)."""
    side = setting.pixels // preset.vae.factor
    shape = (setting.rows, side, side, preset.unet.in_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.rows(mesh)), side


def row_index(setting: Setting, mesh: Mesh) -> Any:
    return jax.ShapeDtypeStruct((setting.rows,), jnp.int32, sharding=parallel.rows(mesh))


def prompts(preset: presets.Preset, count: int) -> tuple[int, int, int]:
    """Shape of contexts, with what Stable Diffusion XL carries below the tokens."""
    return count, TOKENS + preset.unet.extra_rows, preset.unet.cross_attention_dim


def context(preset: presets.Preset, mesh: Mesh) -> Any:
    shape = prompts(preset, 1)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parallel.replicated(mesh))


def forward(setting: Setting, mesh: Mesh) -> Program:
    """One evaluation of the denoising network."""
    preset = setting.preset("none")
    z, side = latents(setting, preset, mesh)
    params = shapes(network(preset), parallel.replicated(mesh), setting.weights)
    prompt = jax.ShapeDtypeStruct(prompts(preset, setting.rows), jnp.float32, sharding=z.sharding)
    work = counts.unet_forward(preset.unet, side, TOKENS).forward()
    args = (params, z, row_index(setting, mesh), prompt)
    return Program(partial(unet.apply, preset.unet), args, (), None, 1, work, ALONE)


def pair(preset: presets.Preset, setting: Setting, mesh: Mesh) -> tuple[Callable, Any]:
    """Two networks in turn, as `pipeline.pair` makes them at this size."""
    functions = pipeline.functions(preset.unet, preset.vae, preset.text, preset.text_2)
    params = shapes(network(preset), parallel.replicated(mesh), setting.weights)
    prompt = context(preset, mesh)
    return pipeline.in_turn(functions.predict_fn), {"unet": (params, params), "context": (prompt, prompt)}


STEPS = 50


def sampler(setting: Setting, mesh: Mesh) -> Program:
    """DDIM of fifty steps guided by two networks, one program."""
    preset = setting.preset("none")
    z, side = latents(setting, preset, mesh)
    pair_fn, params = pair(preset, setting, mesh)
    run = partial(finextract.run, pair_fn=pair_fn, schedule=SCHEDULE, guide_fn=finextract.guided)
    cfg = finextract.Config(num_steps=STEPS)
    work = counts.unet_forward(preset.unet, side, TOKENS).forward() * 2
    args = (key_of(mesh), z, row_index(setting, mesh), params)
    return Program(lambda *args: run(*args, cfg), args, (1,), None, STEPS, work, ALONE)


def protecting(setting: Setting, mesh: Mesh) -> Program:
    """A step of AdvDM: from the loss through UNet and encoder to the pixels."""
    preset = setting.preset("block")
    functions = pipeline.functions(preset.unet, preset.vae, preset.text, preset.text_2)
    whole, rows = parallel.replicated(mesh), parallel.rows(mesh)
    coder = jax.eval_shape(partial(vae.init, cfg=preset.vae), jax.random.key(0))
    params = {
        "unet": shapes(network(preset), whole, setting.weights),
        "context": context(preset, mesh),
        "vae": shapes(coder, whole, setting.weights),
    }
    picture = jax.ShapeDtypeStruct((setting.rows, setting.pixels, setting.pixels, 3), jnp.float32, sharding=rows)
    mask = jax.ShapeDtypeStruct((*picture.shape[:3], 1), jnp.float32, sharding=rows)
    cfg = advdm.Config(attack=pgd.Config())
    state = jax.eval_shape(
        partial(advdm.init, cfg=cfg), jax.random.key(0), picture, mask, jnp.zeros(setting.rows, jnp.int32)
    )
    spread = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows if leaf.ndim else whole)
    predict = lambda params, z_t, t: functions.predict_fn(
        params["unet"], z_t, t, jnp.broadcast_to(params["context"], (len(z_t), *params["context"].shape[1:]))
    )
    run = lambda key, state, image, mask, params: advdm.step(
        key,
        state,
        image,
        mask,
        0.0,
        params,
        cfg,
        objective_fn=advdm.denoising,
        encode_fn=lambda params, image: functions.encode_fn(params["vae"], image),
        eps_fn=predict,
        schedule=SCHEDULE,
    )
    side = setting.pixels // preset.vae.factor
    once = counts.unet_forward(preset.unet, side, TOKENS) + counts.vae_encode(preset.vae, setting.pixels)
    args = (key_of(mesh), jax.tree.map(spread, state), picture, mask, params)
    return Program(run, args, (1,), None, 1, once.backward(), ALONE)


def authenticating(setting: Setting, mesh: Mesh) -> Program:
    """A step of CGI-DM: the contrast of two networks, and its gradient with respect to latents."""
    preset = setting.preset("block")
    z, side = latents(setting, preset, mesh)
    pair_fn, params = pair(preset, setting, mesh)
    mask = jax.ShapeDtypeStruct((*z.shape[:3], 1), jnp.float32, sharding=z.sharding)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=parallel.replicated(mesh))
    state = cgi_dm.State(z, row_index(setting, mesh), counter)
    cfg = cgi_dm.Config()
    run = lambda *args: cgi_dm.step(*args, cfg, pair_fn=pair_fn, schedule=SCHEDULE)
    work = counts.unet_forward(preset.unet, side, TOKENS).backward() * 2
    args = (key_of(mesh), state, z, z, mask, params)
    return Program(run, args, (1,), None, 1, work, ALONE)


def training(setting: Setting, mesh: Mesh, kind: str, **posterior) -> Program:
    """An optimiser step: of all weights ("full"), of LoRA's factors, or of a posterior beside all weights ("bayes"), which `posterior` sets up."""
    preset = setting.preset("block")
    z, side = latents(setting, preset, mesh)
    functions = pipeline.functions(preset.unet, preset.vae, preset.text, preset.text_2)
    adapter = lora(4) if kind == "lora" else full()
    method = bayes_dm if kind == "bayes" else dreambooth
    cfg = method.Config(batch_size=setting.rows, learning_rate=1e-6, **posterior)
    whole, base = parallel.replicated(mesh), network(preset)
    state = jax.eval_shape(partial(method.init, cfg=cfg, adapter=adapter), jax.random.key(0), base)
    places = parallel.plan(state, mesh)
    prompt = jax.ShapeDtypeStruct(prompts(preset, setting.rows), jnp.float32, sharding=whole)
    latent = jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=whole)
    data = Data(Examples(latent, prompt, latent))
    run = lambda key, state, data, params: method.step(
        key, state, data, params, cfg, eps_fn=functions.predict_fn, adapter=adapter, schedule=SCHEDULE
    )
    once = counts.unet_forward(preset.unet, side, TOKENS)
    work = once.backward(once.projections if kind == "lora" else once.weights)
    args = (key_of(mesh), shapes(state, places), data, shapes(base, parallel.plan(base, mesh)))
    return Program(run, args, (1,), (places, None), 1, work, GATHERS if mesh.shape["fsdp"] > 1 else SUMS)


def searching(setting: Setting, mesh: Mesh) -> Program:
    """A step of SPOT's search in the family of ancestral graphs, rows its starts, as `discovery.SPOT` takes it."""
    size, whole, rows = setting.pixels, parallel.replicated(mesh), parallel.rows(mesh)
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=whole)
    guide = shapes(jax.eval_shape(spot.guide_mag, matrix), whole)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), setting.rows))
    cfg = spot.Config()
    begin = jax.vmap(lambda key: spot.init(key, jnp.zeros(matrix.shape), spot.guide_mag(jnp.zeros(matrix.shape)), cfg))
    acyclic_fn, class_fn, _ = discovery.CLASSES["ancestral"]
    run = lambda keys, state, covariance, num_rows, guide: discovery._advanced(
        keys, state, covariance, num_rows, guide, cfg, acyclic_fn, class_fn
    )
    num_rows = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    args = (shapes(keys, rows), shapes(jax.eval_shape(begin, keys), rows), matrix, num_rows, guide)
    # what is found is gathered for the host: graphs as such, single numbers of each start by a sum
    return Program(run, args, (), None, 1, None, frozenset({"all-gather", "all-reduce"}))


def learning(setting: Setting, mesh: Mesh) -> Program:
    """An update of the posterior over skeletons, rows its data sets, which are simulated in it."""
    size = setting.pixels
    net = skeleton_net.EdgeMLP(width=64, depth=3)
    cfg = skeleton.Config(sizes=(size,), pairs=setting.rows * math.comb(size, 2))
    update = skeleton.updating(sem.Prior(), net, cfg)
    state = jax.eval_shape(partial(skeleton.init, net=net, cfg=cfg), jax.random.key(0))
    places = parallel.plan(state, mesh)
    run = lambda state, key: update(state, key, size)
    return Program(run, (shapes(state, places), key_of(mesh)), (0,), (places, None), 1, None, GATHERS)


BUILDS: dict[str, Build] = {
    "UNet": forward,
    "sampling": sampler,
    "AdvDM": protecting,
    "CGI-DM": authenticating,
    "DreamBooth": partial(training, kind="full"),
    "LoRA": partial(training, kind="lora"),
    "Bayesian": partial(training, kind="bayes"),
    "Bayesian linear": partial(training, kind="bayes", selection="linear", generator="rbg"),
    "SPOT search": searching,
    "SPOT posterior": learning,
}
