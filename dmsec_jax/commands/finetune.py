"""`dmsec finetune`: a few pictures and a prompt in, a fine-tuned model folder out."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console

from dmsec_jax import monitoring, parallel, pipeline, tuning
from dmsec_jax.checkpoints import diffusers, single_file
from dmsec_jax.checkpoints.adapter_export import OFT_FILES, write_lora, write_oft
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.commands.places import require_apart, require_free
from dmsec_jax.core import config, trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import read_bounded
from dmsec_jax.core.types import Params
from dmsec_jax.data import images
from dmsec_jax.data.decode import MAX_BYTES, decode
from dmsec_jax.data.images import ImageSet
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import schedule
from dmsec_jax.finetune import monitor, oft
from dmsec_jax.finetune.monitor import Measures
from dmsec_jax.finetune.progress import progress_bar
from dmsec_jax.pipeline import Pipeline
from dmsec_jax.report import page, result, training
from dmsec_jax.report.training import Training
from dmsec_jax.report.training_data import Course, Sheet
from dmsec_jax.tuning import TRAINABLE, Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tune a diffusion model on a few pictures (DreamBooth; full weights, LoRA or OFT; with a posterior over the weights if you like)."""

    images: Path
    """Folder of pictures to learn; a `name.txt` beside `name.png` is that picture's own prompt."""
    prompt: str
    """Prompt of the pictures, for example "a drawing of sks animal"."""
    out: Path = Path("out/finetune")
    """Where the model folder, checkpoints, samples and result.json go."""
    model: Path = pipeline.EMBEDDED
    """Model to start from: a diffusers folder, a hub id or a single file."""
    reading: tyro.conf.OmitArgPrefixes[pipeline.Reading] = pipeline.Reading()
    recipe: Path | None = None
    """YAML of `configs/finetune`; default: full fine-tuning with the embedded model's settings."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, for example tune.num_steps=400 lora.rank=16 bayes.sigma0=0.02."""
    bayes: str | None = None
    """Train a posterior over these weights (Bayesian few-shot fine-tuning): norm, linear, linear+cross, up or up+time for full weights, lora-up,
    or oft; default: as the recipe says, which is none by default. The model that is written is its mean."""
    sheets: Literal["mean", "posterior"] = "mean"
    """What sample sheets are drawn by: the mean, or one model of the posterior for each picture."""
    prior_images: Path | None = None
    """Folder of class pictures for prior preservation."""
    prior_prompt: str | None = None
    """Prompt of the class; without `prior_images` the base model draws the class pictures."""
    prior_count: int = 64
    """How many class pictures the base model draws."""
    text_encoder: bool = False
    """Train the text encoder too."""
    sample_every: int = 100
    """Steps between sample sheets, each of which the monitor looks at, a multiple of the recipe's chunk_steps; 0 draws none."""
    sight: tyro.conf.OmitArgPrefixes[monitoring.Sight] = monitoring.Sight()
    stop_at: Literal["never", "corrupting", "copying"] = "never"
    """End the training when the monitor finds this stage, or one beyond it."""
    single_file: bool = False
    """Write the model as one file too, `model.safetensors` in half precision, for A1111 and ComfyUI."""
    seed: int = 0


SAMPLES = 8
"""Pictures on a sample sheet."""
FOLDERS = ("checkpoints", "model", "pictures", "samples")
"""What `out` holds."""
TUNERS = {"full": "full weights", "lora": "LoRA", "oft": "OFT"}
"""What is trained, as in results and for people."""
LORA_FILES = {"diffusers": "lora.safetensors", "kohya": "lora-kohya.safetensors"}
"""What `out` holds besides after LoRA: the factors alone, for `load_lora_weights` and for A1111."""
OFT_FOLDER = "oft-{}"
"""What it holds after OFT, for each network: the generators alone, for PEFT."""


class Inputs(NamedTuple):
    """What is read before the model: pictures with a prompt each, and class pictures where they are given."""

    pictures: ImageSet
    prompts: list[str]
    prior: ImageSet | None


