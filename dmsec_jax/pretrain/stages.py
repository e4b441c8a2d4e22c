"""The two stages of pre-training, each resumable: autoencoder, then denoiser with text encoder on cached latents."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import parallel
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import spread
from dmsec_jax.core.config import config
from dmsec_jax.data.images import from_uint8
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion.schedule import alpha_bars, from_scheduler_json
from dmsec_jax.models import clip, unet, vae
from dmsec_jax.models.presets import NANO, Preset
from dmsec_jax.pretrain import autoencoder, corpus, denoiser
from dmsec_jax.pretrain.autoencoder import Config as AutoencoderConfig
from dmsec_jax.pretrain.corpus import Icon
from dmsec_jax.pretrain.denoiser import Config as DenoiserConfig

OnChunk = Callable[[str, int, int, object], None]
"""(stage, steps done, steps in all, Info of the chunk)."""


@config
class Recipe:
    """What `configs/pretrain/emoji.yaml` holds."""

    seed: int = 0
    vocab_size: int = 2000
    chunk_steps: int = 20
    save_every: int = 200
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()


def tokenizer(icons: Sequence[Icon], recipe: Recipe) -> Tokenizer:
    """A byte-pair vocabulary learned from all captions, held-out pictures included (their words are no secret)."""
    captions = [caption for icon in icons for caption in icon.captions]
    return Tokenizer.train(captions, vocab_size=recipe.vocab_size, max_length=NANO.text.max_position_embeddings)


def preset(words: Tokenizer) -> Preset:
    """The nano architecture with this tokenizer's vocabulary."""
    marks = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    return dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, vocab_size=len(words.vocab), **marks))


def train_autoencoder(
    recipe: Recipe,
    icons: Sequence[Icon],
    pictures: np.ndarray,
    folder: Path,
    on_chunk: OnChunk,
    origin: Mapping[str, Any],
) -> dict:
    """Parameters of the trained autoencoder with standardised latents.

    Args:
        icons: those that the denoiser will learn give the moments for the standardisation.
        pictures: `corpus.autoencoder_corpus`, uint8.
        folder: for checkpoints; an interrupted training goes on from there.
        origin: what decides the result, as JSON values.

    Raises:
        ValueError: if the checkpoints there are of another origin.
    """
    cfg, key = recipe.autoencoder, jax.random.key(recipe.seed)
    key_init, key_run = jax.random.split(key)
    advance = _compiled(partial(autoencoder.run, key_run, model=NANO.vae))
    state = _loop(
        "autoencoder",
        lambda: autoencoder.init(key_init, NANO.vae, cfg),
        partial(advance, parallel.placed({"pictures": pictures, "cfg": cfg})),
        recipe,
        cfg.num_steps,
        folder,
        on_chunk,
        origin,
    )
    train = [icon for icon in corpus.concepts(icons) if not icon.held_out]
    mean, _ = moments(state.ema, train)
    flat = mean.reshape(-1, mean.shape[-1])
    return autoencoder.standardise(state.ema, jnp.asarray(flat.mean(0)), jnp.asarray(flat.std(0)))


def train_denoiser(
    recipe: Recipe,
    icons: Sequence[Icon],
    words: Tokenizer,
    vae_params: dict,
    folder: Path,
    on_chunk: OnChunk,
    origin: Mapping[str, Any],
    start: dict | None = None,
) -> dict:
    """Averaged parameters {"unet", "text_encoder"}; `start` (the same tree) continues an earlier model instead of random weights.

    `folder`, `origin` and errors are those of `train_autoencoder`.
    """
    cfg, architecture = recipe.denoiser, preset(words)
    key_unet, key_text, key_run = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), 1), 3)
    start = fresh(key_unet, key_text, architecture) if start is None else start
    train = [icon for icon in corpus.concepts(icons) if not icon.held_out]
    mean, std = moments(vae_params, train)
    captions = np.stack([words.encode(icon.captions) for icon in train])
    data = denoiser.Data(mean, std, captions, words.encode([""])[0])
    alpha_bar = alpha_bars(from_scheduler_json(architecture.scheduler))
    networks = {
        "predict_fn": partial(unet.apply, architecture.unet),
        "text_fn": lambda params, ids: clip.apply(architecture.text, params, ids).last_hidden,
    }
    advance = _compiled(partial(denoiser.run, key_run, **networks))
    state = _loop(
        "denoiser",
        lambda: denoiser.init(start, cfg),
        partial(advance, parallel.placed({"data": data, "alpha_bar": alpha_bar, "cfg": cfg})),
        recipe,
        cfg.num_steps,
        folder,
        on_chunk,
        origin,
    )
    return state.ema


def fresh(key_unet, key_text, architecture: Preset) -> dict:
    """Random parameters {"unet", "text_encoder"}."""
    return {"unet": unet.init(key_unet, architecture.unet), "text_encoder": clip.init(key_text, architecture.text)}


def denoiser_shapes(recipe: Recipe, words: Tokenizer) -> denoiser.State:
    """The training state of the denoiser as `jax.ShapeDtypeStruct`s, for reading a checkpoint."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda: denoiser.init(fresh(key, key, preset(words)), recipe.denoiser))


def moments(vae_params: dict, icons: Sequence[Icon], batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and deviation of each icon on white and of its mirror image: two arrays [N, 2, h, w, c]."""
    pictures = from_uint8(np.stack([corpus.composite(icon.rgba) for icon in icons]))
    pictures = np.stack([pictures, pictures[:, :, ::-1]], 1).reshape(-1, *pictures.shape[1:])
    encode = jax.jit(lambda params, image: spread.whole(vae.encode(NANO.vae, spread.whole(params), spread.even(image))))
    fill = -len(pictures) % batch_size
    padded = np.concatenate([pictures, np.zeros((fill, *pictures.shape[1:]), np.float32)])
    parts = [encode(vae_params, padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
    mean, logvar = (np.concatenate(rows)[: len(pictures)] for rows in zip(*parts, strict=True))
    return tuple(rows.reshape(len(icons), 2, *rows.shape[1:]) for rows in (mean, np.exp(0.5 * logvar)))


def _compiled(run: Callable) -> Callable:
    """(arguments of `run`, state, number of steps) -> (state, Info of each step), the state in place and cut over the devices."""

    @partial(jax.jit, static_argnames="num_steps", donate_argnames="state")
    def advance(fixed, state, num_steps):
        state, info = run(state=state, num_steps=num_steps, **fixed)
        return spread.cut(state), spread.whole(info)

    return advance


def _loop(
    stage: str,
    init: Callable[[], Any],
    advance: Callable[[Any, int], Any],
    recipe: Recipe,
    num_steps: int,
    folder: Path,
    on_chunk: OnChunk,
    origin: Mapping[str, Any],
):
    """Chunks of steps with checkpoints; begins where the newest checkpoint in `folder` ended."""
    of_run = {"stage": stage, "origin": dict(origin)}
    with Checkpoints(folder / stage) as checkpoints:
        found = checkpoints.restore(spread.cut_shapes(jax.eval_shape(init)), metadata=of_run)
        state = parallel.cut(spread.to_host(init())) if found is None else found.tree
        done = int(state.step)
        while done < num_steps:
            count = min(recipe.chunk_steps - done % recipe.chunk_steps, num_steps - done)
            state, info = advance(state, count)
            done += count
            if done % recipe.save_every == 0 or done == num_steps:
                checkpoints.save(done, spread.to_host(state), of_run)
            on_chunk(stage, done, num_steps, jax.device_get(info))
    return state
