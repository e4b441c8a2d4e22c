"""From files to a `Pipeline`: folders, single files, ids of the hub; models tuned from another; learnt words."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dmsec_jax import parallel
from dmsec_jax.checkpoints import adapters, diffusers, embeddings, hub, single_file
from dmsec_jax.checkpoints.adapter_scales import config_beside
from dmsec_jax.checkpoints.mapping import Partial
from dmsec_jax.core import trees
from dmsec_jax.core.checks import image_batch, require
from dmsec_jax.core.files import sha256
from dmsec_jax.core.types import Image
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import prediction, schedule
from dmsec_jax.functions import Pipeline, contexts, functions
from dmsec_jax.models import clip, presets

EMBEDDED = Path(__file__).parent / "assets" / "emoji-ldm"
"""Folder of the nano model that ships with the package."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model is read, where its files leave that open."""

    variant: str | None = None
    """Of a folder's or a hub model's weight files, for example fp16; with two models, of the base, the other's being found."""
    tokenizer: Path | None = None
    """For a single file, which has none: the folder of one, for example of another model of the family."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """For a single file, whose weights do not tell; default: as is written in or beside it, and where it is not, extract and authenticate take what
    fits the pictures better; the other verbs ask for it."""
    weights: single_file.Weights = "model"
    """Of a single file that holds both: the UNet itself, or the running average of its training; with two models, of each that holds one."""
    allow_partial: bool = False
    """Read a model that does not fit, too: what is unused or mis-shaped is left out, what then lacks is taken from the base model. Recorded."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the UNet and the text encoders compute in; bfloat16 suits TPUs and GPUs. Weights, sums and the autoencoder stay in float32."""
    remat: Literal["none", "block"] = "none"
    """In gradients, activations of the UNet's and the autoencoder's blocks are kept, or computed again: slower, in far less memory."""


def load(
    folder: str | Path = EMBEDDED,
    *,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    weights: single_file.Weights = "model",
    allow_partial: bool = False,
    pictures: Callable[[int], np.ndarray] | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    remat: str = "none",
    mesh: jax.sharding.Mesh | None = None,
) -> Pipeline:
    """Reads Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a single file of latent diffusion, or a model of the hub.

    Tensors go from file to device one at a time.

    Args:
        folder: the folder, the file, or "owner/name[@revision]" (see `checkpoints.hub`).
        variant, tokenizer, prediction_type, weights, allow_partial, remat: see `Reading`.
        pictures: side -> [N, side, side, 3] in [-1, 1], asked for where nothing says what the model predicts: `diffusion.prediction` decides by them.
        dtype, compute_dtype: of the parameters, and what the UNet and the text encoders compute in (None: the same); the autoencoder stays in
            float32.
        mesh: where parameters lie, by `parallel.plan`; None: that in force, or the default device.

    Raises:
        FileNotFoundError, ValueError: as `checkpoints.diffusers.read_model` and `checkpoints.single_file.model_of`; on a tokenizer that does
            not fit the text encoder, another dtype, or a model that predicts neither noise nor velocity.
    """
    compute_dtype = compute_dtype or dtype
    for name, kind in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        require(kind in ("float32", "bfloat16"), name, "float32 or bfloat16", repr(kind), "choose one of them")
    path = hub.fetch(folder, variant) if hub.is_id(folder) else Path(folder)
    partial = Partial() if allow_partial else None
    placer = functools.partial(_placer, dtype=dtype, mesh=mesh)
    unsure = False
    if path.is_file():
        state = single_file.read(path)
        known = prediction_type or single_file.prediction_of(path, state)
        unsure = known is None and pictures is not None
        kind = "epsilon" if unsure else known
        model = single_file.model_of(state, path, tokenizer, kind, weights, placer=placer, partial=partial)
    else:
        given = tokenizer is None and prediction_type is None
        require(
            given, "tokenizer and prediction_type", "left out for a folder, which has them", "one", "leave them out"
        )
        model = diffusers.read_model(path, variant, placer, partial)
    left_out = () if partial is None else tuple(f"{kind}: {what}" for kind, what in partial.problems)
    loaded = dataclasses.replace(
        _assembled(model, path, compute_dtype, remat),
        left_out=left_out,
        reading=_chosen(variant=variant, weights=weights, allow_partial=allow_partial),
        files={"tokenizer": sha256(model.tokenizer)} if path.is_file() else {},
    )
    return predicting(loaded, _probed(loaded, pictures(loaded.pixels))) if unsure else loaded


