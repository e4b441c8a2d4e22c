"""`dmsec finetune`: a few pictures and a prompt in, a fine-tuned model folder out."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dmsec_jax import pipeline
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import config, trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Params
from dmsec_jax.data import images
from dmsec_jax.finetune import dreambooth, driver, examples, recipe
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.progress import progress_bar
from dmsec_jax.pipeline import Pipeline
from dmsec_jax.report import page, training
from dmsec_jax.report.training import Training
from dmsec_jax.report.training_data import Course, Sheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a diffusion model on a few pictures (DreamBooth, full weights or LoRA)."""

    images: Path
    """Folder of pictures to learn; a `name.txt` beside `name.png` is that picture's own prompt."""
    prompt: str
    """Prompt of the pictures, for example "a drawing of sks animal"."""
    out: Path = Path("out/finetune")
    """Where the model folder, checkpoints, samples and result.json go."""
    model: Path = pipeline.EMBEDDED
    """Model to start from, a diffusers folder."""
    recipe: Path | None = None
    """YAML of `configs/finetune`; default: full fine-tuning with the embedded model's settings."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, for example tune.num_steps=400 lora.rank=16."""
    prior_images: Path | None = None
    """Folder of class pictures for prior preservation."""
    prior_prompt: str | None = None
    """Prompt of the class; without `prior_images` the base model draws the class pictures."""
    prior_count: int = 64
    """How many class pictures the base model draws."""
    text_encoder: bool = False
    """Train the text encoder too."""
    sample_every: int = 100
    """Steps between sample sheets; 0 draws none."""
    seed: int = 0


class Tuned(NamedTuple):
    """A fine-tuned model: `params` as in a Pipeline, the `trainable` tree (averaged where an average is kept), Info of all steps."""

    params: dict[str, Params]
    trainable: Params
    info: dreambooth.Info
    seconds: float
    finished: bool


DEFAULT_RECIPE = recipe.Recipe(
    tune=dreambooth.Config(num_steps=600, batch_size=4, learning_rate=1e-4, ema_decay=0.99),
    save_every=100,
)


def tune(
    key,
    base: Pipeline,
    pictures: np.ndarray,
    prompts: list[str],
    chosen: recipe.Recipe,
    *,
    prior: tuple[np.ndarray, list[str]] | None = None,
    text_encoder: bool = False,
    on_chunk: Callable | None = None,
    checkpoints: Checkpoints | None = None,
) -> Tuned:
    """Fine-tunes `base` on `pictures` [N, H, W, 3] in [-1, 1] with one prompt each, or one for all.

    Args:
        prior: class pictures and their prompts, for prior preservation.
        on_chunk: called with (steps done, Info, State) after each compiled chunk of steps.
        checkpoints: where training state is kept; an interrupted run continues from there with the same result.
    """
    adapter = _adapter(chosen.lora, chosen.patterns)
    encode_prompts = base.tokenizer.encode if text_encoder else lambda texts: pipeline.contexts(base, texts)
    start = _trained_part(base, text_encoder)

    def rows(pictures, prompts):
        mean, logvar = pipeline.encode(base, pictures)
        return examples.examples(mean, jnp.asarray(encode_prompts(prompts)), logvar)

    data = examples.Data(rows(pictures, prompts), None if prior is None else rows(*prior))
    options = {"text_fn": base.functions.text_fn} if text_encoder else {}
    if checkpoints is not None:
        options["save"] = lambda step, state: checkpoints.save(step, jax.device_get(state))
        options["restore"] = lambda like: found.tree if (found := checkpoints.restore(like)) else None
    began = time.monotonic()
    outcome = driver.fit(
        key,
        data,
        start,
        chosen.tune,
        eps_fn=base.functions.predict_fn,
        adapter=adapter,
        schedule=base.schedule,
        chunk_steps=chosen.chunk_steps,
        save_every=chosen.save_every if checkpoints else 0,
        on_chunk=on_chunk,
        **options,
    )
    trainable = dreambooth.averaged(outcome.state)
    params = merged(base, chosen, trainable, text_encoder)
    return Tuned(params, trainable, outcome.info, time.monotonic() - began, outcome.finished)


def merged(
    base: Pipeline, chosen: recipe.Recipe, trainable: Params, text_encoder: bool = False, scale=None
) -> dict[str, Params]:
    """Parameters of the whole model with the trainable tree merged in; `scale` as in `Adapter.merge`."""
    part = _adapter(chosen.lora, chosen.patterns).merge(_trained_part(base, text_encoder), trainable, scale)
    return {**base.params, **(part if text_encoder else {"unet": part})}


def _trained_part(base: Pipeline, text_encoder: bool) -> Params:
    return {name: base.params[name] for name in ("unet", "text_encoder")} if text_encoder else base.params["unet"]


