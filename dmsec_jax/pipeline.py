"""The one place where models meet diffusion: a model folder becomes pure functions and their parameters.

Everything above works with `eps_fn`, `encode_fn`, `decode_fn` and `text_fn`, whatever the architecture. The functions of two models of the
same architecture are the same objects, so what is compiled for the base model serves its fine-tuned versions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import parallel
from dmsec_jax.checkpoints import adapters, diffusers, single_file
from dmsec_jax.core import spread, trees
from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.files import sha256
from dmsec_jax.core.types import Context, EpsFn, Image, Latent, Params
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import draws, guidance, samplers, schedule
from dmsec_jax.models import clip, presets, unet, vae

EMBEDDED = Path(__file__).parent / "assets" / "emoji-ldm"
"""Folder of the nano model that ships with the package."""


class Functions(NamedTuple):
    """Pure functions of one architecture; parameters are always arguments.

    predict_fn: (params["unet"], z_t, t, context) -> what the network predicts, of the schedule's prediction type.
    encode_fn: (params["vae"], image) -> (mean, logvar) of scaled latents.
    decode_fn: (params["vae"], scaled latent) -> image, clipped to [-1, 1].
    text_fn: (params["text_encoder"], ids) -> context [B, L, D].
    """

    predict_fn: EpsFn
    encode_fn: Callable[[Params, Image], tuple[Latent, Latent]]
    decode_fn: Callable[[Params, Latent], Image]
    text_fn: Callable[[Params, Any], Context]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A latent diffusion model ready to use.

    Attributes:
        configs: of the networks, and the scheduler's JSON.
        params: "unet", "vae", "text_encoder" -> nested dict of float32 arrays on the default device.
        functions: see `Functions`.
        schedule: noise schedule, which also says what the network predicts.
        tokenizer: with `max_length` at most the text encoder's context.
        folder, sha256: the folder or file that it came from, and the hash of all of it.
        tokenizer_folder: with the tokenizer's files.
    """

    configs: presets.Preset
    params: dict[str, Params]
    functions: Functions
    schedule: schedule.ScheduleConfig
    tokenizer: Tokenizer
    folder: Path
    sha256: str
    tokenizer_folder: Path

    @property
    def pixels(self) -> int:
        """Side of the pictures that the model was made for."""
        return self.configs.unet.sample_size * self.configs.vae.factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of one latent at that size."""
        side = self.configs.unet.sample_size
        return side, side, self.configs.unet.in_channels


def load(
    folder: str | Path = EMBEDDED,
    *,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """Reads Stable Diffusion 1.x or 2.x: a diffusers folder, or a single file of latent diffusion.

    Args:
        folder: the folder or file.
        variant: of a folder's weight files, for example "fp16".
        tokenizer: for a single file, which has none: the folder of one.
        prediction_type: for a single file, whose weights do not tell: "epsilon" or "v_prediction"; None: as the `.yaml` beside it says.

    Raises:
        FileNotFoundError, ValueError: as `checkpoints.diffusers.read_model` and `checkpoints.single_file.read_model`; on a tokenizer that does
            not fit the text encoder.
    """
    if Path(folder).is_file():
        model = single_file.read_model(folder, tokenizer, prediction_type)
    else:
        given = tokenizer is None and prediction_type is None
        require(
            given, "tokenizer and prediction_type", "left out for a folder, which has them", "one", "leave them out"
        )
        model = diffusers.read_model(folder, variant)
    cfg = schedule.from_scheduler_json(model.configs.scheduler, f"{folder}/scheduler/scheduler_config.json")
    words = Tokenizer.load(model.tokenizer)
    text = model.configs.text
    require(
        len(words.vocab) <= text.vocab_size,
        str(model.tokenizer),
        f"of at most {text.vocab_size} tokens, the text encoder's vocabulary",
        f"{len(words.vocab)} tokens",
        "take both from one model",
    )
    words = dataclasses.replace(words, max_length=min(words.max_length, text.max_position_embeddings))
    return Pipeline(
        configs=model.configs,
        params=parallel.placed(dict(model.params)),
        functions=functions(model.configs.unet, model.configs.vae, text),
        schedule=cfg,
        tokenizer=words,
        folder=Path(folder),
        sha256=sha256(folder),
        tokenizer_folder=model.tokenizer,
    )


def load_tuned(path: str | Path, base: Pipeline) -> Pipeline:
    """Reads a model that was fine-tuned from `base`: a model folder, a single file (what it leaves out is taken from the base), or an adapter (LoRA,
    ...), which is merged into it.

    Raises:
        FileNotFoundError, ValueError: as `load`, `checkpoints.single_file.read_params` and `checkpoints.adapters.read_adapter`; on a model of
            another architecture than the base's.
    """
    path = Path(path)
    if (path / diffusers.INDEX).is_file():
        tuned = load(path)
        require_same_architecture(base, tuned)
        return tuned
    path = adapters.find_file(path)
    state = single_file.read(path)
    if single_file.is_single_file(state):
        params = single_file.params_of(state, base.configs, str(path))
    else:
        params = adapters.merge(base.params, adapters.read_adapter(path, base.params))
    return dataclasses.replace(base, params=parallel.placed(params), sha256=sha256(path))


def require_same_architecture(base: Pipeline, tuned: Pipeline) -> None:
    """Raises ValueError unless both models have the same networks, schedule and vocabulary, as when one was made from the other."""
    cure = "name the base model that the other was fine-tuned from"
    for name in ("unet", "vae", "text"):
        first, second = getattr(base.configs, name), getattr(tuned.configs, name)
        fields = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) != getattr(second, f.name)]
        contract = f"of the architecture of {base.folder}"
        require(not fields, str(tuned.folder), contract, f"another {', '.join(fields)} of the {name}", cure)
    same = base.schedule == tuned.schedule and base.tokenizer.vocab == tuned.tokenizer.vocab
    require(same, str(tuned.folder), f"of the schedule and vocabulary of {base.folder}", "others", cure)


def save(
    folder: str | Path, pipeline: Pipeline, dtype: str = "float32", metadata: dict[str, str] | None = None
) -> None:
    """Writes the pipeline's parameters as a diffusers folder; see `checkpoints.diffusers.write_model`."""
    model = diffusers.Model(
        configs=pipeline.configs,
        params=jax.device_get(pipeline.params),
        tokenizer=pipeline.tokenizer_folder,
    )
    diffusers.write_model(folder, model, dtype, metadata=metadata)


