"""Watching a fine-tuning: the monitor of `finetune.monitor` bound to a model, its pictures and its prompt."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmsec_jax import pipeline
from dmsec_jax.core.files import write_atomically
from dmsec_jax.core.types import AnyArray, Key, Latent, Params
from dmsec_jax.finetune import monitor, response
from dmsec_jax.finetune.monitor import Measures, Reference
from dmsec_jax.pipeline import Pipeline

WATCHED = 8
"""Training pictures that widths are estimated at, at most."""
WIDTH_TIMES = (0.1, 0.5)
DRIFT_TIMES = (0.25, 0.5, 0.75)
"""Shares of the noise schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Monitor:
    """What stays the same while one model is tuned; made by `watch`."""

    base: Pipeline
    prompt: str
    known: Reference
    pictures: Latent
    """Training pictures as latents."""
    own: Float[AnyArray, "K h w c"]
    """The base model's pictures as latents, and the noise that they are asked with."""
    noise: Float[AnyArray, "K h w c"]


def watch(
    key: Key,
    base: Pipeline,
    training: Float[AnyArray, "N H W 3"],
    prompt: str,
    base_samples: Float[AnyArray, "K H W 3"],
) -> Monitor:
    """A monitor for tuning `base` on `training`; `base_samples` as in `monitor.reference`, all pictures in [-1, 1]."""
    own = pipeline.encode(base, base_samples)[0]
    return Monitor(
        base=base,
        prompt=prompt,
        known=monitor.reference(training, base_samples),
        pictures=pipeline.encode(base, training[:WATCHED])[0],
        own=own,
        noise=jax.random.normal(key, own.shape),
    )


def look(watched: Monitor, step: int, params: dict[str, Params], samples: Float[AnyArray, "K H W 3"]) -> Measures:
    """Measures of the model `params` (as in a Pipeline) after `step` steps, with samples from the noise of the base model's."""
    base, prompt = watched.base, [watched.prompt]
    model_fn, tuned = pipeline.single(base, params["unet"], pipeline.contexts(base, prompt, params))
    _, before = pipeline.single(base, base.params["unet"], pipeline.contexts(base, prompt))
    asked = (watched.pictures, watched.own, watched.noise)
    widths, drift = _respond(tuned, before, *asked, model_fn=model_fn, schedule=base.schedule)
    return monitor.measure(step, samples, np.asarray(widths).mean(1).tolist(), float(drift), watched.known)


@functools.partial(jax.jit, static_argnames=("model_fn", "schedule"))
def _respond(tuned, before, pictures, own, noise, *, model_fn, schedule):
    at = lambda shares: jnp.asarray(np.round(np.multiply(shares, schedule.num_train_timesteps - 1)), jnp.int32)
    model, base = functools.partial(model_fn, tuned), functools.partial(model_fn, before)
    widths = response.widths(model, pictures, at(WIDTH_TIMES), schedule)
    return widths, response.drift(model, base, own, noise, at(DRIFT_TIMES), schedule)


def save(path: Path, found: Measures) -> None:
    """Writes measures as JSON."""
    write_atomically(path, json.dumps(found._asdict()).encode())


def read(path: Path) -> Measures:
    """What `save` wrote.

    Raises:
        ValueError: if it is damaged.
        OSError: if it cannot be read.
    """
    try:
        values = json.loads(path.read_text())
        return Measures(**values | {"widths": tuple(values["widths"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold the measures of one step, got something else; remove it") from error
