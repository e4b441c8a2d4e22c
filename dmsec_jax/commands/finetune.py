"""`dmsec finetune`: a few pictures and a prompt in, a fine-tuned model folder out."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dmsec_jax import pipeline
from dmsec_jax.checkpoints import diffusers
from dmsec_jax.checkpoints.adapter_export import write_lora
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import config, trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import read_bounded
from dmsec_jax.core.types import Params
from dmsec_jax.data import images
from dmsec_jax.data.decode import MAX_BYTES, decode
from dmsec_jax.data.images import ImageSet
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import schedule
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
    """A fine-tuned model: `params` as in a Pipeline, the `trainable` tree (averaged where an average is kept), Info and
    seconds of all steps, the step that this call went on from."""

    params: dict[str, Params]
    trainable: Params
    info: dreambooth.Info
    seconds: float
    start: int
    finished: bool


SAMPLES = 8
"""Pictures on a sample sheet."""
FOLDERS = ("checkpoints", "model", "pictures", "samples")
"""What `out` holds."""
LORA_FILES = {"diffusers": "lora.safetensors", "kohya": "lora-kohya.safetensors"}
"""What `out` holds besides after LoRA: the factors alone, for `load_lora_weights` and for A1111."""
TRAINABLE = ("unet", "text_encoder")

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
    origin: Mapping[str, Any] | None = None,
) -> Tuned:
    """Fine-tunes `base` on `pictures` [N, H, W, 3] in [-1, 1] with one prompt each, or one for all.

    Args:
        prior: class pictures and their prompts, for prior preservation.
        on_chunk: called with (steps done, Info, State) after each compiled chunk of steps.
        checkpoints: where training state is kept; an interrupted run continues from there with the same result.
        origin: what decides the result besides the number of steps, as JSON values; checkpoints of another are refused.
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
        options["save"], options["restore"] = driver.on_disk(checkpoints, origin)
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
    return Tuned(params, trainable, outcome.past.info, outcome.past.seconds, outcome.start, outcome.finished)


def merged(
    base: Pipeline, chosen: recipe.Recipe, trainable: Params, text_encoder: bool = False, scale=None
) -> dict[str, Params]:
    """Parameters of the whole model with the trainable tree merged in; `scale` as in `Adapter.merge`."""
    part = _adapter(chosen.lora, chosen.patterns).merge(_trained_part(base, text_encoder), trainable, scale)
    return {**base.params, **(part if text_encoder else {"unet": part})}


def _trained_part(base: Pipeline, text_encoder: bool) -> Params:
    return {name: base.params[name] for name in TRAINABLE} if text_encoder else base.params["unet"]


@functools.cache
def _adapter(lora: recipe.LoRA | None, patterns: tuple[str, ...]) -> Adapter:
    """One adapter object per choice, so that a second training of the same kind does not compile again."""
    return recipe.adapter_of(recipe.Recipe(lora=lora, patterns=patterns))


def read_recipe(path: Path | None, overrides: tuple[str, ...]) -> recipe.Recipe:
    """The recipe of a YAML file, or the default one, with `key=value` overrides."""
    if path is not None:
        return config.load(recipe.Recipe, path, overrides)
    return config.override(DEFAULT_RECIPE, overrides)


class Inputs(NamedTuple):
    """What is read before the model: pictures with a prompt each, and class pictures where they are given."""

    pictures: ImageSet
    prompts: list[str]
    prior: ImageSet | None


def run(cfg: Config) -> int:
    """Trains, or goes on where an interrupted run stopped, and writes `out/model`, `out/samples`, `out/result.json`, `out/report.html`."""
    console = Console()
    chosen = read_recipe(cfg.recipe, cfg.set)
    inputs = _inputs(cfg, chosen)
    for note in inputs.pictures.notes:
        console.print(f"note: {page.printable(note)}", markup=False)
    base = pipeline.load(cfg.model)
    key_prior, key_tune, key_sample = jax.random.split(jax.random.key(cfg.seed), 3)
    prior = _prior(key_prior, base, cfg, inputs.prior)
    samples: dict[int, np.ndarray] = {}

    def draw_samples(done, info, state):
        if cfg.sample_every and done % cfg.sample_every == 0:
            params = merged(base, chosen, dreambooth.averaged(state), cfg.text_encoder)
            samples[done] = pipeline.sample(key_sample, base, cfg.prompt, SAMPLES, params=params)
            images.save_png(_sheet(cfg, done), images.grid(samples[done], SAMPLES))

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
            inputs.pictures.images,
            inputs.prompts,
            chosen,
            prior=prior,
            text_encoder=cfg.text_encoder,
            on_chunk=on_chunk,
            checkpoints=checkpoints,
            origin=_origin(cfg, base, inputs, chosen),
        )
    if not tuned.finished:
        console.print(
            f"Interrupted. The same command goes on from the checkpoint in {cfg.out / 'checkpoints'}.", markup=False
        )
        return 130
    _write(cfg, base, inputs.pictures, chosen, tuned, _earlier(cfg, base.pixels, tuned.start) | samples)
    console.print(f"Model: {cfg.out / 'model'}   report: {cfg.out / 'report.html'}", markup=False)
    return 0