def _chosen(**options) -> dict[str, str]:
    """`Pipeline.reading`."""
    return {name: str(value) for name, value in options.items() if value is not None}


def peek(folder: str | Path, reading: Reading) -> tuple[presets.Preset, Path]:
    """The configs and the tokenizer's folder of what `load` would read, before any weight is; raises like `load`."""
    path = hub.fetch(folder, reading.variant) if hub.is_id(folder) else Path(folder)
    if not path.is_file():
        return diffusers.read_preset(path), diffusers.tokenizer_folder(path / "tokenizer")
    state = single_file.read(path)
    known = reading.prediction_type or single_file.prediction_of(path, state)
    single_file.require_known(path, known, reading.tokenizer)
    return single_file.preset_of(state, str(path), known), diffusers.tokenizer_folder(reading.tokenizer)


def _placer(part: str, dtype: str | np.dtype, mesh: jax.sharding.Mesh | None) -> Callable[[str, np.ndarray], jax.Array]:
    """See `checkpoints.mapping.Place`."""
    kind = jnp.dtype(jnp.float32 if part == "vae" else dtype)

    def place(path: str, view: np.ndarray) -> jax.Array:
        leaf = np.array(view, kind, order="C")  # a copy: the file may change
        placed = parallel.cut(leaf) if mesh is None else jax.device_put(leaf, parallel.plan(leaf, mesh))
        return jax.block_until_ready(placed)

    return place


def _assembled(model: diffusers.Model, path: Path, compute_dtype: str, remat: str) -> Pipeline:
    """The model with its functions, schedule and tokenizers."""
    networks = {name: getattr(model.configs, name) for name in ("unet", "text", "text_2")}
    networks = {name: cfg and dataclasses.replace(cfg, dtype=compute_dtype) for name, cfg in networks.items()}
    networks["unet"] = dataclasses.replace(networks["unet"], remat=remat)
    configs = dataclasses.replace(model.configs, **networks, vae=dataclasses.replace(model.configs.vae, remat=remat))
    words, words_2 = _words(model.tokenizer, configs.text), None
    if configs.text_2 is not None:
        words_2 = _words(model.tokenizer_2 or model.tokenizer, configs.text_2)
        if model.tokenizer_2 is None:
            words_2 = zero_padded(words_2)
    elif path.is_file() and configs.text.hidden_act == "gelu":
        words = zero_padded(words)
    return Pipeline(
        configs=configs,
        params=dict(model.params),
        functions=functions(configs.unet, configs.vae, configs.text, configs.text_2),
        schedule=schedule.from_scheduler_json(configs.scheduler, f"{path}/scheduler/scheduler_config.json"),
        tokenizer=words,
        folder=path,
        sha256=sha256(path),
        tokenizer_folder=model.tokenizer,
        tokenizer_2=words_2,
        tokenizer_2_folder=model.tokenizer_2,
    )


def _words(folder: Path, text: clip.TextConfig) -> Tokenizer:
    words = Tokenizer.load(folder)
    require(
        len(words.vocab) <= text.vocab_size,
        str(folder),
        f"of at most {text.vocab_size} tokens, the text encoder's vocabulary",
        f"{len(words.vocab)} tokens",
        "take both from one model",
    )
    return dataclasses.replace(words, max_length=min(words.max_length, text.max_position_embeddings))


def zero_padded(words: Tokenizer) -> Tokenizer:
    """The same vocabulary padded with the token of id 0, as OpenCLIP's text encoders were trained."""
    return dataclasses.replace(words, pad=next(token for token, i in words.vocab.items() if i == 0))


