"""A fine-tuning that the monitor looks at along the way, and the same with a posterior over the weights: for `dmsec demo`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dmsec_jax import monitoring, pipeline, tuning
from dmsec_jax.core.types import Key
from dmsec_jax.data.images import ImageSet
from dmsec_jax.methods.bayes_dm import Posterior
from dmsec_jax.monitoring import Monitor
from dmsec_jax.pipeline import Pipeline
from dmsec_jax.report.training_data import Course, Sheet
from dmsec_jax.tuning import Recipe, Tuned

SELECTIONS = {"full": "norm", "lora": "lora-up", "oft": "oft"}
"""Tuner -> what the posterior is over."""
SAMPLES = 10
"""Pictures on a sheet."""


class Watch(NamedTuple):
    """What a fine-tuning is looked at with."""

    monitor: Monitor
    before: np.ndarray
    """The base model's samples, from the noise of all samples."""
    key: Key
    looks: int


def watch(key: Key, base: Pipeline, pictures: ImageSet, prompt: str, looks: int) -> Watch:
    """For so many looks, the last one after the last step."""
    before = pipeline.sample(key, base, prompt, SAMPLES)
    found = monitoring.watch(jax.random.fold_in(key, SAMPLES), base, pictures.images, prompt, before)
    return Watch(found, before, key, looks)


def tune(
    key: Key, watched: Watch, pictures: ImageSet, recipe: Recipe, on_chunk: Callable[[int, Any, Any], None]
) -> tuple[Tuned, Course]:
    """Fine-tunes, with a sheet of samples and measures at every look, those of the base model as step 0."""
    base, prompt, total = watched.monitor.base, watched.monitor.prompt, recipe.tune.num_steps
    sheets = [Sheet(step=0, samples=watched.before)]
    measures = [monitoring.look(watched.monitor, 0, base.params, watched.before)]

    def on_each(done, info, state):
        on_chunk(done, info, state)
        next_look = len(sheets)  # the base model's sheet is number 0
        if done * watched.looks < total * next_look:
            return
        params = tuning.merged(base, recipe, tuning.mean(recipe, state))
        drawn = pipeline.sample(watched.key, base, prompt, SAMPLES, params=params)
        sheets.append(Sheet(step=done, samples=drawn))
        measures.append(monitoring.look(watched.monitor, done, params, drawn))

    tuned = tuning.tune(key, base, pictures.images, [prompt] * len(pictures), recipe, on_chunk=on_each)
    return tuned, Course(loss=tuned.info.loss, sheets=tuple(sheets), measures=tuple(measures))


def with_posterior(recipe: Recipe) -> Recipe:
    """The same training with a posterior over what suits the tuner."""
    selection = recipe.patterns or SELECTIONS[tuning.tuner_of(recipe)]
    return dataclasses.replace(recipe, bayes=Posterior(selection=selection))
