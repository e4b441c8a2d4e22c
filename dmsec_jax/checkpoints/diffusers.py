"""Stable Diffusion folders in the layout of diffusers: its pipeline opens what is written here, and the reverse.

The layout: `model_index.json`; `unet/`, `vae/`, `text_encoder/` with `config.json` and weights; `tokenizer/`;
`scheduler/scheduler_config.json`. Stable Diffusion XL has a `text_encoder_2/` and a `tokenizer_2/` besides.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dmsec_jax.checkpoints import configs, links, mapping
from dmsec_jax.checkpoints.mapping import Partial, Place
from dmsec_jax.checkpoints.weights import SHARD_BYTES, read_weights, write_weights
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import atomic_folder, read_json, write_json
from dmsec_jax.core.types import Params
from dmsec_jax.models import clip, unet, vae
from dmsec_jax.models.presets import Preset

INDEX = "model_index.json"
FORMAT_VERSION = "0.42.1"
"""The diffusers release whose layout this is; its loader reads files that name an old one, or none, differently."""
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NOT_NEEDED = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "requires_safety_checker",
    "force_zeros_for_empty_prompt",
    "add_watermarker",
)


class Component(NamedTuple):
    """How the files of one network of the pipeline are read; `field` is its config's name in a `Preset`."""

    field: str
    package: str
    class_name: str
    stem: str
    init: Callable[..., Params]
    format: configs.Format
    rules: mapping.Rules


COMPONENTS = {
    "unet": Component(
        "unet",
        "diffusers",
        "UNet2DConditionModel",
        "diffusion_pytorch_model",
        unet.init,
        configs.UNET,
        mapping.UNET,
    ),
    "vae": Component(
        "vae",
        "diffusers",
        "AutoencoderKL",
        "diffusion_pytorch_model",
        vae.init,
        configs.VAE,
        mapping.VAE,
    ),
    "text_encoder": Component(
        "text",
        "transformers",
        "CLIPTextModel",
        "model",
        clip.init,
        configs.TEXT_ENCODER,
        mapping.TEXT_ENCODER,
    ),
}
"""What every model has."""
XL = COMPONENTS | {
    "text_encoder_2": Component(
        "text_2",
        "transformers",
        "CLIPTextModelWithProjection",
        "model",
        clip.init_projected,
        configs.TEXT_ENCODER_2,
        mapping.TEXT_ENCODER_2,
    ),
}
"""What Stable Diffusion XL has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A Stable Diffusion model on the host.

    Attributes:
        configs: of the networks, and the content of `scheduler_config.json`.
        params: "unet", "vae", "text_encoder" and perhaps "text_encoder_2" -> nested dict of arrays.
        tokenizer: folder with the tokenizer's files.
        tokenizer_2: the same for the second text encoder; None: it has none of its own.
    """

    configs: Preset
    params: Mapping[str, Params]
    tokenizer: Path
    tokenizer_2: Path | None = None


Placer = Callable[[str], Place]
"""part ("unet", ...) -> how its tensors are placed."""


def on_host(part: str) -> Place:
    """The `Placer` of float32 NumPy arrays."""
    return mapping.float32


def components(preset: Preset) -> dict[str, Component]:
    """The networks of a model."""
    return COMPONENTS if preset.text_2 is None else XL


def read_model(
    folder: str | Path, variant: str | None = None, placer: Placer = on_host, partial: Partial | None = None
) -> Model:
    """Reads a whole Stable Diffusion folder, one tensor after the other.

    Args:
        folder: the folder with `model_index.json`.
        variant: "fp16" for the weight files with that infix.
        placer: where tensors go.
        partial: leave to read weights that do not fit their configs, and a record of it.

    Raises:
        FileNotFoundError: if one of the JSON files is missing.
        ValueError: on another kind of pipeline, an option that we do not implement, damaged weights, NaN or infinity
            in them, weights that do not fit their config (one error with the whole list), or no tokenizer.
    """
    folder = Path(folder)
    preset = read_preset(folder)
    tokenizer = tokenizer_folder(folder / "tokenizer")
    second = None if preset.text_2 is None else tokenizer_folder(folder / "tokenizer_2")
    params = {part: read_component(folder, part, variant, placer(part), partial)[1] for part in components(preset)}
    return Model(configs=preset, params=params, tokenizer=tokenizer, tokenizer_2=second)


