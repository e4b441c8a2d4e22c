"""Stable Diffusion 1.x, 2.x and XL in one file (`.safetensors`, or `.ckpt` without running what is in it), as latent diffusion's own code writes it.

Such a file holds neither configs nor tokenizer, and its weights do not tell whether the UNet predicts noise or velocity: both come from the caller,
or (what is predicted) from the `.yaml` of the same name beside it, from the file's metadata, or from marks that trainers of velocity leave in it.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from dmsec_jax.checkpoints import ldm, links, mapping
from dmsec_jax.checkpoints.adapters import read_state
from dmsec_jax.checkpoints.diffusers import Model, Placer, components, on_host, shapes, tokenizer_folder
from dmsec_jax.checkpoints.io import PICKLES, read_metadata, write_tensors
from dmsec_jax.checkpoints.mapping import Partial, Problem, Rules
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import read_bounded
from dmsec_jax.core.types import Params
from dmsec_jax.models import presets
from dmsec_jax.models.presets import Preset

Weights = Literal["model", "model_ema"]
BESIDES = (
    r"(betas|alphas_cumprod|alphas_cumprod_prev|lvlb_weights|logvar|scale_factor)",
    r"(sqrt_|log_one_minus_|posterior_).+",
    r"denoiser\.sigmas",
    r"(v_pred|ztsnr)",
)
"""Tables of the noise schedule, which follow from its settings, and marks of what the UNet predicts."""
KINDS = ("epsilon", "v_prediction")
MAX_YAML = 2**16
ANOTHER = "name a file of Stable Diffusion 1.x, 2.x or XL"
CROSS_ATTENTION = re.compile(r"model\.diffusion_model\..+\.attn2\.to_k\.weight")


class Part(NamedTuple):
    """One network inside the file: what stands before its keys, how they are spelt, the tree that they fill."""

    prefix: str
    rules: Rules
    target: Params


def model_of(
    state: Mapping[str, np.ndarray],
    path: Path,
    tokenizer: str | Path | None,
    prediction_type: str | None,
    weights: Weights = "model",
    placer: Placer = on_host,
    partial: Partial | None = None,
) -> Model:
    """The model that the tensors of a file are; its configs are those of SD 1.5, 2.1 or XL, whichever the shapes fit.

    Args:
        state: as `read` gives it.
        path: of the file.
        tokenizer: folder with the tokenizer's files, for example of a diffusers folder; all families have one vocabulary.
        prediction_type: "epsilon" or "v_prediction"; None: as `prediction_of` finds.
        weights: "model_ema" takes the running average of the UNet, in files that have one.
        placer, partial: as in `diffusers.read_model`.

    Raises:
        ValueError: if the tokenizer or the prediction type is neither given nor known, on a model of another family, or as `read_params`.
    """
    given = prediction_type or prediction_of(path, state)
    require_known(path, given, tokenizer)
    preset = preset_of(state, str(path), given)
    params = params_of(state, preset, str(path), weights, placer, partial)
    return Model(configs=preset, params=params, tokenizer=tokenizer_folder(Path(tokenizer)))


def require_known(path: Path, prediction_type: str | None, tokenizer: str | Path | None) -> None:
    """Raises ValueError unless both are given, which the file itself does not hold, and no link leads out of the tokenizer's folder."""
    known = " or ".join(KINDS)
    cure = f"give --prediction-type {known}, as its author says (in Python, prediction_type=); weights do not tell"
    require(prediction_type in KINDS, f"the prediction type of {path}", known, repr(prediction_type), cure)
    cure = "give --tokenizer (in Python, tokenizer=), the folder of one, for example .../tokenizer of a diffusers folder of Stable Diffusion"
    require(tokenizer is not None, f"the tokenizer of {path}", "given, since a single file has none", None, cure)
    links.require_inside(tokenizer)


