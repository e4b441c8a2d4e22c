"""Stable Diffusion folders in the layout of diffusers: its pipeline opens what is written here, and the reverse.

The layout: `model_index.json`; `unet/`, `vae/`, `text_encoder/` with `config.json` and weights; `tokenizer/`;
`scheduler/scheduler_config.json`.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dmsec_jax.checkpoints import configs, mapping
from dmsec_jax.checkpoints.io import INTACT
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
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A Stable Diffusion model on the host.

    Attributes:
        configs: of the networks, and the content of `scheduler_config.json`.
        params: "unet", "vae", "text_encoder" -> nested dict of float32 arrays (NumPy when read: place them on devices
            with `jax.device_put`).
        tokenizer: folder with the tokenizer's files.
    """

    configs: Preset
    params: Mapping[str, Params]
    tokenizer: Path


def read_model(folder: str | Path, variant: str | None = None) -> Model:
    """Reads a whole Stable Diffusion folder.

    Args:
        folder: the folder with `model_index.json`.
        variant: "fp16" for the weight files with that infix.

    Raises:
        FileNotFoundError: if one of the JSON files is missing.
        ValueError: on another kind of pipeline, an option that we do not implement, damaged weights, NaN or infinity
            in them, weights that do not fit their config (one error with the whole list), or no tokenizer.
    """
    folder = Path(folder)
    return Model(
        configs=read_preset(folder),
        params={name: read_component(folder, name, variant)[1] for name in COMPONENTS},
        tokenizer=tokenizer_folder(folder / "tokenizer"),
    )


def read_preset(folder: str | Path) -> Preset:
    """The configs of a whole Stable Diffusion folder, without its weights; raises like `read_model`."""
    folder = Path(folder)
    check_index(folder)
    return Preset(
        **{component.field: read_component_config(folder, name) for name, component in COMPONENTS.items()},
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def read_component(folder: str | Path, name: str, variant: str | None = None) -> tuple[Any, Params]:
    """Config and parameters of one network, `name` one of `COMPONENTS`; raises like `read_model`."""
    component, place = COMPONENTS[name], Path(folder) / name
    cfg = read_component_config(folder, name)
    state = read_weights(place, component.stem, variant)
    params = mapping.to_tree(state, component.rules, shapes(name, cfg), f"weights of {place}")
    for tensor, values in state.items():
        finite = not jax.numpy.issubdtype(values.dtype, np.floating) or bool(np.isfinite(values).all())
        require(finite, f"tensor {tensor} of {place}", "finite", "NaN or infinity", INTACT)
    return cfg, params


def read_component_config(folder: str | Path, name: str) -> Any:
    """Config of one network, `name` one of `COMPONENTS`; raises like `read_model`."""
    file = Path(folder) / name / "config.json"
    return configs.read_config(read_json(file), COMPONENTS[name].format, str(file))


@functools.lru_cache(maxsize=16)  # tracing a network takes longer than reading a small one
def shapes(name: str, cfg: Any) -> Params:
    """The parameter tree of a network as `jax.ShapeDtypeStruct`s; do not modify it."""
    return jax.eval_shape(lambda key: COMPONENTS[name].init(key, cfg), jax.random.key(0))


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
    tokenizer = tokenizer_folder(Path(model.tokenizer))
    scheduler = dict(model.configs.scheduler)
    require("_class_name" in scheduler, "scheduler", "a table with _class_name", sorted(scheduler), "name its sampler")
    states = {name: _state(name, model) for name in COMPONENTS}
    note = {"_diffusers_version": FORMAT_VERSION}
    with atomic_folder(folder, INDEX) as part:
        for name, component in COMPONENTS.items():
            (part / name).mkdir()
            write_weights(
                part / name, component.stem, states[name], dtype=dtype, metadata=metadata, shard_bytes=shard_bytes
            )
            cfg = configs.write_config(getattr(model.configs, component.field), component.format)
            own = note if component.package == "diffusers" else {"dtype": dtype}
            write_json(part / name / "config.json", cfg | own, sort_keys=True)
        (part / "scheduler").mkdir()
        write_json(part / "scheduler" / "scheduler_config.json", scheduler | note, sort_keys=True)
        (part / "tokenizer").mkdir()
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, part / "tokenizer" / file)
        write_json(part / INDEX, index_of(scheduler["_class_name"]) | note, sort_keys=True)


def _state(name: str, model: Model) -> dict[str, Any]:
    """The state dict of one network, after a check that its tree is the one that its config asks for."""
    component = COMPONENTS[name]
    state = mapping.to_state(model.params[name], component.rules)
    target = shapes(name, getattr(model.configs, component.field))
    mapping.align(state, component.rules, target, f"params[{name!r}]")
    return state


def index_of(sampler: str) -> dict[str, Any]:
    """What `model_index.json` says, for a pipeline with diffusers' scheduler of this name."""
    components = {name: [c.package, c.class_name] for name, c in COMPONENTS.items()}
    return components | {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", sampler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def check_index(folder: Path) -> None:
    """Raises ValueError unless the pipeline consists of the components that we implement, and of nothing else that matters."""
    contract = f"a diffusers folder with {INDEX}"
    require((folder / INDEX).is_file(), str(folder), contract, "none", "name the model's top folder")
    index = read_json(folder / INDEX)
    for name, component in COMPONENTS.items():
        wanted, cure = [component.package, component.class_name], "use a Stable Diffusion 1.x or 2.x model"
        require(name in index, str(folder / INDEX), f"one that names a {name}", "none", cure)
        require(index[name] == wanted, f"{folder / INDEX}: {name}", repr(wanted), repr(index[name])[:100], cure)
    for name in index.keys() - COMPONENTS.keys() - {"scheduler", "tokenizer", *NOT_NEEDED}:
        if not name.startswith("_") and index[name] not in ([None, None], None):
            got = f"a further component {name!r}"
            raise fail(str(folder / INDEX), "a Stable Diffusion pipeline", got, "use another model")


def tokenizer_folder(folder: Path) -> Path:
    """The folder, after a check that it holds a tokenizer."""
    there = {file for file in TOKENIZER_FILES if (folder / file).is_file()}
    ok = "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there
    contract, got = "a folder with vocab.json and merges.txt, or tokenizer.json", ", ".join(sorted(there)) or "nothing"
    require(ok, str(folder), contract, got, "copy the tokenizer's files there")
    return folder