class Subject(NamedTuple):
    """What is audited: two models of one architecture, and the prompt of the second."""

    base: Pipeline
    tuned: dict[str, Params]
    """Parameters of the fine-tuned model: "unet", "vae", "text_encoder"."""
    prompt: str


@functools.cache
def functions(unet_cfg: unet.UNetConfig, vae_cfg: vae.VAEConfig, text_cfg: clip.TextConfig) -> Functions:
    """The functions of an architecture; equal configs give the same objects, so compiled programs are shared."""
    scale = vae_cfg.scaling_factor

    def encode_fn(params, image):
        mean, logvar = vae.encode(vae_cfg, params, image)
        return mean * scale, logvar + 2 * np.log(scale).astype(np.float32)

    def decode_fn(params, latent):
        return jnp.clip(vae.decode(vae_cfg, params, latent / scale), -1, 1)

    def text_fn(params, ids):
        return clip.apply(text_cfg, params, ids).last_hidden

    return Functions(functools.partial(unet.apply, unet_cfg), encode_fn, decode_fn, text_fn)


STACKED_LIMIT = 50_000_000
"""Pairs of networks up to this many parameters are stacked and mapped over: one compiled body instead of two, at the price of a copy."""


def pair(pipeline: Pipeline, first: tuple[Params, Context], second: tuple[Params, Context]) -> tuple[Callable, dict]:
    """Two networks of one architecture, each with its context, as what contrasting methods take.

    Args:
        first, second: (params["unet"], context [1, L, D]); the first is the base model in two-model guidance.

    Returns:
        pair_fn: (params, z_t, t) -> (first prediction, second prediction); `z_t` may be a pair of latents, one for each network. The same
            object for the same architecture.
        params: its parameters.
    """
    networks, texts = zip(first, second, strict=True)
    if trees.count(networks[0]) > STACKED_LIMIT:
        return in_turn(pipeline.functions.predict_fn), {"unet": networks, "context": texts}
    stack = lambda *leaves: jnp.stack(leaves)
    return _mapped(pipeline.functions.predict_fn), {"unet": jax.tree.map(stack, *networks), "context": jnp.stack(texts)}


def single(pipeline: Pipeline, network: Params, context: Context) -> tuple[Callable, dict]:
    """(eps_fn, params) of one network with its context [1, L, D], `eps_fn` as `methods.finextract.alone` takes it."""
    return _bound(pipeline.functions.predict_fn), {"unet": network, "context": context}


@functools.cache
def in_turn(predict_fn: EpsFn) -> Callable:
    """The `pair_fn` of large networks: one after the other, for `params["unet"]` and `params["context"]` that are pairs."""

    def pair_fn(params, z_t, t):
        parts = zip(params["unet"], params["context"], _two(z_t), strict=True)
        return tuple(predict_fn(network, z, t, _rows(context, z)) for network, context, z in parts)

    return pair_fn


@functools.cache
def _mapped(predict_fn):
    def pair_fn(params, z_t, t):
        one = lambda part, z: predict_fn(part["unet"], z, t, _rows(part["context"], z))
        if isinstance(z_t, tuple):
            first, second = jax.lax.map(lambda both: one(*both), (params, jnp.stack(z_t)))
        else:
            first, second = jax.lax.map(lambda part: one(part, z_t), params)
        return first, second

    return pair_fn


