"""`dmsec pretrain`: trains what ships: the embedded model (tokenizer, autoencoder, text encoder, denoiser) or the skeleton posterior."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dmsec_jax import parallel
from dmsec_jax.checkpoints import diffusers, io
from dmsec_jax.checkpoints import skeleton as stored
from dmsec_jax.checkpoints.state import Checkpoints, differing
from dmsec_jax.core import config, spread, trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import sha256
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.finetune import driver
from dmsec_jax.pretrain import card, corpus, skeleton, stages
from dmsec_jax.report import page

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
FINISHED = "autoencoder.safetensors"
"""The first stage's outcome in the work folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train what ships from nothing; interrupt it at will, the same command goes on."""

    what: Literal["model", "skeleton"] = "model"
    """The embedded nano model, or SPOT's posterior over skeletons, which needs no data; the options below `out` are the former's."""
    recipe: Path | None = None
    """Default: configs/pretrain/emoji.yaml or configs/spot/skeleton.yaml."""
    set: tuple[str, ...] = ()
    """Overrides of the recipe, for example denoiser.num_steps=1000."""
    work: Path | None = None
    """Icon packages, checkpoints and intermediate weights; default: out/pretrain or out/pretrain-skeleton."""
    out: Path | None = None
    """The finished folder; default: out/emoji-ldm or out/skeleton."""
    photos: Path | None = None
    """Folder of photographs for the autoencoder's corpus."""
    cutouts: Path | None = None
    """Folder (searched below) of cut-out PNG pictures for the autoencoder's corpus."""
    start: Path | None = None
    """An earlier model of the same architecture and vocabulary to go on from, in place of random weights and of the first stage."""
    history: str = ""
    """A sentence for the model card, if this training differed from its recipe."""
    snapshot: bool = False
    """Train nothing: write the model from the finished autoencoder and the newest checkpoint of the denoiser."""


def run(cfg: Config) -> int:
    """Trains, going on where an earlier run was interrupted, and writes the folder with its card."""
    return _MODELS[cfg.what](cfg, Console())


def _skeleton(cfg: Config, console: Console) -> int:
    """The posterior over skeletons."""
    recipe = config.load(skeleton.Recipe, cfg.recipe or Path("configs/spot/skeleton.yaml"), cfg.set)
    driver.require_chunks(recipe.chunk_steps, 0)
    out, total = cfg.out or Path("out/skeleton"), recipe.train.num_steps
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=total, figures="compiling")

        def on_chunk(done: int, losses: np.ndarray) -> None:
            bar.update(task, completed=done, figures=f"loss {losses.mean():.4f} nats per pair")

        params = skeleton.train(recipe, cfg.work or Path("out/pretrain-skeleton"), on_chunk)
    console.print("checking the calibration on held-out data sets")
    posterior = skeleton.posterior(params, recipe)
    stored.write(out, posterior)
    for entry in posterior.card["calibration"]:
        console.print(entry, highlight=False)
    console.print(f"Posterior: {out}", markup=False)
    return 0


def _model(cfg: Config, console: Console) -> int:
    """Both stages of the embedded model."""
    recipe_path = cfg.recipe or Path("configs/pretrain/emoji.yaml")
    cfg = dataclasses.replace(cfg, work=cfg.work or Path("out/pretrain"), out=cfg.out or Path("out/emoji-ldm"))
    recipe = config.load(stages.Recipe, recipe_path, cfg.set)
    driver.require_chunks(recipe.chunk_steps, recipe.save_every)
    require(recipe.save_every > 0, "save_every", "above 0", recipe.save_every, "use a multiple of chunk_steps")
    photos, cutouts = _pictures(cfg.photos, "*"), _pictures(cfg.cutouts, "**/*")
    used = cfg.start is None or not (photos or cutouts)
    require(
        used, "photos, cutouts", "left out with a model to start from", "given", "its autoencoder is trained already"
    )
    if jax.process_index() == 0:
        corpus.install(cfg.work / "npm")
    spread.meet()  # process 0 writes what all read, here and below
    icons = corpus.read_icons(corpus.install(cfg.work / "npm"))
    words = stages.tokenizer(icons, recipe) if cfg.start is None else Tokenizer.load(cfg.start / "tokenizer")
    words.save(cfg.work / "tokenizer")
    spread.meet()
    report = _Report(console, cfg.work / "log.csv")
    if cfg.start is None:
        earlier, vae_params = None, _autoencoder(cfg, recipe, icons, photos, cutouts, report)
    else:
        earlier = dict(diffusers.read_model(cfg.start).params)
        vae_params = parallel.cut(earlier.pop("vae"))
    origin = {
        "seed": recipe.seed,
        "denoiser": config.to_dict(recipe.denoiser),
        "tokenizer": sha256(cfg.work / "tokenizer"),
        "start": sha256(cfg.work / FINISHED if cfg.start is None else cfg.start),
    }
    if cfg.snapshot:
        params = _newest(cfg, recipe, words, origin)
    else:
        params = stages.train_denoiser(recipe, icons, words, vae_params, cfg.work, report, origin, earlier)
    params = spread.to_host({**params, "vae": vae_params})
    model = diffusers.Model(configs=stages.preset(words), params=params, tokenizer=cfg.work / "tokenizer")
    diffusers.write_model(cfg.out, model, "float16", metadata={"producer": "dmsec pretrain"})
    spread.meet()
    given = card.Origin(
        command=page.command_line(sys.argv[1:]),
        photos=len(photos),
        cutouts=len(cutouts),
        start=None if cfg.start is None else origin["start"],
        history=cfg.history,
    )
    card.write(cfg.out, icons, cfg.work / "log.csv", given)
    console.print(f"Model: {cfg.out}")
    return 0