def read_preset(folder: str | Path) -> Preset:
    """The configs of a whole Stable Diffusion folder, without its weights; raises like `read_model`."""
    folder = Path(folder)
    index = check_index(folder)
    parts = XL if "text_encoder_2" in index else COMPONENTS
    preset = Preset(
        **{component.field: read_component_config(folder, name) for name, component in parts.items()},
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        silent_empty=bool(index.get("force_zeros_for_empty_prompt", parts is XL)) and parts is XL,
    )
    check_widths(preset, str(folder))
    return preset


def check_widths(preset: Preset, name: str) -> None:
    """Raises ValueError unless the UNet takes what the text encoders make."""
    texts = [text for text in (preset.text, preset.text_2) if text is not None]
    width, made = preset.unet.cross_attention_dim, sum(text.hidden_size for text in texts)
    cure = "take all parts from one model"
    require(width == made, f"{name}: cross_attention_dim of unet", f"{made}, as the text encoders make", width, cure)
    wanted, pooled = preset.unet.pooled_width, 0 if preset.text_2 is None else preset.text_2.projection_dim
    require(wanted == pooled, f"{name}: pooled embedding of unet", f"{pooled} wide, as in text_encoder_2", wanted, cure)


def read_component(
    folder: str | Path,
    name: str,
    variant: str | None = None,
    place: Place = mapping.float32,
    partial: Partial | None = None,
) -> tuple[Any, Params]:
    """Config and parameters of one network, `name` one of `XL`; raises like `read_model`."""
    component, where = XL[name], Path(folder) / name
    cfg = read_component_config(folder, name)
    target = shapes(name, cfg)
    views, problems = mapping.compare(read_weights(where, component.stem, variant), component.rules, target)
    views, problems = mapping.settle(name, views, problems, target, partial)
    if problems:
        raise mapping.complaint(f"weights of {where}", mapping.CONTRACT, problems, mapping.CURE)
    mapping.require_finite(views, component.rules, str(where))
    return cfg, mapping.placed(views, place)


def read_component_config(folder: str | Path, name: str) -> Any:
    """Config of one network, `name` one of `XL`; raises like `read_model`."""
    file = Path(folder) / name / "config.json"
    return configs.read_config(read_json(file), XL[name].format, str(file))


@functools.lru_cache(maxsize=16)  # tracing a network takes longer than reading a small one
def shapes(name: str, cfg: Any) -> Params:
    """The parameter tree of a network as `jax.ShapeDtypeStruct`s; do not modify it."""
    return jax.eval_shape(lambda key: XL[name].init(key, cfg), jax.random.key(0))