@functools.cache
def _bound(predict_fn):
    return lambda params, z_t, t: predict_fn(params["unet"], z_t, t, _rows(params["context"], z_t))


def _two(z_t):
    return z_t if isinstance(z_t, tuple) else (z_t, z_t)


def _rows(context, z_t):
    """The context repeated for every row of the batch."""
    return jnp.broadcast_to(context, (z_t.shape[0], *context.shape[-2:]))


def sample(
    key,
    pipeline: Pipeline,
    prompt: str,
    count: int,
    *,
    params: dict[str, Params] | None = None,
    num_steps: int = 25,
    guidance_weight: float | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """`count` pictures [N, H, W, 3] of one prompt by deterministic DDIM; picture j starts from noise of its own key.

    Args:
        params: of another model of the same architecture, for example a fine-tuned one.
        guidance_weight: of classifier-free guidance; None samples the conditional model alone (half the work).
    """
    params = pipeline.params if params is None else params
    batch_size = spread.filled(min(batch_size, count))
    empty, context = contexts(pipeline, ["", prompt], params)[:, None]
    model = single(pipeline, params["unet"], context)
    if guidance_weight is not None:
        model = pair(pipeline, (params["unet"], empty), (params["unet"], context))
    draw = functools.partial(
        _sample,
        shape=pipeline.latent_shape,
        schedule=pipeline.schedule,
        num_steps=num_steps,
        guided=guidance_weight is not None,
    )
    pictures = []
    for start in range(0, count, batch_size):
        index = jnp.arange(start, start + batch_size)
        latents = draw(key, index, model[1], guidance_weight or 0.0, model_fn=model[0])
        pictures.append(decode(dataclasses.replace(pipeline, params=params), latents, batch_size))
    return np.concatenate(pictures)[:count]


@functools.partial(jax.jit, static_argnames=("shape", "schedule", "num_steps", "guided", "model_fn"))
def _sample(key, index, params, weight, *, shape, schedule, num_steps, guided, model_fn):
    bound = functools.partial(model_fn, params)
    if guided:
        bound = guidance.mix_outputs(bound, (1 - weight, weight), 2)
    index = spread.even(index)
    noise = draws.example_noise(key, index, shape)
    return spread.whole(samplers.sample(key, noise, samplers.ddim(schedule, num_steps), model_fn=bound, index=index))


_encode = jax.jit(lambda params, image, fn: spread.whole(fn(params, spread.even(image))), static_argnames="fn")
_decode = jax.jit(lambda params, latent, fn: spread.whole(fn(params, spread.even(latent))), static_argnames="fn")
_embed_text = jax.jit(lambda params, ids, fn: fn(params, ids), static_argnames="fn")


def contexts(pipeline: Pipeline, prompts: Sequence[str], params: dict[str, Params] | None = None) -> Context:
    """Text embeddings [B, L, D] of prompts under the pipeline's, or other, parameters.

    Raises:
        ValueError: if a prompt is longer than the context (names the number of tokens).
    """
    params = pipeline.params if params is None else params
    return _embed_text(params["text_encoder"], pipeline.tokenizer.encode(list(prompts)), pipeline.functions.text_fn)


def encode(pipeline: Pipeline, images: Image, batch_size: int = 16) -> tuple[Latent, Latent]:
    """Mean and log-variance of the scaled latents of any number of pictures, in equal batches (one compilation).

    Raises:
        ValueError: if `images` are not [N, H, W, 3] in [-1, 1], or a side is no multiple of the autoencoder's factor.
    """
    image_batch("images", images)
    run = lambda part: _encode(pipeline.params["vae"], part, pipeline.functions.encode_fn)
    return tuple(map(jnp.concatenate, zip(*batched(run, images, batch_size), strict=True)))


def decode(pipeline: Pipeline, latents: Latent, batch_size: int = 16) -> np.ndarray:
    """Pictures [N, H, W, 3] in [-1, 1] of scaled latents, in equal batches; rows that are not finite come back as NaN."""
    run = lambda part: (_decode(pipeline.params["vae"], part, pipeline.functions.decode_fn),)
    return np.concatenate([np.asarray(part) for (part,) in batched(run, latents, batch_size)])


def batched(run: Callable, rows, size: int):
    """`run` over batches of exactly min(size, N) rows of a tree of arrays [N, ...], rounded up to what the devices of a mesh can share; where
    rows are short, the last one is repeated.

    Yields what `run` returns, a tuple of arrays, without the filling: one compilation serves any N.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    size = spread.filled(min(size, count))
    for start in range(0, count, size):
        kept = min(size, count - start)
        index = np.minimum(np.arange(start, start + size), count - 1)
        part = jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), rows)
        yield tuple(out[:kept] for out in run(part))