def _pictures(folder: Path | None, pattern: str) -> list[Path]:
    """The pictures in a folder, sorted; none without one."""
    if folder is None:
        return []
    found = sorted(path for path in folder.glob(pattern) if path.suffix.lower() in PICTURES)
    require(bool(found), str(folder), "a folder of pictures", "none", "correct the path")
    return found


def _autoencoder(cfg: Config, recipe: stages.Recipe, icons, photos: list[Path], cutouts: list[Path], report) -> dict:
    """The finished autoencoder of an earlier run of the same origin, or a newly trained one."""
    finished = cfg.work / FINISHED
    origin = {
        "seed": recipe.seed,
        "autoencoder": config.to_dict(recipe.autoencoder),
        "photos": [sha256(path) for path in photos],
        "cutouts": [sha256(path) for path in cutouts],
    }
    if finished.is_file():
        _require_origin(finished, origin)
    else:
        require(not cfg.snapshot, str(finished), "there for a snapshot", "no finished autoencoder", "train first")
        pictures = corpus.autoencoder_corpus(icons, photos, cutouts, 64, recipe.seed)
        params = stages.train_autoencoder(recipe, icons, pictures, cfg.work, report, origin)
        io.write_tensors(finished, trees.flatten(spread.to_host(params)), metadata={"origin": json.dumps(origin)})
        spread.meet()
    return trees.unflatten(io.read_tensors(finished))


def _require_origin(finished: Path, origin: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless the file was made by the same recipe from the same pictures."""
    written = json.loads(io.read_metadata(finished).get("origin", "null"))
    others = ", ".join(differing(written, origin, "origin"))
    cure = f"choose another --work, or remove {finished} and the folder autoencoder beside it"
    require(not others, str(finished), "of this run", f"another {others}", cure)


def _newest(cfg: Config, recipe: stages.Recipe, words, origin: Mapping[str, Any]) -> dict:
    """The averaged denoiser of the newest checkpoint."""
    with Checkpoints(cfg.work / "denoiser", read_only=True) as checkpoints:
        of_run = {"stage": "denoiser", "origin": origin}
        found = checkpoints.restore(stages.denoiser_shapes(recipe, words), metadata=of_run)
    require(found is not None, str(cfg.work / "denoiser"), "a folder with a checkpoint", "none", "train first")
    return found.tree.ema


_MODELS = {"model": _model, "skeleton": _skeleton}


class _Report:
    """Prints a line a chunk, and appends it to a CSV file that the model card plots."""

    def __init__(self, console: Console, log: Path):
        self.console, self.log, self.last = console, log, time.monotonic()

    def __call__(self, stage: str, done: int, total: int, info) -> None:
        now = time.monotonic()
        figures = {name: float(np.mean(value)) for name, value in info._asdict().items()}
        text = " ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.print(f"{stage} {done}/{total} {text} ({now - self.last:.1f} s)", highlight=False)
        if not all(map(np.isfinite, figures.values())):
            raise ValueError(f"{stage} must stay finite, got {text} at step {done}; lower its learning_rate and go on")
        if jax.process_index() == 0:
            with self.log.open("a") as file:
                file.write(f"{stage},{done},{now - self.last:.3f},{next(iter(figures.values())):.6f}\n")
        self.last = now