def run(cfg: Config) -> int:
    """Trains, or goes on where an interrupted run stopped, and writes `out/model`, `out/samples`, `out/result.json`, `out/report.html`."""
    console = Console()
    chosen = tuning.read(cfg.recipe, _overrides(cfg))
    inputs = _inputs(cfg, chosen)
    for note in inputs.pictures.notes:
        console.print(f"note: {page.printable(note)}", markup=False)
    base = pipeline.load(cfg.model, **vars(cfg.reading))
    key_prior, key_tune, key_sample = jax.random.split(jax.random.key(cfg.seed), 3)
    prior = _prior(key_prior, base, cfg, inputs.prior)
    sheets = _Sheets(cfg, base, chosen, inputs, key_sample)
    losses: list[np.ndarray] = []
    per_step = chosen.tune.batch_size * chosen.tune.accumulation
    with (
        Checkpoints(
            cfg.out / "checkpoints", note=lambda text: console.print(f"note: {text}", markup=False)
        ) as checkpoints,
        progress_bar(chosen.tune.num_steps, per_step, console) as bar,
    ):
        if not checkpoints.steps:
            sheets.clear()

        def on_chunk(done, info, state):
            bar(done, info, state)
            losses.append(info.loss)
            if cfg.sample_every and done % cfg.sample_every == 0:
                sheets.add(done, state)
                so_far = sheets.course(np.concatenate(losses), done)
                about = _description(chosen, tuning.mean(chosen, state), tuning.deviations(chosen, state))
                live = _account(cfg, base, inputs, chosen, about, so_far, {})
                page.write(cfg.out / "report.html", training.page(live))

        tuned = tuning.tune(
            key_tune,
            base,
            inputs.pictures.images,
            inputs.prompts,
            chosen,
            prior=prior,
            text_encoder=cfg.text_encoder,
            on_chunk=on_chunk,
            enough=sheets.enough,
            checkpoints=checkpoints,
            origin=_origin(cfg, base, inputs, chosen),
        )
    if not tuned.finished:
        console.print(
            f"Interrupted. The same command goes on from the checkpoint in {cfg.out / 'checkpoints'}.", markup=False
        )
        return 130
    _write(cfg, base, inputs, chosen, tuned, sheets)
    if sheets.measures:
        console.print(monitor.advice(sheets.until(tuned.done)), markup=False)
    console.print(f"Model: {cfg.out / 'model'}   report: {cfg.out / 'report.html'}", markup=False)
    return 0