def _inputs(cfg: Config, chosen: recipe.Recipe) -> Inputs:
    """Pictures and prompts, after every check that needs no weights: nothing is written or computed for a bad option."""
    require(0 <= cfg.seed < 2**32, "seed", "in 0..2**32 - 1", cfg.seed, "choose another")
    require(cfg.sample_every >= 0, "sample_every", "at least 0", cfg.sample_every, "use 0 for no samples")
    require(
        cfg.prior_count >= 1, "prior_count", "at least 1", cfg.prior_count, "drop prior_prompt for no class pictures"
    )
    given = cfg.prior_images is None or cfg.prior_prompt is not None
    require(given, "prior_prompt", "given with prior_images", None, "say what the class is")
    for place in (*reversed(cfg.out.parents), cfg.out, *(cfg.out / name for name in FOLDERS)):
        require(place.is_dir() or not place.exists(), str(place), "a folder", "a file", "choose another --out")
    model = cfg.out / "model"
    ours = not model.exists() or (model / diffusers.INDEX).is_file() or not any(model.iterdir())
    require(ours, str(model), "a model folder or nothing", "something else", "choose another --out")
    other = cfg.model.resolve() != model.resolve()
    require(other, "model", "another than the one that is written", str(cfg.model), "choose another --out")
    preset = diffusers.read_preset(cfg.model)
    shapes = {name: diffusers.shapes(name, getattr(preset, diffusers.COMPONENTS[name].field)) for name in TRAINABLE}
    noise = schedule.from_scheduler_json(preset.scheduler, f"{cfg.model}/scheduler/scheduler_config.json")
    recipe.check(chosen, shapes if cfg.text_encoder else shapes["unet"], noise)
    size = preset.unet.sample_size * preset.vae.factor
    pictures = images.read_folder(cfg.images, size)
    prompts = [caption or cfg.prompt for caption in pictures.captions]
    words = Tokenizer.load(cfg.model / "tokenizer")
    longest = min(words.max_length, preset.text.max_position_embeddings)
    dataclasses.replace(words, max_length=longest).encode([cfg.prompt, cfg.prior_prompt or "", *prompts])
    return Inputs(pictures, prompts, None if cfg.prior_images is None else images.read_folder(cfg.prior_images, size))


def _prior(key, base: Pipeline, cfg: Config, given: ImageSet | None) -> tuple[np.ndarray, list[str]] | None:
    """Class pictures for prior preservation, those given or drawn by the base model; None without a class prompt."""
    if cfg.prior_prompt is None:
        return None
    pictures = pipeline.sample(key, base, cfg.prior_prompt, cfg.prior_count) if given is None else given.images
    return pictures, [cfg.prior_prompt] * len(pictures)


def _origin(cfg: Config, base: Pipeline, inputs: Inputs, chosen: recipe.Recipe) -> dict[str, Any]:
    """What decides the training state after each step; a longer run may go on from a shorter one."""
    settings = config.to_dict(chosen)
    del settings["chunk_steps"], settings["save_every"], settings["tune"]["num_steps"]
    drawn = cfg.prior_count if inputs.prior is None else list(inputs.prior.sha256)
    return {
        "base": base.sha256,
        "pictures": list(inputs.pictures.sha256),
        "prompts": [cfg.prompt, *inputs.prompts],  # the first is that of the samples
        "seed": cfg.seed,
        "prior": None if cfg.prior_prompt is None else {"prompt": cfg.prior_prompt, "pictures": drawn},
        "text_encoder": cfg.text_encoder,
        "recipe": settings,
    }


def _sheet(cfg: Config, step: int) -> Path:
    return cfg.out / "samples" / f"step-{step:06d}.png"


def _earlier(cfg: Config, size: int, start: int) -> dict[int, np.ndarray]:
    """Samples that were drawn up to step `start`, before an interruption."""
    found = {}
    for step in range(cfg.sample_every, start + 1, cfg.sample_every) if cfg.sample_every else ():
        if _sheet(cfg, step).is_file():
            with contextlib.suppress(ValueError, OSError):  # a damaged sheet must not cost the trained model
                sheet = decode(read_bounded(_sheet(cfg, step), MAX_BYTES))[0]
                found[step] = images.ungrid(images.from_uint8(np.asarray(sheet)), size)
    return found


def _write(cfg, base, pictures, chosen, tuned, samples) -> None:
    """The model folder, for LoRA the trained factors alone as well, and the account of the run."""
    pipeline.save(cfg.out / "model", dataclasses.replace(base, params=tuned.params))
    trained = f"{trees.count(tuned.trainable):,} parameters"
    if chosen.lora is not None:
        parts = tuned.trainable if cfg.text_encoder else {"unet": tuned.trainable}
        ratio = 1.0 if chosen.lora.alpha is None else chosen.lora.alpha / chosen.lora.rank
        for layout, name in LORA_FILES.items():
            write_lora(cfg.out / name, parts, ratio, layout)
    account = Training(
        base=base.folder.name,
        tuner=f"{'full weights' if chosen.lora is None else f'LoRA of rank {chosen.lora.rank}'}, {trained}",
        prompt=cfg.prompt,
        pictures=pictures.images,
        names=pictures.names,
        course=Course(
            loss=tuned.info.loss,
            sheets=tuple(Sheet(step=step, samples=drawn) for step, drawn in sorted(samples.items())),
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