def write_model(
    folder: str | Path,
    model: Model,
    dtype: str = "float16",
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a whole Stable Diffusion folder that PyTorch diffusers opens, without safety checker.

    The folder appears complete or not at all. An existing model folder is replaced; other files in it are kept.

    Args:
        folder: where; created with its parents.
        model: what; parameters may be NumPy or JAX arrays.
        dtype: "float32", "float16" or "bfloat16" of the weight files.
        metadata: free text for the header of every weight file.
        shard_bytes: larger weights are split into files of at most this many bytes.

    Raises:
        ValueError: if `folder` is something else than a model, parameters do not fit their config, or a weight
            overflows `dtype`.
        OSError: if the disk is full; nothing is left behind.
    """
    tokenizers = {"tokenizer": tokenizer_folder(Path(model.tokenizer))}
    if model.configs.text_2 is not None:
        tokenizers["tokenizer_2"] = tokenizer_folder(Path(model.tokenizer_2 or model.tokenizer))
    scheduler, parts = dict(model.configs.scheduler), components(model.configs)
    require("_class_name" in scheduler, "scheduler", "a table with _class_name", sorted(scheduler), "name its sampler")
    states = {name: _state(name, model) for name in parts}
    note = {"_diffusers_version": FORMAT_VERSION}
    with atomic_folder(folder, INDEX) as part:
        for name, component in parts.items():
            (part / name).mkdir()
            write_weights(
                part / name, component.stem, states[name], dtype=dtype, metadata=metadata, shard_bytes=shard_bytes
            )
            cfg = configs.write_config(getattr(model.configs, component.field), component.format)
            own = note if component.package == "diffusers" else {"dtype": dtype}
            write_json(part / name / "config.json", cfg | own, sort_keys=True)
        (part / "scheduler").mkdir()
        write_json(part / "scheduler" / "scheduler_config.json", scheduler | note, sort_keys=True)
        for name, place in tokenizers.items():
            (part / name).mkdir()
            for file in TOKENIZER_FILES:
                if (place / file).is_file():
                    shutil.copyfile(place / file, part / name / file)
        write_json(part / INDEX, index_of(scheduler["_class_name"], model.configs) | note, sort_keys=True)


def _state(name: str, model: Model) -> dict[str, Any]:
    """The state dict of one network, after a check that its tree is the one that its config asks for."""
    component = XL[name]
    state = mapping.to_state(model.params[name], component.rules)
    target = shapes(name, getattr(model.configs, component.field))
    mapping.align(state, component.rules, target, f"params[{name!r}]")
    return state


def index_of(sampler: str, preset: Preset) -> dict[str, Any]:
    """What `model_index.json` says, for a pipeline with diffusers' scheduler of this name."""
    index = {name: [c.package, c.class_name] for name, c in components(preset).items()}
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", sampler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if preset.text_2 is None:
        return index | {"safety_checker": [None, None], "requires_safety_checker": False}
    return index | {
        "_class_name": "StableDiffusionXLPipeline",
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": preset.silent_empty,
    }


def check_index(folder: Path) -> dict[str, Any]:
    """The index's content.

    Raises:
        ValueError: unless the pipeline consists of the components that we implement, and of nothing else that matters; or if a link leads out of it.
    """
    contract = f"a diffusers folder with {INDEX}"
    require((folder / INDEX).is_file(), str(folder), contract, "none", "name the model's top folder")
    links.require_inside(folder)
    index = {name: value for name, value in read_json(folder / INDEX).items() if value not in ([None, None], None)}
    parts = XL if "text_encoder_2" in index else COMPONENTS
    for name, component in parts.items():
        wanted, cure = [component.package, component.class_name], "use a Stable Diffusion 1.x, 2.x or XL base model"
        require(name in index, str(folder / INDEX), f"one that names a {name}", "none", cure)
        require(index[name] == wanted, f"{folder / INDEX}: {name}", repr(wanted), repr(index[name])[:100], cure)
    for name in index.keys() - parts.keys() - {"scheduler", "tokenizer", "tokenizer_2", *NOT_NEEDED}:
        if not name.startswith("_"):
            got = f"a further component {name!r}"
            raise fail(str(folder / INDEX), "a Stable Diffusion pipeline", got, "use another model")
    return index


def tokenizer_folder(folder: Path) -> Path:
    """The folder, after a check that it holds a tokenizer."""
    there = {file for file in TOKENIZER_FILES if (folder / file).is_file()}
    ok = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there
    contract, got = "a folder with vocab.json and merges.txt, or tokenizer.json", ", ".join(sorted(there)) or "nothing"
    require(ok, str(folder), contract, got, "copy the tokenizer's files there")
    return folder