def read_params(path: str | Path, preset: Preset, weights: Weights = "model") -> dict[str, Params]:
    """The parameters of all networks, for known configs: part -> nested dict of float32 arrays.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on a damaged file, NaN or infinity, or tensors that are not exactly those of the configs (one error with the whole list).
    """
    return params_of(read(path), preset, str(path), weights)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of the file under the names of latent diffusion; optimiser states of a training run are left out."""
    state, _ = read_state(Path(path))
    nested = "state_dict."
    inside = {key.removeprefix(nested): tensor for key, tensor in state.items() if key.startswith(nested)}
    return inside or state


def is_single_file(keys: Collection[str]) -> bool:
    """Whether tensors of these names are a whole model."""
    return any(key.removeprefix("state_dict.").startswith(ldm.UNET) for key in keys)


def has_average(path: Path) -> bool:
    """Whether there is a file here that holds the running average of a UNet; raises like `read`."""
    return path.is_file() and any(key.startswith(ldm.EMA) for key in read(path))


def preset_of(state: Mapping[str, np.ndarray], name: str, prediction_type: str) -> Preset:
    """The known configuration whose text width is the file's; one network or another may still differ, which `params_of` then says.

    Raises:
        ValueError: on another family.
    """
    widths = {tensor.shape[1] for key, tensor in state.items() if CROSS_ATTENTION.fullmatch(key) and tensor.ndim == 2}
    known = {
        768: {"epsilon": presets.SD15},
        1024: {"epsilon": presets.SD21_BASE, "v_prediction": presets.SD21},
        2048: {"epsilon": presets.SDXL},
    }
    found = ", ".join(map(str, sorted(widths))) or "none"
    contract = f"conditioned on text of width {', '.join(map(str, known))}"
    require(len(widths) == 1 and widths <= known.keys(), name, contract, found, ANOTHER)
    (width,) = widths
    preset = known[width].get(prediction_type) or known[width]["epsilon"]
    scheduler = dict(preset.scheduler) | {"prediction_type": prediction_type}
    scheduler |= {"rescale_betas_zero_snr": True} if "ztsnr" in state else {}
    first = state.get(f"{ldm.UNET}input_blocks.0.0.weight", np.empty(0))
    inputs = first.shape[1] if first.ndim == 4 else preset.unet.in_channels
    # more of them for inpainting and for editing by instruction
    unet = dataclasses.replace(preset.unet, in_channels=inputs)
    return dataclasses.replace(preset, unet=unet, scheduler=scheduler)


def params_of(
    state: Mapping[str, np.ndarray],
    preset: Preset,
    name: str,
    weights: Weights = "model",
    placer: Placer = on_host,
    partial: Partial | None = None,
) -> dict[str, Params]:
    """The parameters that the tensors of a file are; arguments and errors as of `model_of`."""
    views, problems = compare(state, preset, weights)
    parts = _parts(preset, weights, open_clip=_open_clip(state))
    if problems and partial is not None:
        partial.problems += problems
        quiet, problems = Partial(base=partial.base), []
        for part, own in views.items():
            views[part], absent = mapping.settle(part, own, [("", "")], parts[part].target, quiet)
            problems += absent
    if problems:
        contract = "exactly the tensors of the configuration"
        raise mapping.complaint(name, contract, problems, "name the right base model, or correct the file")
    for part, own in views.items():
        rules = parts[part].rules
        mapping.require_finite(own, dataclasses.replace(rules, prefix=parts[part].prefix + rules.prefix), name)
    return {part: mapping.placed(own, placer(part)) for part, own in views.items()}


def compare(
    state: Mapping[str, np.ndarray], preset: Preset, weights: Weights = "model"
) -> tuple[dict[str, dict[str, np.ndarray]], list[Problem]]:
    """Path -> view for each network, and every missing, unused or mis-shaped key."""
    parts = _parts(preset, weights, open_clip=_open_clip(state))
    views: dict[str, dict[str, np.ndarray]] = {}
    problems: list[Problem] = []
    taken: set[str] = set()
    for name, part in parts.items():
        own = {key.removeprefix(part.prefix): tensor for key, tensor in state.items() if key.startswith(part.prefix)}
        taken |= {part.prefix + key for key in own}
        own = ldm.split(own) if part.prefix in (ldm.OPEN_CLIP, ldm.OPEN_CLIP_XL) else own
        views[name], wrong = mapping.compare(own, part.rules, part.target)
        problems += [(kind, part.prefix + what) for kind, what in wrong]
    spare = (ldm.EMA, ldm.UNET)  # the other copy of the UNet
    for key in state.keys() - taken:
        if not key.startswith(spare) and not any(re.fullmatch(pattern, key) for pattern in BESIDES):
            problems.append(("unused", f"{key} {list(state[key].shape)}"))
    return views, problems


def write_model(
    path: str | Path,
    configs: Preset,
    params: Mapping[str, Params],
    dtype: str = "float16",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes all networks as one safetensors file, which A1111, ComfyUI and diffusers' `from_single_file` read.

    A text encoder with exact GELU is written as OpenCLIP (Stable Diffusion 2), another as CLIP. The file does not tell what the UNet predicts.

    Raises:
        ValueError: if parameters do not fit their config, or a weight overflows `dtype`.
        OSError: if the file cannot be written.
    """
    tensors: dict[str, Any] = {}
    for name, part in _parts(configs, "model", open_clip=configs.text.hidden_act == "gelu").items():
        state = mapping.to_state(params[name], part.rules)
        mapping.align(state, part.rules, part.target, f"params[{name!r}]")
        if part.prefix in (ldm.OPEN_CLIP, ldm.OPEN_CLIP_XL):
            state = ldm.join(state)
        if name == "vae":  # there attention is made of 1x1 convolutions
            flat = lambda key, t: ".attn_1." in key and t.ndim == 2
            state = {key: t[:, :, None, None] if flat(key, t) else t for key, t in state.items()}
        tensors |= {part.prefix + key: tensor for key, tensor in state.items()}
    write_tensors(path, tensors, dtype=dtype, metadata={"format": "pt"} | dict(metadata or {}))


