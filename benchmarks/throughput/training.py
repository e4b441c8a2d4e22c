"""Rows of fine-tuning steps of the embedded UNet: DreamBooth, LoRA, and weights with a posterior."""

import functools
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.cases import HOW, PUBLIC, Case
from benchmarks.throughput.networks import PROMPT, embedded, fresh
from benchmarks.torch_baselines import training
from dmsec_jax import pipeline, tuning
from dmsec_jax.checkpoints import mapping
from dmsec_jax.core import trees
from dmsec_jax.finetune import dreambooth, examples
from dmsec_jax.methods import bayes_dm

STEPS = 3
SEED = 4
PICTURES = 10
TUNERS = {
    "dreambooth": (),
    "lora": ("lora.rank=4",),
    "bayes-norm": ("bayes.selection=norm",),
    "bayes-linear": ("bayes.selection=linear",),
    "bayes-lora": ("lora.rank=4", "bayes.selection=lora-up"),
}
RATE = "tune.learning_rate=0.0001"


def tuner(name: str, batch: int) -> Case:
    """Steps of one way of training, from the base model."""
    base, _ = embedded()
    recipe = tuning.read(None, (*TUNERS[name], RATE, f"tune.batch_size={batch}", "tune.ema_decay=null"))
    cfg, method, adapter = tuning.settings(recipe), tuning.method_of(recipe), tuning.adapter_of(recipe)
    key, params = jax.random.key(SEED), base.params["unet"]
    shape = (PICTURES, base.pixels, base.pixels, 3)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    mean, logvar = pipeline.encode(base, images)
    context = pipeline.contexts(base, [PROMPT])
    data = examples.Data(examples.examples(mean, context, logvar))
    state = method.init(key, params, cfg, adapter=adapter)
    network = {"eps_fn": base.functions.predict_fn, "adapter": adapter, "schedule": base.schedule, "text_fn": None}

    def run(state, data, params, cfg):
        return method.run(key, state, data, params, cfg, num_steps=STEPS, **network)

    pictures = training.Pictures(images, mean, logvar, base.tokenizer.encode([PROMPT]), context)
    random = _draws(key, state, data, cfg, base.schedule, batch)
    settings = _settings(cfg, random["weights"])
    sizes = {name: array.shape for name, array in random["weights"][0].items()}

    def build(public, how):
        models = fresh()
        if recipe.lora is not None:
            training.with_lora(models.unet, recipe.lora.rank, _factors(method.tuned(state).trainable))
        size = {"steps": STEPS, "batch": batch, "public": public, "how": how}
        return lambda draw: training.tune(models, pictures, draw, settings, **size)

    def both(public, how):
        """One run to compare; its twin, which draws for itself, to time."""
        own = training.own(batch, base.latent_shape, PICTURES, sizes, how)
        return build(public, how)(training.given(**random, how=how)), build(public, how)(own)

    peers = {PUBLIC: lambda: both(True, "plain")}
    peers |= {name: lambda how=how: both(False, how) for name, how in HOW.items()}
    return Case(
        op=f"{name}-step",
        shape="embedded",
        batch=batch,
        steps=STEPS,
        fn=run,
        args=(state, data, params, cfg),
        rows=(),
        named=lambda out: {"loss": np.asarray(out[1].loss), "norm": np.asarray(out[1].grad_norm)},
        loose={
            "norm": 2e-2,
            "loss": 2e-3,
        },  # the public form averages gradients in another order, Adam's first steps are signs
        peers=peers,
    )


def _draws(key, state, data, cfg, schedule, batch: int) -> dict[str, list]:
    """What our steps draw, in the words of the baseline."""
    found = {name: [] for name in ("rows", "t", "noise", "posterior", "weights")}
    count = data.instance.mean.shape[0]
    numbered = data.instance._replace(mean=jnp.broadcast_to(jnp.arange(count)[:, None, None, None], (count, 1, 1, 1)))
    numbered = examples.Data(numbered._replace(logvar=numbered.mean))
    zero = jax.tree.map(jnp.zeros_like, data.instance)._replace(prompt=data.instance.prompt)
    for i in range(STEPS):
        rows = dreambooth.draw(key, i, numbered, cfg).instance.mean[:, 0, 0, 0]
        own = jax.random.split(jax.random.fold_in(key, i))[0]
        keys = jax.vmap(lambda j, own=own: jax.random.fold_in(own, j))(jnp.arange(batch))
        standard = jax.tree.map(lambda leaf, rows=rows: leaf[rows], zero)
        posterior, t, noise = dreambooth.corrupt(keys, standard, cfg, schedule)
        weights = _weights(key, i, state, cfg) if isinstance(state, bayes_dm.State) else {}
        values = (rows, t, noise, posterior, weights)
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return found


def _weights(key, i: int, state, cfg) -> dict[str, np.ndarray]:
    """Noise of the weights in step i, by PyTorch's names."""
    own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), bayes_dm.WEIGHTS), 0)
    ones, zeros = (jax.tree.map(fill, state.raw) for fill in (jnp.ones_like, jnp.zeros_like))
    noise = bayes_dm.perturbed(own, zeros, ones)
    if any(path.endswith("/up") for path in trees.flatten(noise)):
        ups = trees.flatten(noise).items()
        return {f"{_layer(path)}.lora_B.default.weight": np.asarray(leaf).T for path, leaf in ups}
    return {name: np.array(leaf) for name, leaf in mapping.to_state(noise, mapping.UNET).items()}


def _factors(trainable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer -> (A, B) of the start."""
    flat = trees.flatten(trainable)
    layers = {path.removesuffix("/down") for path in flat if path.endswith("/down")}
    pair = lambda layer: (np.asarray(flat[f"{layer}/down"]).T, np.asarray(flat[f"{layer}/up"]).T)
    return {_layer(f"{layer}/"): pair(layer) for layer in layers}


def _layer(path: str) -> str:
    """`.../to_out_0/up` -> `... .to_out.0`."""
    return re.sub(r"_(\d+)(?=/|$)", r".\1", path.rpartition("/")[0]).replace("/", ".")


def _settings(cfg, weights: list[dict]) -> training.Settings:
    posterior = {}
    if weights[0]:
        names = tuple(weights[0])
        posterior = {"sigma0": cfg.sigma0, "sigma_min": cfg.sigma_min, "sigma_rate": cfg.sigma_rate, "names": names}
    return training.Settings(cfg.learning_rate, cfg.weight_decay, cfg.clip_norm, **posterior)


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of these rows."""
    for name in TUNERS:
        for batch in batches:
            yield f"{name}-step", "embedded", batch, functools.partial(tuner, name, batch)
