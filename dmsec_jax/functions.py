"""From configs to pure functions: what the networks of a latent diffusion model compute, with parameters as arguments."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax.core import spread
from dmsec_jax.core.types import Context, EpsFn, Image, Latent, Params
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.models import clip, conditioning, noisy, presets, unet, vae


class Functions(NamedTuple):
    """Pure functions of one architecture; parameters are always arguments.

    predict_fn: (params["unet"], z_t, t, context) -> what the network predicts, of the schedule's prediction type.
    encode_fn: (params["vae"], image) -> (mean, logvar) of scaled latents.
    decode_fn: (params["vae"], scaled latent) -> image, clipped to [-1, 1].
    text_fn: (params["text_encoder"], ids) -> context [B, L, D]; with two text encoders, (both their params, a `Prompt`) -> context.
    noisy_fn: (params["unet"], sigma, key, z_t, t, context) -> prediction, with noise in the outputs of Dense layers (`models.noisy`).
    """

    predict_fn: EpsFn
    encode_fn: Callable[[Params, Image], tuple[Latent, Latent]]
    decode_fn: Callable[[Params, Latent], Image]
    text_fn: Callable[[Any, Any], Context]
    noisy_fn: Callable[..., Latent] | None = None


class Prompt(NamedTuple):
    """What two text encoders read: ids [B, L] of both tokenizers, which rows stand for silence [B], six sizes [B, 6] (see `models.conditioning`)."""

    ids: Any
    ids_2: Any
    silent: Any
    sizes: Any


@functools.cache
def functions(
    unet_cfg: unet.UNetConfig,
    vae_cfg: vae.VAEConfig,
    text_cfg: clip.TextConfig,
    text_2_cfg: clip.TextConfig | None = None,
) -> Functions:
    """The functions of an architecture; equal configs give the same objects, so compiled programs are shared.

    Weights that are cut over devices are gathered here, where they are used, and activations stay spread by rows.
    """
    scale = vae_cfg.scaling_factor

    def encode_fn(params, image):
        mean, logvar = vae.encode(vae_cfg, spread.whole(params), image)
        return mean * scale, logvar + 2 * np.log(scale).astype(np.float32)

    def decode_fn(params, latent):
        return jnp.clip(vae.decode(vae_cfg, spread.whole(params), latent / scale), -1, 1)

    def text_fn(params, ids):
        return clip.apply(text_cfg, spread.whole(params), ids).last_hidden

    def two_texts_fn(params, prompt):
        # Podell et al. 2023, section 2.1: the last but one states of both, and the second's pooled one
        params = spread.whole(params)
        first = clip.apply(text_cfg, params[0], prompt.ids)
        second = clip.apply_projected(text_2_cfg, params[1], prompt.ids_2)
        spoken = 1.0 - jnp.asarray(prompt.silent, jnp.float32)[:, None]
        tokens = jnp.concatenate([first.penultimate, second.penultimate], -1) * spoken[..., None]
        return conditioning.pack(tokens, second.pooled * spoken, jnp.asarray(prompt.sizes, jnp.float32))

    def predict_fn(params, z_t, t, context):
        return unet.apply(unet_cfg, spread.whole(params), z_t, t, context)

    def noisy_fn(params, sigma, key, z_t, t, context):
        return noisy.with_noise(lambda: predict_fn(params, z_t, t, context), spread.whole(sigma), key)

    text = text_fn if text_2_cfg is None else two_texts_fn
    return Functions(predict_fn, encode_fn, decode_fn, text, noisy_fn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A latent diffusion model ready to use.

    Attributes:
        configs: of the networks, and the scheduler's JSON.
        params: "unet", "vae", "text_encoder", with Stable Diffusion XL "text_encoder_2" -> nested dict of arrays on devices.
        functions: see `Functions`.
        schedule: noise schedule, which also says what the network predicts.
        tokenizer: with `max_length` at most the text encoder's context.
        folder, sha256: the folder or file that it came from, and the hash of all of it.
        tokenizer_folder: with the tokenizer's files.
        tokenizer_2, tokenizer_2_folder: of the second text encoder, where there is one.
        left_out: every way in which the files do not fit, if they were read nevertheless.
        reading: the options that it was read with: name -> value, those that were left open not named.
        files: what it was made from beside `folder`: name -> SHA-256 (learnt words, PEFT's adapter_config.json, the tokenizer of a single file).
    """

    configs: presets.Preset
    params: dict[str, Params]
    functions: Functions
    schedule: ScheduleConfig
    tokenizer: Tokenizer
    folder: Path
    sha256: str
    tokenizer_folder: Path
    tokenizer_2: Tokenizer | None = None
    tokenizer_2_folder: Path | None = None
    left_out: tuple[str, ...] = ()
    reading: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def origin(self) -> dict[str, str]:
        """All that decides what it computes, for unfinished work to be bound to: one file can be read in several ways."""
        found = {"predicts": self.schedule.prediction_type, "dtype": self.configs.unet.dtype}
        return {"sha256": self.sha256, **found, **self.reading, **self.files}

    def inputs(self, name: str) -> dict[str, str]:
        """SHA-256 of everything that it was made from, for `result.json`; `name` is what it is to the run."""
        return {name: self.sha256, **{f"{name} {file}": digest for file, digest in self.files.items()}}

    @property
    def pixels(self) -> int:
        """Side of the pictures that the model was made for."""
        return self.configs.unet.sample_size * self.configs.vae.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of one latent at that size."""
        side = self.configs.unet.sample_size
        return side, side, self.configs.unet.in_channels


_embed_text = jax.jit(lambda params, ids, fn: fn(params, ids), static_argnames="fn")


def contexts(pipeline: Pipeline, prompts: Sequence[str], params: dict[str, Params] | None = None) -> Context:
    """Text embeddings [B, L, D] of prompts under the pipeline's, or other, parameters.

    Raises:
        ValueError: if a prompt is longer than the context (names the number of tokens).
    """
    params = pipeline.params if params is None else params
    prompts, text_fn = list(prompts), pipeline.functions.text_fn
    ids = pipeline.tokenizer.encode(prompts)
    if pipeline.tokenizer_2 is None:
        return _embed_text(params["text_encoder"], ids, text_fn)
    silent = np.array([pipeline.configs.silent_empty and prompt == "" for prompt in prompts])
    side = float(pipeline.pixels)
    sizes = np.tile(np.float32([side, side, 0, 0, side, side]), (len(prompts), 1))  # a whole picture of that size
    prompt = Prompt(ids, pipeline.tokenizer_2.encode(prompts), silent, sizes)
    return _embed_text((params["text_encoder"], params["text_encoder_2"]), prompt, text_fn)