def _open_clip(state: Mapping[str, np.ndarray]) -> bool:
    """Whether the one text encoder of a file is OpenCLIP's."""
    return any(key.startswith(ldm.OPEN_CLIP) for key in state)


def _parts(preset: Preset, weights: Weights, *, open_clip: bool) -> dict[str, Part]:
    targets = {name: shapes(name, getattr(preset, part.field)) for name, part in components(preset).items()}
    if weights not in ("model", "model_ema"):
        raise fail("weights", "'model' or 'model_ema'", repr(weights), "choose one of them")
    prefix, rules = (ldm.UNET, ldm.unet_rules) if weights == "model" else (ldm.EMA, ldm.ema_rules)
    text = targets["text_encoder"]
    parts = {
        "unet": Part(prefix, rules(targets["unet"]), targets["unet"]),
        "vae": Part(ldm.VAE, ldm.vae_rules(targets["vae"]), targets["vae"]),
    }
    if preset.text_2 is not None:
        second = targets["text_encoder_2"]
        return parts | {
            "text_encoder": Part(ldm.CLIP_XL, ldm.CLIP_RULES, text),
            "text_encoder_2": Part(ldm.OPEN_CLIP_XL, ldm.open_clip_xl_rules(second), second),
        }
    if open_clip:
        return parts | {"text_encoder": Part(ldm.OPEN_CLIP, ldm.open_clip_rules(preset.text, text), text)}
    return parts | {"text_encoder": Part(ldm.CLIP, ldm.CLIP_RULES, text)}


def prediction_of(path: Path, state: Mapping[str, np.ndarray]) -> str | None:
    """What the UNet predicts, as far as it is written down: in the `.yaml` beside the file, by a mark among its tensors, or in its metadata.

    None if it is written nowhere; raises as `prediction_beside`.
    """
    if beside := prediction_beside(path):
        return beside
    if "v_pred" in state:
        return "v_prediction"
    metadata = {} if path.suffix in PICKLES else read_metadata(path)
    return {"epsilon": "epsilon", "v": "v_prediction"}.get(metadata.get("modelspec.prediction_type", ""))


def prediction_beside(path: Path) -> str | None:
    """The prediction type in latent diffusion's config beside the file; noise is its default. None if there is no config.

    Raises:
        ValueError: if it is damaged.
    """
    config = path.with_suffix(".yaml")
    if not config.is_file():
        return None
    try:
        content = yaml.safe_load(read_bounded(config, MAX_YAML))
        kind = content["model"]["params"].get("parameterization", "eps")
    except (yaml.YAMLError, RecursionError, UnicodeError, KeyError, TypeError, AttributeError) as error:
        raise fail(str(config), "a config of latent diffusion", str(error)[:200], "correct or remove it") from error
    known = {"eps": "epsilon", "v": "v_prediction"}
    require(
        isinstance(kind, str) and kind in known, f"parameterization of {config}", "eps or v", repr(kind)[:50], ANOTHER
    )
    return known[kind]