class _Sheets:
    """Sample sheets and what the monitor says about them, those of an earlier, interrupted call included."""

    def __init__(self, cfg: Config, base: Pipeline, chosen: Recipe, inputs: Inputs, key):
        self.cfg, self.base, self.chosen, self.key = cfg, base, chosen, key
        self.samples: dict[int, np.ndarray] = {}
        self.measures: dict[int, Measures] = {}
        if not cfg.sample_every:
            return
        before = pipeline.sample(key, base, cfg.prompt, SAMPLES)
        key_watch = jax.random.fold_in(key, SAMPLES + 1)
        self.watched = monitoring.watch(key_watch, base, inputs.pictures.images, cfg.prompt, before, cfg.sight)
        for step in range(cfg.sample_every, chosen.tune.num_steps + 1, cfg.sample_every):
            with contextlib.suppress(ValueError, OSError):  # a damaged sheet must not cost the trained model
                self.measures[step] = monitoring.read(self._path(step, "json"))
                sheet = decode(read_bounded(self._path(step, "png"), MAX_BYTES))[0]
                self.samples[step] = images.ungrid(images.from_uint8(np.asarray(sheet)), base.pixels)

    def clear(self) -> None:
        """Forgets and removes the sheets of an earlier run."""
        self.samples, self.measures = {}, {}
        folder = self.cfg.out / "samples"
        result.drop(folder, [path.name for kind in ("png", "json") for path in folder.glob(f"step-*.{kind}")])

    def _path(self, step: int, kind: str) -> Path:
        return self.cfg.out / "samples" / f"step-{step:06d}.{kind}"

    def add(self, done: int, state) -> None:
        """Draws and judges the sheet of a step."""
        cfg, base, chosen = self.cfg, self.base, self.chosen
        mean, sigma = tuning.mean(chosen, state), tuning.deviations(chosen, state)
        params = tuning.merged(base, chosen, mean, cfg.text_encoder)
        drawn = shown = pipeline.sample(self.key, base, cfg.prompt, SAMPLES, params=params)
        if cfg.sheets == "posterior":
            key_weights, key_noise = jax.random.split(jax.random.fold_in(self.key, SAMPLES))
            models = tuning.drawn(key_weights, base, chosen, mean, sigma, SAMPLES, cfg.text_encoder)
            one = lambda j, params: pipeline.sample(
                jax.random.fold_in(key_noise, j), base, cfg.prompt, 1, params=params
            )
            shown = np.concatenate([one(j, params) for j, params in enumerate(models)])
        self.samples[done] = shown
        self.measures[done] = monitoring.look(self.watched, done, params, drawn)
        images.save_png(self._path(done, "png"), images.grid(shown, SAMPLES))
        monitoring.save(self._path(done, "json"), self.measures[done])

    def until(self, done: int) -> list[Measures]:
        """Measures up to a step."""
        return [found for step, found in sorted(self.measures.items()) if step <= done]

    def enough(self, done: int) -> bool:
        """Whether the stage to stop at was reached by now."""
        return self.cfg.stop_at != "never" and monitor.reached(self.until(done), self.cfg.stop_at) is not None

    def course(self, loss: np.ndarray, done: int) -> Course:
        """What is known after `done` steps, for the report; `loss` is that of the last of them."""
        shown = [(step, drawn) for step, drawn in sorted(self.samples.items()) if step <= done]
        sheets = tuple(Sheet(step=step, samples=drawn) for step, drawn in shown)
        return Course(loss=loss, sheets=sheets, first_step=done - len(loss) + 1, measures=tuple(self.until(done)))


def _overrides(cfg: Config) -> tuple[str, ...]:
    """Those of `set`, after the selection that has an option of its own."""
    return cfg.set if cfg.bayes is None else (f"bayes.selection={cfg.bayes}", *cfg.set)


def _inputs(cfg: Config, chosen: Recipe) -> Inputs:
    """Pictures and prompts, after every check that needs no weights: nothing is written or computed for a bad option."""
    require(0 <= cfg.seed < 2**32, "seed", "in 0..2**32 - 1", cfg.seed, "choose another")
    require(cfg.sample_every >= 0, "sample_every", "at least 0", cfg.sample_every, "use 0 for no samples")
    require(
        cfg.prior_count >= 1, "prior_count", "at least 1", cfg.prior_count, "drop prior_prompt for no class pictures"
    )
    given = cfg.prior_images is None or cfg.prior_prompt is not None
    require(given, "prior_prompt", "given with prior_images", None, "say what the class is")
    watched = cfg.stop_at == "never" or cfg.sample_every > 0
    require(watched, "stop_at", "never without samples", cfg.stop_at, "give --sample-every")
    possible = cfg.sheets == "mean" or (chosen.bayes is not None and chosen.bayes.noise != "dropout")
    require(possible, "sheets", "mean without a posterior", cfg.sheets, "name a selection with --bayes")
    check_out(cfg.out, FOLDERS, cfg.model)
    require_apart([cfg.out / "pictures", cfg.out / "samples"], images=cfg.images, prior_images=cfg.prior_images)
    cfg.sight.check(cfg.prompt)
    preset, tokenizer = pipeline.peek(cfg.model, cfg.reading)
    shapes = {name: diffusers.shapes(name, getattr(preset, diffusers.COMPONENTS[name].field)) for name in TRAINABLE}
    noise = schedule.from_scheduler_json(preset.scheduler, f"{cfg.model}/scheduler/scheduler_config.json")
    tuning.check(chosen, shapes if cfg.text_encoder else shapes["unet"], noise)
    every, chunk = cfg.sample_every, chosen.chunk_steps
    cure = f"round it, or give --set chunk_steps={every}"
    require(every % chunk == 0, "sample_every", f"a multiple of chunk_steps={chunk}, or 0", every, cure)
    looks = cfg.stop_at == "never" or every <= chosen.tune.num_steps
    require(looks, "stop_at", f"never in {chosen.tune.num_steps} steps without a sample", cfg.stop_at, "sample earlier")
    size = preset.unet.sample_size * preset.vae.factor
    pictures = images.read_folder(cfg.images, size)
    prompts = [caption or cfg.prompt for caption in pictures.captions]
    words = Tokenizer.load(tokenizer)
    longest = min(words.max_length, preset.text.max_position_embeddings)
    dataclasses.replace(words, max_length=longest).encode([cfg.prompt, cfg.prior_prompt or "", *prompts])
    return Inputs(pictures, prompts, None if cfg.prior_images is None else images.read_folder(cfg.prior_images, size))


