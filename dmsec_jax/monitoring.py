"""Watching a fine-tuning: the monitor of `finetune.monitor` bound to a model, its pictures and its prompt."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmsec_jax import embedding, pipeline
from dmsec_jax.core.files import write_atomically
from dmsec_jax.core.types import AnyArray, Key, Latent, Params
from dmsec_jax.finetune import monitor, response
from dmsec_jax.finetune.monitor import Measures, Reference, Scores
from dmsec_jax.metrics import perception
from dmsec_jax.pipeline import Pipeline

WATCHED = 8
"""Training pictures that widths are estimated at, and pictures of the base model that drift is, at most."""
WIDTH_TIMES = (0.1, 0.5)
DRIFT_TIMES = (0.25, 0.5, 0.75)
"""Shares of the noise schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
    """What samples are judged by."""

    features: str = "hog"
    """Of fidelity and copies: hog (oriented gradients), or a network in your own files: clip, dino, dino-last-4."""
    feature_weights: Path | None = None
    """Of clip or dino: the folder of a transformers model; for DINO also its authors' file."""
    clip: Path | None = None
    """Folder of a transformers CLIP: the quality of samples is then measured too (CLIP-IQA), and their likeness to the prompt (CLIP-T)."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the measures must know."""
        label = self.seen.label.removesuffix(", centred on the style")
        quality = "by the noise level of the samples, in place of CLIP-IQA: no CLIP was given"
        if self.clip is not None:
            quality = f"by CLIP-IQA with the vision transformer {self.clip.name}, not its authors' ResNet"
        return (f"Measured: fidelity by {label}; diversity by {embedding.LPIPS}; quality {quality}.",)

    @property
    def seen(self) -> embedding.Features:
        """The features; raises as `embedding.features_of`."""
        return embedding.features_of(self.features, weights=self.feature_weights)

    def check(self, prompt: str) -> None:
        """Refuses files that are missing or do not fit, before anything is computed; raises as `embedding` does."""
        _ = self.seen
        if self.clip is not None:
            embedding.clip_texts(self.clip, prompt)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Monitor:
    """What stays the same while one model is tuned; made by `watch`."""

    base: Pipeline
    prompt: str
    known: Reference
    pictures: Latent
    """Training pictures as latents."""
    sight: Sight
    own: Float[AnyArray, "K h w c"]
    """The base model's pictures as latents, and the noise that they are asked with."""
    noise: Float[AnyArray, "K h w c"]


def watch(
    key: Key,
    base: Pipeline,
    training: Float[AnyArray, "N H W 3"],
    prompt: str,
    base_samples: Float[AnyArray, "K H W 3"],
    sight: Sight = Sight(),
) -> Monitor:
    """A monitor for tuning `base` on `training`; `base_samples` as in `monitor.reference`, all pictures in [-1, 1]."""
    own = pipeline.encode(base, base_samples[:WATCHED])[0]
    return Monitor(
        base=base,
        prompt=prompt,
        known=monitor.reference(training, base_samples, sight.seen.embed),
        sight=sight,
        pictures=pipeline.encode(base, training[:WATCHED])[0],
        own=own,
        noise=jax.random.normal(key, own.shape),
    )


def look(watched: Monitor, step: int, params: dict[str, Params], samples: Float[AnyArray, "K H W 3"]) -> Measures:
    """Measures of the model `params` (as in a Pipeline) after `step` steps, with samples from the noise of the base model's."""
    return judge(watched, step, samples, *respond(watched, params))


def respond(watched: Monitor, params: dict[str, Params]) -> tuple[list[float], float]:
    """Widths at `WIDTH_TIMES`, mean over training pictures, and drift."""
    base, prompt = watched.base, [watched.prompt]
    model_fn, tuned = pipeline.single(base, params["unet"], pipeline.contexts(base, prompt, params))
    _, before = pipeline.single(base, base.params["unet"], pipeline.contexts(base, prompt))
    asked = (watched.pictures, watched.own, watched.noise)
    widths, drift = _respond(tuned, before, *asked, model_fn=model_fn, schedule=base.schedule)
    return np.asarray(widths).mean(1).tolist(), float(drift)


def judge(watched: Monitor, step: int, samples: np.ndarray, widths: list[float], drift: float) -> Measures:
    """Measures of samples, beside what `respond` found."""
    features, scores = seen_by(watched.sight, watched.prompt, samples)
    return monitor.measure(step, samples, widths, drift, watched.known, lambda _: features, scores)


def seen_by(sight: Sight, prompt: str, samples: np.ndarray) -> tuple[np.ndarray, Scores]:
    """Features of the samples and what networks say of them; each network sees each sample once."""
    features = sight.seen.embed(samples)
    scores = Scores(diversity=perception.diversity(embedding.perceptual_distances(samples)))
    if sight.clip is None:
        return features, scores
    same = (sight.features, sight.feature_weights) == ("clip", sight.clip)
    rows = features if same else embedding.features_of("clip", weights=sight.clip).embed(samples)
    texts = embedding.clip_texts(sight.clip, prompt)
    quality, alignment = perception.quality(rows, texts.antonyms), perception.text_alignment(rows, texts.prompt)
    return features, scores._replace(quality=float(quality.mean()), alignment=float(alignment.mean()))


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