def predicting(pipeline: Pipeline, prediction_type: str) -> Pipeline:
    """The same networks, taken to predict something else."""
    scheduler = dict(pipeline.configs.scheduler) | {"prediction_type": prediction_type}
    return dataclasses.replace(
        pipeline,
        configs=dataclasses.replace(pipeline.configs, scheduler=scheduler),
        schedule=dataclasses.replace(pipeline.schedule, prediction_type=prediction_type),
    )


PROBES = 8
"""Pictures that decide what a model predicts."""


def _probed(pipeline: Pipeline, images: Image) -> str:
    context = contexts(pipeline, [""])
    image_batch("pictures", images)
    image = jnp.asarray(images[:PROBES])
    return prediction.decide(_losses(pipeline.params, image, context, pipeline.schedule, pipeline.functions))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _losses(params, image, context, cfg, fns):
    mean, _ = fns.encode_fn(params["vae"], image)
    rows = jnp.broadcast_to(context, (image.shape[0], *context.shape[1:]))
    model_fn = lambda z_t, t: fns.predict_fn(params["unet"], z_t, t, rows)
    return prediction.losses(jax.random.key(0), model_fn, mean, cfg)


def load_tuned(
    path: str | Path,
    base: Pipeline,
    *,
    strength: float = 1.0,
    variant: str | None = None,
    weights: single_file.Weights = "model",
    allow_partial: bool = False,
) -> Pipeline:
    """Reads a model that was fine-tuned from `base`: a model folder, a single file (what it leaves out is taken from the base), an adapter (LoRA,
    ...), which is merged into it, or an id of the hub that stands for one of these.

    Args:
        strength: of an adapter: 0 is the base model, 1 as trained.
        variant, weights, allow_partial: see `Reading`.

    Raises:
        FileNotFoundError, ValueError: as `load`, `checkpoints.single_file.read_params` and `checkpoints.adapters.read_adapter`; on a model of
            another architecture than the base's.
    """
    path = hub.fetch(path, variant) if hub.is_id(path) else Path(path)
    partial = Partial(base=base.params) if allow_partial else None
    reading, files = _chosen(variant=variant, weights=weights, allow_partial=allow_partial), {}
    kind = jax.tree.leaves(base.params["unet"])[0].dtype
    placer = functools.partial(_placer, dtype=kind, mesh=None)
    if (path / diffusers.INDEX).is_file():
        model = diffusers.read_model(path, variant, placer, partial)
        tuned = _assembled(model, path, base.configs.unet.dtype, base.configs.unet.remat)
        require_same_architecture(base, tuned)
    else:
        file = adapters.find_file(path)
        state = single_file.read(file)
        if single_file.is_single_file(state):
            params = single_file.params_of(state, base.configs, str(file), weights, placer, partial)
        else:
            found = adapters.read_adapter(file, base.params, partial)
            params = parallel.cut(adapters.merge(base.params, found, strength))
            reading |= _chosen(strength=strength)
            if scales := config_beside(file):
                files = {scales.name: sha256(scales)}
        tuned = dataclasses.replace(base, params=params, sha256=sha256(file))
    left_out = () if partial is None else tuple(f"{kind}: {what}" for kind, what in partial.problems)
    return dataclasses.replace(tuned, left_out=left_out, reading=reading, files=files)


MISFITS = 20
"""Problems of one model that are named one by one."""


def misfits(name: str, loaded: Pipeline) -> list[str]:
    """The sentence that says what `--allow-partial` let pass."""
    if not loaded.left_out:
        return []
    shown = [*loaded.left_out[:MISFITS], *(["..."] if len(loaded.left_out) > MISFITS else [])]
    count = f"{len(loaded.left_out)} problem{'s' * (len(loaded.left_out) > 1)}"
    return [f"The {name} model does not fit and was read in part (--allow-partial), {count}: {'; '.join(shown)}."]