def check_out(out: Path, folders: Sequence[str], base: Path) -> None:
    """Raises ValueError where `out` cannot hold these folders, or a model in `model` without overwriting something else or `base`."""
    require_free(out, *folders)
    model = out / "model"
    ours = not model.exists() or (model / diffusers.INDEX).is_file() or not any(model.iterdir())
    require(ours, str(model), "a model folder or nothing", "something else", "choose another --out")
    other = base.resolve() != model.resolve()
    require(other, "model", "another than the one that is written", str(base), "choose another --out")


def _prior(key, base: Pipeline, cfg: Config, given: ImageSet | None) -> tuple[np.ndarray, list[str]] | None:
    """Class pictures for prior preservation, those given or drawn by the base model; None without a class prompt."""
    if cfg.prior_prompt is None:
        return None
    pictures = pipeline.sample(key, base, cfg.prior_prompt, cfg.prior_count) if given is None else given.images
    return pictures, [cfg.prior_prompt] * len(pictures)


def _origin(cfg: Config, base: Pipeline, inputs: Inputs, chosen: Recipe) -> dict[str, Any]:
    """What decides the training state after each step; a longer run may go on from a shorter one."""
    settings = config.to_dict(chosen)
    del settings["chunk_steps"], settings["save_every"], settings["tune"]["num_steps"]
    drawn = cfg.prior_count if inputs.prior is None else list(inputs.prior.sha256)
    return {
        "base": base.origin,
        "pictures": list(inputs.pictures.sha256),
        "prompts": [cfg.prompt, *inputs.prompts],  # the first is that of the samples
        "seed": cfg.seed,
        "prior": None if cfg.prior_prompt is None else {"prompt": cfg.prior_prompt, "pictures": drawn},
        "text_encoder": cfg.text_encoder,
        "sheets": cfg.sheets,
        "sight": {name: str(value) for name, value in vars(cfg.sight).items() if value is not None},
        "recipe": settings,
    }


