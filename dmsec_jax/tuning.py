"""Fine-tuning a whole model: what is trained (`Recipe`), the training, and the models that come out of it.

The one place where pictures, an adapter, and a way of training meet: DreamBooth alone, or with a posterior over the weights around it
(`Recipe.bayes`). Everything else asks for `tune` and `merged`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import parallel, pipeline
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import config as configs
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import Key, Params
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import adapters, dreambooth, driver, examples
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.driver import Method
from dmsec_jax.finetune.lora import InitStyle, lora
from dmsec_jax.finetune.oft import Cayley, oft
from dmsec_jax.methods import bayes_dm
from dmsec_jax.pipeline import Pipeline

TRAINABLE = ("unet", "text_encoder")
BAYES = Method(bayes_dm.init, bayes_dm.advance, lambda state: state.tuned, bayes_dm.Info)


@config
class LoRA:
    """See `lora.lora`."""

    rank: int = 4
    alpha: float | None = None  # None: as rank
    targets: str | tuple[str, ...] = "attention"
    init_style: InitStyle = "peft"


@config
class OFT:
    """See `oft.oft`."""

    blocks: int = 4
    targets: str | tuple[str, ...] = "attention"
    cayley: Cayley = "reference"
    radius: float | None = None


@config
class Recipe:
    """One file's worth of choices for a fine-tuning: what `configs/finetune/*.yaml` hold."""

    tune: dreambooth.Config = dreambooth.Config()
    lora: LoRA | None = None
    oft: OFT | None = None
    patterns: tuple[str, ...] = ()  # without LoRA and OFT: which leaves, as regular expressions over paths; none: all
    bayes: bayes_dm.Posterior | None = None  # None: no posterior, plain DreamBooth
    chunk_steps: int = 25
    save_every: int = 0


DEFAULT = Recipe(
    tune=dreambooth.Config(num_steps=600, batch_size=4, learning_rate=1e-4, ema_decay=0.99),
    save_every=100,
)
"""Full fine-tuning with the embedded model's settings."""