def with_words(pipeline: Pipeline, paths: Sequence[str | Path]) -> Pipeline:
    """The model with the words of textual-inversion files in its vocabulary, for prompts to use; see `checkpoints.embeddings`.

    Raises:
        FileNotFoundError, ValueError: as `embeddings.read_words`; on a word that is there already.
    """
    tables = {part: pipeline.params[part] for part in ("text_encoder", "text_encoder_2") if part in pipeline.params}
    inner = lambda part: tables[part] if part == "text_encoder" else tables[part]["text_model"]
    table_of = lambda part: inner(part)["embeddings"]["token_embedding"]["embedding"]
    widths = {part: table_of(part).shape[1] for part in tables}
    learnt = [word for path in paths for word in embeddings.read_words(path, widths)]
    sizes = {table_of(part).shape[0] for part in tables}
    require(len(sizes) == 1, "the text encoders", "of one vocabulary", sorted(sizes), "words need the same ids in both")
    start, taken = pipeline.configs.text.vocab_size, dict(pipeline.tokenizer.words)
    for name, vectors in learnt:
        new = name not in taken and name not in pipeline.tokenizer.vocab
        require(new, "embeddings", "of new words", repr(name), "rename the file, or leave one out")
        count = len(vectors["text_encoder"])
        taken[name], start = tuple(range(start, start + count)), start + count
    params, fields = dict(pipeline.params), {}
    for part, field in (("text_encoder", "text"), ("text_encoder_2", "text_2")):
        if part not in tables or not learnt:
            continue
        table = table_of(part)
        rows = np.concatenate([word.vectors[part] for word in learnt])
        path = ("" if part == "text_encoder" else "text_model/") + "embeddings/token_embedding/embedding"
        longer = jnp.concatenate([table, jnp.asarray(rows, table.dtype)])
        params[part] = trees.unflatten(trees.flatten(params[part]) | {path: parallel.cut(longer)})
        fields[field] = dataclasses.replace(getattr(pipeline.configs, field), vocab_size=start)
    configs = dataclasses.replace(pipeline.configs, **fields)
    second = pipeline.tokenizer_2
    return dataclasses.replace(
        pipeline,
        configs=configs,
        params=params,
        functions=functions(configs.unet, configs.vae, configs.text, configs.text_2),
        files={**pipeline.files, **{f"words {i}, {Path(path).name}": sha256(path) for i, path in enumerate(paths, 1)}},
        tokenizer=dataclasses.replace(pipeline.tokenizer, words=taken),
        tokenizer_2=second and dataclasses.replace(second, words=taken),
    )


def require_same_architecture(base: Pipeline, tuned: Pipeline) -> None:
    """Raises ValueError unless both models have the same networks, schedule and vocabulary, as when one was made from the other."""
    cure = "name the base model that the other was fine-tuned from"
    for name in ("unet", "vae", "text", "text_2"):
        first, second = getattr(base.configs, name), getattr(tuned.configs, name)
        fields = [] if first == second else ["kind"]
        if first is not None and second is not None:
            fields = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) != getattr(second, f.name)]
        contract = f"of the architecture of {base.folder}"
        require(not fields, str(tuned.folder), contract, f"another {', '.join(fields)} of the {name}", cure)
    same = base.schedule == tuned.schedule and base.tokenizer.vocab == tuned.tokenizer.vocab
    require(same, str(tuned.folder), f"of the schedule and vocabulary of {base.folder}", "others", cure)


def save(
    folder: str | Path, pipeline: Pipeline, dtype: str = "float32", metadata: dict[str, str] | None = None
) -> None:
    """Writes the pipeline's parameters as a diffusers folder; see `checkpoints.diffusers.write_model`.

    Raises:
        ValueError: on a pipeline with learnt words, for which the layout has no place.
    """
    learnt = ", ".join(pipeline.tokenizer.words)
    require(not learnt, "pipeline", "without words of textual inversion", learnt, "save the model that has none")
    model = diffusers.Model(
        configs=pipeline.configs,
        params=parallel.to_host(pipeline.params),
        tokenizer=pipeline.tokenizer_folder,
        tokenizer_2=pipeline.tokenizer_2_folder,
    )
    diffusers.write_model(folder, model, dtype, metadata=metadata)