def _write(cfg: Config, base: Pipeline, inputs: Inputs, chosen: Recipe, tuned: tuning.Tuned, sheets: _Sheets) -> None:
    """The model, the trained factors and the posterior's deviations where there are any, and the account of the run."""
    pipeline.save(cfg.out / "model", dataclasses.replace(base, params=tuned.params))
    if cfg.single_file:
        single_file.write_model(cfg.out / "model.safetensors", base.configs, parallel.to_host(tuned.params))
    trainable, sigma = parallel.to_host((tuned.trainable, tuned.sigma))
    parts = trainable if cfg.text_encoder else {"unet": trainable}
    if chosen.oft is not None:
        for part, tree in parts.items():
            if chosen.oft.radius is not None:
                tree = jax.tree.map(lambda generator: oft.constrained(generator, chosen.oft.radius), tree)
            write_oft(cfg.out / OFT_FOLDER.format(part), tree, chosen.oft.cayley)
    if chosen.lora is not None:
        ratio = 1.0 if chosen.lora.alpha is None else chosen.lora.alpha / chosen.lora.rank
        for layout, name in LORA_FILES.items():
            write_lora(cfg.out / name, parts, ratio, layout)
    if sigma is not None:
        _write_tree(cfg.out / "posterior.safetensors", sigma, {"holds": "sigma of the trainable tree's leaves"})
    earlier = result.earlier(cfg.out)
    if earlier is not None and earlier.method in TUNERS:
        with contextlib.suppress(KeyError, TypeError):  # not as we write it, so nothing of ours lies beside it
            result.drop(cfg.out, _beside(earlier.config) - _beside(_settings(cfg, chosen)))
    about = _description(chosen, tuned.trainable, tuned.sigma)
    course = sheets.course(tuned.info.loss, tuned.done)
    account = _account(cfg, base, inputs, chosen, about, course, {"fine-tuning": tuned.seconds})
    case = {"set": cfg.images.name, "n0": len(inputs.pictures), "steps": tuned.done}
    training.write(cfg.out, account, tuning.tuner_of(chosen), case | _posterior_case(chosen))


def _account(cfg: Config, base: Pipeline, inputs: Inputs, chosen: Recipe, tuner: str, course: Course, seconds):
    """The run for its report."""
    pictures = inputs.pictures
    prior = {} if inputs.prior is None else dict(zip(inputs.prior.names, inputs.prior.sha256, strict=True))
    return Training(
        base=base.folder.name,
        tuner=tuner,
        prompt=cfg.prompt,
        pictures=pictures.images,
        names=pictures.names,
        course=course,
        notes=(*pipeline.misfits("starting", base), *pictures.notes, *(cfg.sight.notes if course.measures else ())),
        command=page.command_line(sys.argv[1:]),
        config=_settings(cfg, chosen),
        seeds={"seed": cfg.seed},
        seconds=seconds,
        inputs={
            **base.inputs("base"),
            **dict(zip(pictures.names, pictures.sha256, strict=True)),
            **{f"prior {name}": digest for name, digest in prior.items()},
        },
    )


def _settings(cfg: Config, chosen: Recipe) -> dict[str, Any]:
    """As `result.json` holds them."""
    return config.to_dict(cfg) | {"recipe": config.to_dict(chosen)}


def _beside(settings: Mapping[str, Any]) -> set[str]:
    """The files beside the model folder that a run with these settings writes."""
    recipe = settings["recipe"]
    names = {"model.safetensors"} if settings["single_file"] else set()
    if recipe["lora"]:
        names |= set(LORA_FILES.values())
    if recipe["oft"]:
        parts = TRAINABLE if settings["text_encoder"] else ("unet",)
        names |= {f"{OFT_FOLDER.format(part)}/{name}" for part in parts for name in OFT_FILES}
    if recipe["bayes"] and recipe["bayes"]["noise"] != "dropout":
        names.add("posterior.safetensors")
    return names


def _write_tree(path: Path, tree, note: dict[str, str]) -> None:
    write_tensors(path, {name: np.asarray(leaf) for name, leaf in trees.flatten(tree).items()}, metadata=note)


def _posterior_case(chosen: Recipe) -> dict[str, str]:
    """What identifies a posterior among the settings of a run."""
    if chosen.bayes is None:
        return {}
    selection = chosen.bayes.selection
    return {"bayes": selection if isinstance(selection, str) else " ".join(selection)}


def _description(chosen: Recipe, trainable: Params, sigma: Params | None) -> str:
    """What is trained, for people."""
    kind = TUNERS[tuning.tuner_of(chosen)] + (f" of rank {chosen.lora.rank}" if chosen.lora is not None else "")
    text = f"{kind}, {trees.count(trainable):,} parameters"
    return text if sigma is None else f"{text}, {trees.count(sigma):,} of them with a posterior"