@functools.cache
def _adapter(lora: recipe.LoRA | None, patterns: tuple[str, ...]) -> Adapter:
    """One adapter object per choice, so that a second training of the same kind does not compile again."""
    return recipe.adapter_of(recipe.Recipe(lora=lora, patterns=patterns))


def read_recipe(path: Path | None, overrides: tuple[str, ...]) -> recipe.Recipe:
    """The recipe of a YAML file, or the default one, with `key=value` overrides."""
    if path is not None:
        return config.load(recipe.Recipe, path, overrides)
    return config.override(DEFAULT_RECIPE, overrides)


def run(cfg: Config) -> int:
    """Trains, or goes on where an interrupted run stopped, and writes `out/model`, `out/samples`, `out/result.json`, `out/report.html`."""
    console = Console()
    chosen = read_recipe(cfg.recipe, cfg.set)
    base = pipeline.load(cfg.model)
    pictures = images.read_folder(cfg.images, base.pixels)
    for note in pictures.notes:
        console.print(f"note: {note}", markup=False)
    prompts = [caption or cfg.prompt for caption in pictures.captions]
    key_prior, key_tune, key_sample = jax.random.split(jax.random.key(cfg.seed), 3)
    prior = _prior(key_prior, base, cfg)
    samples: dict[int, np.ndarray] = {}

    def draw_samples(done, info, state):
        if cfg.sample_every and done % cfg.sample_every == 0:
            params = merged(base, chosen, dreambooth.averaged(state), cfg.text_encoder)
            samples[done] = pipeline.sample(key_sample, base, cfg.prompt, 8, params=params)
            images.save_png(cfg.out / "samples" / f"step-{done:06d}.png", images.grid(samples[done], 8))

    per_step = chosen.tune.batch_size * chosen.tune.accumulation
    with (
        Checkpoints(cfg.out / "checkpoints") as checkpoints,
        progress_bar(chosen.tune.num_steps, per_step, console) as bar,
    ):

        def on_chunk(done, info, state):
            bar(done, info, state)
            draw_samples(done, info, state)

        tuned = tune(
            key_tune,
            base,
            pictures.images,
            prompts,
            chosen,
            prior=prior,
            text_encoder=cfg.text_encoder,
            on_chunk=on_chunk,
            checkpoints=checkpoints,
        )
    if not tuned.finished:
        console.print(
            f"Interrupted. The same command goes on from the checkpoint in {cfg.out / 'checkpoints'}.", markup=False
        )
        return 130
    _write(cfg, base, pictures, chosen, tuned, samples)
    console.print(f"Model: {cfg.out / 'model'}   report: {cfg.out / 'report.html'}", markup=False)
    return 0


def _prior(key, base: Pipeline, cfg: Config) -> tuple[np.ndarray, list[str]] | None:
    """Class pictures for prior preservation, read or drawn by the base model; None without a class prompt."""
    if cfg.prior_prompt is None:
        require(cfg.prior_images is None, "prior_prompt", "given with prior_images", None, "say what the class is")
        return None
    if cfg.prior_images is not None:
        pictures = images.read_folder(cfg.prior_images, base.pixels).images
    else:
        pictures = pipeline.sample(key, base, cfg.prior_prompt, cfg.prior_count)
    return pictures, [cfg.prior_prompt] * len(pictures)


def _write(cfg, base, pictures, chosen, tuned, samples) -> None:
    """The model folder, for LoRA the trained factors alone as well, and the account of the run."""
    pipeline.save(cfg.out / "model", dataclasses.replace(base, params=tuned.params))
    trained = f"{trees.count(tuned.trainable):,} parameters"
    if chosen.lora is not None:
        flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(tuned.trainable).items()}
        note = {"rank": str(chosen.lora.rank), "alpha": str(chosen.lora.alpha or chosen.lora.rank)}
        write_tensors(cfg.out / "lora.safetensors", flat, metadata=note)
    account = Training(
        base=base.folder.name,
        tuner=f"{'full weights' if chosen.lora is None else f'LoRA of rank {chosen.lora.rank}'}, {trained}",
        prompt=cfg.prompt,
        pictures=pictures.images,
        names=pictures.names,
        course=Course(
            loss=tuned.info.loss,
            sheets=tuple(Sheet(step=step, samples=drawn) for step, drawn in sorted(samples.items())),
            first_step=chosen.tune.num_steps - len(tuned.info.loss) + 1,
        ),
        notes=pictures.notes,
        command=page.command_line(sys.argv[1:]),
        config=config.to_dict(cfg) | {"recipe": config.to_dict(chosen)},
        seeds={"seed": cfg.seed},
        seconds={"fine-tuning": tuned.seconds},
        inputs={"base": base.sha256, **dict(zip(pictures.names, pictures.sha256, strict=True))},
    )
    tuner = "full" if chosen.lora is None else "lora"
    training.write(
        cfg.out, account, tuner, {"set": cfg.images.name, "n0": len(pictures), "steps": chosen.tune.num_steps}
    )