def read(path: Path | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe of a YAML file, or the default one, with `key=value` overrides; raises as `core.config.load`."""
    if path is not None:
        return configs.load(Recipe, path, overrides)
    return configs.override(DEFAULT, overrides)


def check(recipe: Recipe, params: Params, schedule: ScheduleConfig) -> None:
    """Refuses what would fail later; `params` may be `jax.eval_shape` results.

    Raises:
        ValueError: on what `dreambooth.check`, `bayes_dm.check`, `driver.require_chunks` and `adapter_of` refuse, and on layers that the
            adapter or the posterior does not find or fit.
    """
    dreambooth.check(recipe.tune, schedule)
    driver.require_chunks(recipe.chunk_steps, recipe.save_every)
    adapter, cfg = adapter_of(recipe), settings(recipe)
    adapters.count(adapter, params)
    if recipe.bayes is not None:
        bayes_dm.check(cfg)
        local = recipe.bayes.noise == "activations"
        fits = not local or (tuner_of(recipe) == "full" and recipe.tune.accumulation == 1)
        require(
            fits, "bayes.noise", "activations only with full weights, without accumulation", "others", "use weights"
        )
    jax.eval_shape(
        lambda key, params: method_of(recipe).init(key, params, cfg, adapter=adapter), jax.random.key(0), params
    )


def adapter_of(recipe: Recipe) -> Adapter:
    """The adapter that a recipe names: one object per choice, so that a second training of the same kind does not compile again.

    Raises:
        ValueError: on LoRA and OFT at once, patterns beside them, and what `lora.lora` and `oft.oft` refuse.
    """
    return _adapter(recipe.lora, recipe.oft, recipe.patterns)


@functools.cache
def _adapter(low: LoRA | None, turned: OFT | None, patterns: tuple[str, ...]) -> Adapter:
    require(low is None or turned is None, "lora, oft", "one of them at most", "both", "leave one out")
    if low is None and turned is None:
        return adapters.full(patterns or None)
    require(not patterns, "patterns", "empty with LoRA or OFT", patterns, "name the layers in its targets")
    if turned is not None:
        return oft(turned.blocks, turned.targets, turned.cayley, turned.radius)
    return lora(low.rank, low.alpha, low.targets, low.init_style)


def tuner_of(recipe: Recipe) -> str:
    """What is trained in a word, for results: full, lora or oft."""
    return "lora" if recipe.lora is not None else "oft" if recipe.oft is not None else "full"


def method_of(recipe: Recipe, noisy_fn: bayes_dm.NoisyFn | None = None) -> Method:
    """How a recipe trains; `noisy_fn` as in `Functions`, for noise of activations."""
    if recipe.bayes is None:
        return driver.DREAMBOOTH
    return _noisy(noisy_fn) if recipe.bayes.noise == "activations" else BAYES


@functools.cache  # one object, so that a second training does not compile again
def _noisy(noisy_fn) -> Method:
    return BAYES._replace(run=functools.partial(bayes_dm.advance, noisy_fn=noisy_fn))


def settings(recipe: Recipe) -> dreambooth.Config:
    """The config of `method_of(recipe)`."""
    return recipe.tune if recipe.bayes is None else bayes_dm.Config(**vars(recipe.tune), **vars(recipe.bayes))


class Tuned(NamedTuple):
    """A fine-tuned model: `params` as in a Pipeline, the `trainable` tree (averaged where an average is kept; the posterior's mean where there is
    one), the posterior's deviations, Info and seconds of all steps, the steps that this call went on from and ended at."""

    params: dict[str, Params]
    trainable: Params
    sigma: Params | None
    info: Any
    seconds: float
    start: int
    done: int
    finished: bool


def tune(
    key: Key,
    base: Pipeline,
    pictures: np.ndarray,
    prompts: list[str],
    chosen: Recipe,
    *,
    prior: tuple[np.ndarray, list[str]] | None = None,
    text_encoder: bool = False,
    on_chunk: driver.OnChunk | None = None,
    enough: Callable[[int], bool] | None = None,
    checkpoints: Checkpoints | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Tuned:
    """Fine-tunes `base` on `pictures` [N, H, W, 3] in [-1, 1] with one prompt each, or one for all.

    Args:
        prior: class pictures and their prompts, for prior preservation.
        on_chunk: called with (steps done, Info, State) after each compiled chunk of steps; `mean` takes the model out of the State.
        enough: as in `driver.fit`.
        checkpoints: where training state is kept; an interrupted run continues from there with the same result.
        origin: what decides the result besides the number of steps, as JSON values; checkpoints of another are refused.
    """
    single = not text_encoder or base.tokenizer_2 is None
    require(single, "text_encoder", "false for a model with two text encoders", "true", "train the UNet alone")
    encode_prompts = base.tokenizer.encode if text_encoder else lambda texts: pipeline.contexts(base, texts)

    def rows(pictures, prompts):
        mean, logvar = pipeline.encode(base, pictures)
        return examples.examples(mean, jnp.asarray(encode_prompts(prompts)), logvar)

    data = examples.Data(rows(pictures, prompts), None if prior is None else rows(*prior))
    method = method_of(chosen, base.functions.noisy_fn)
    options = {"text_fn": base.functions.text_fn} if text_encoder else {}
    if checkpoints is not None:
        options["save"], options["restore"] = driver.on_disk(checkpoints, origin, method)
    outcome = driver.fit(
        key,
        data,
        _trained_part(base, text_encoder),
        settings(chosen),
        eps_fn=base.functions.predict_fn,
        adapter=adapter_of(chosen),
        schedule=base.schedule,
        method=method,
        chunk_steps=chosen.chunk_steps,
        save_every=chosen.save_every if checkpoints else 0,
        on_chunk=on_chunk,
        enough=enough,
        **options,
    )
    trainable, past = mean(chosen, outcome.state), outcome.past
    return Tuned(
        params=merged(base, chosen, trainable, text_encoder),
        trainable=trainable,
        sigma=deviations(chosen, outcome.state),
        info=past.info,
        seconds=past.seconds,
        start=outcome.start,
        done=int(method.tuned(outcome.state).step),
        finished=outcome.finished,
    )


def mean(chosen: Recipe, state: Any) -> Params:
    """The trainable tree to sample with and to export: averaged where an average is kept, without the posterior's noise."""
    return dreambooth.averaged(method_of(chosen).tuned(state))


def deviations(chosen: Recipe, state: Any) -> Params | None:
    """sigma of the posterior's leaves; None without a posterior, and with dropout, which has none."""
    none = chosen.bayes is None or chosen.bayes.noise == "dropout"
    return None if none else bayes_dm.deviations(state.raw, chosen.bayes)


def merged(
    base: Pipeline, chosen: Recipe, trainable: Params, text_encoder: bool = False, scale=None
) -> dict[str, Params]:
    """Parameters of the whole model with the trainable tree merged in; `scale` as in `Adapter.merge`."""
    part = parallel.cut(adapter_of(chosen).merge(_trained_part(base, text_encoder), trainable, scale))
    return {**base.params, **(part if text_encoder else {"unet": part})}


def drawn(
    key: Key, base: Pipeline, chosen: Recipe, trainable: Params, sigma: Params, count: int, text_encoder: bool = False
) -> Iterator[dict[str, Params]]:
    """`count` models of the posterior N(trainable, sigma^2), one at a time; model j depends on the key and j alone."""
    for j in range(count):
        weights = bayes_dm.perturbed(jax.random.fold_in(key, j), trainable, sigma)
        yield merged(base, chosen, weights, text_encoder)


def _trained_part(base: Pipeline, text_encoder: bool) -> Params:
    return {name: base.params[name] for name in TRAINABLE} if text_encoder else base.params["unet"]
