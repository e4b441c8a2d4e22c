"""What a file or folder of weights is, and everything that keeps it from being loaded; nothing is converted or executed."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmsec_jax.checkpoints import adapters, changes, diffusers, embeddings, guess, ldm, links, mapping, single_file
from dmsec_jax.checkpoints.adapter_scales import read_scales
from dmsec_jax.checkpoints.mapping import Problem
from dmsec_jax.checkpoints.weights import read_weights
from dmsec_jax.core.files import read_json
from dmsec_jax.core.types import Params
from dmsec_jax.models import presets
from dmsec_jax.models.presets import Preset

FAMILIES = {
    768: ("Stable Diffusion 1.x", presets.SD15),
    1024: ("Stable Diffusion 2.x", presets.SD21_BASE),
    2048: ("Stable Diffusion XL", presets.SDXL),
    presets.NANO.unet.cross_attention_dim: ("the embedded model", presets.NANO),
}
"""Width of the text that the UNet is conditioned on -> what has it, and its configuration where it is known here."""
PREFIXES = {
    ldm.UNET: "unet",
    ldm.EMA: "average of the unet",
    ldm.VAE: "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}
"""What stands before the keys of a network in a single file."""


NEITHER = "neither a Stable Diffusion model nor an adapter"
OTHERS = {
    "control_model.": "a ControlNet, which is not read",
    "joint_blocks.": "a network of Stable Diffusion 3, which is not read",
    "double_blocks.": "a network of FLUX, which is not read",
    "transformer_blocks.": "a diffusion transformer, which is not read",
    "down_blocks.": "a UNet alone; name the whole diffusers folder",
    "decoder.": "an autoencoder alone; name the whole model",
    "first_stage_model.": "an autoencoder alone; name the whole model",
    "text_model.": "a text encoder alone; name the whole model",
}
"""What a key starts with -> what people download besides."""
BASE_NAMES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "base_model_name_or_path")
"""Entries of an adapter's metadata in which trainers name the base model."""


class Part(NamedTuple):
    """One network, or its share of an adapter."""

    name: str
    parameters: int
    dtypes: str
    remark: str


class Account(NamedTuple):
    """What was found; `problems` is empty if and only if it can be loaded."""

    kind: str
    family: str
    facts: Mapping[str, str]
    parts: tuple[Part, ...]
    metadata: Mapping[str, str]
    problems: tuple[Problem, ...]


def inspect(path: str | Path, base: str | Path | None = None) -> Account:
    """Looks at a diffusers folder, a single file, or an adapter.

    Args:
        path: file or folder.
        base: for an adapter or a single file, the folder of the model that it is for or made from; None: what its shapes look like.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be read at all; or on a `base` that is no model.
    """
    path = Path(path)
    if (path / diffusers.INDEX).is_file():
        links.require_inside(path)
        return _folder(path)
    path = adapters.find_file(path)
    state, metadata = adapters.read_state(path)
    if single_file.is_single_file(state):
        return _single_file(path, single_file.read(path), metadata, base)
    if adapters.is_adapter(state):
        return _adapter(path, state, metadata, base)
    if embeddings.is_words(state) and (base is not None or _words_width(state) in FAMILIES):
        return _words(path, state, metadata, base)
    problems = (("unknown", f"{len(state)} tensors, such as {', '.join(list(state)[:5]) or 'none'}"),)
    part = _part("tensors", state, "")
    kind = next((name for start, name in OTHERS.items() if any(key.startswith(start) for key in state)), NEITHER)
    return Account(kind, "unknown", {}, (part,), metadata, problems)


def _folder(path: Path) -> Account:
    parts, problems, configs, facts = [], [], {}, {}
    for name, component in components(path).items():
        try:
            cfg = diffusers.read_component_config(path, name)
            state = read_weights(path / name, component.stem)
        except (ValueError, OSError) as error:
            problems.append(("unreadable", str(error)))
            continue
        configs[component.field] = cfg
        wrong = mapping.compare(state, component.rules, diffusers.shapes(name, cfg))[1]
        problems += [(kind, f"{name}: {what}") for kind, what in wrong] + _not_finite(state, f"{name}: ")
        parts.append(_part(name, state, component.class_name))
    try:
        index = diffusers.check_index(path)
        if len(configs) == len(components(path)):
            diffusers.check_widths(Preset(**configs, scheduler={}), str(path))
        facts["predicts"] = str(
            read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
        )
        for name in ("tokenizer", "tokenizer_2"):
            if name in index:
                facts[name] = ", ".join(sorted(file.name for file in diffusers.tokenizer_folder(path / name).iterdir()))
    except (ValueError, OSError) as error:
        problems.append(("unreadable", str(error)))
    width = configs["unet"].cross_attention_dim if "unet" in configs else None
    return Account("diffusers folder", _family(width), facts, tuple(parts), {}, tuple(problems))


def components(path: Path) -> dict[str, diffusers.Component]:
    """Those that the index names, as `diffusers.read_preset` takes them; a folder may hold more than it does."""
    try:
        named = read_json(path / diffusers.INDEX).get("text_encoder_2") not in (None, [None, None])
    except (ValueError, OSError):  # reported where the index is checked
        named = (path / "text_encoder_2").is_dir()
    return diffusers.XL if named else diffusers.COMPONENTS


def _single_file(
    path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str], base: str | Path | None
) -> Account:
    parts = [
        _part(name, {key: tensor for key, tensor in state.items() if key.startswith(prefix)}, "")
        for prefix, name in PREFIXES.items()
    ]
    starts = lambda prefix: any(key.startswith(prefix) for key in state)
    encoders = {"cond_stage_model.model.": "OpenCLIP", "conditioner.embedders.": "CLIP and OpenCLIP"}
    encoder = next((name for prefix, name in encoders.items() if starts(prefix)), "CLIP")
    facts = {"text encoder": encoder, "tokenizer": "none in a single file: name the folder of one with --tokenizer"}
    facts["predicts"] = "weights do not say: ask the author, then --prediction-type"
    problems = _not_finite(state, "")
    width = None
    try:
        known = single_file.prediction_of(path, state)
        facts["predicts"] = f"{known} (written beside or in the file)" if known else facts["predicts"]
        look = lambda: single_file.preset_of(state, str(path), known or "epsilon")
        preset = look() if base is None else diffusers.read_preset(base)
        width = preset.unet.cross_attention_dim
        problems += single_file.compare(state, preset)[1]
    except ValueError as error:
        cure = "" if base is not None else "; if it was made from another model, name that with --base"
        problems.append(("unknown", f"{error}{cure}"))
    shown = tuple(part for part in parts if part.parameters)
    return Account("single file", _family(width), facts, shown, metadata, tuple(problems))


def _adapter(
    path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str], base: str | Path | None
) -> Account:
    width, by = guess.text_width(state, metadata) or (None, "")
    facts = {"layout": adapters.layout_of(state)}
    if by and base is None:
        facts["guessed by"] = by
    if told := [metadata[key] for key in BASE_NAMES if metadata.get(key, "None") != "None"]:
        facts["made for"] = ", ".join(told)
    preset = diffusers.read_preset(base) if base is not None else FAMILIES.get(width, (None, None))[1]
    problems = _not_finite(state, "")
    if preset is None:
        problems.append(("unknown", "the base model; name it with --base to check the adapter against it"))
        part = _part("adapter", state, "")
        return Account("adapter", _family(width), facts, (part,), metadata, tuple(problems))
    parts = []
    try:
        found, wrong = adapters.compare(state, _targets(preset), read_scales(path, metadata), str(path))
    except ValueError as error:
        found, wrong = {}, [("unreadable", str(error))]
    problems += [problem for problem in wrong if problem not in problems]
    for name, own in found.items():
        tensors = {f"{p}.{f}": array for p, change in own.items() for f, array in change.factors.items()}
        parts.append(_part(name, tensors, _remark(own), _dtypes(state)))
    family = f"for {_family(preset.unet.cross_attention_dim)}{'' if base is None else f' ({base})'}"
    return Account("adapter", family, facts, tuple(parts), metadata, tuple(problems))


def _words(
    path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str], base: str | Path | None
) -> Account:
    """Of textual inversion; the family is what has text encoders of these widths."""
    width = _words_width(state)
    preset = diffusers.read_preset(base) if base is not None else FAMILIES.get(width, (None, None))[1]
    part = _part("vectors", {key: t for key, t in state.items() if t.dtype.kind in "fV"}, "")
    kind = "words of textual inversion"
    if preset is None:
        problems = (("unknown", "the base model; name it with --base to check the words against it"),)
        return Account(kind, _family(width), {}, (part,), metadata, problems)
    texts = {"text_encoder": preset.text, "text_encoder_2": preset.text_2}
    try:
        learnt = embeddings.read_words(path, {name: cfg.hidden_size for name, cfg in texts.items() if cfg is not None})
    except ValueError as error:
        return Account(kind, _family(width), {}, (part,), metadata, (("unreadable", str(error)),))
    shown = ", ".join(f"{word.word} ({len(word.vectors['text_encoder'])} vectors)" for word in learnt)
    family = f"for {_family(preset.unet.cross_attention_dim)}"
    return Account(kind, family, {"words": shown}, (part,), metadata, ())


def _words_width(state: Mapping[str, np.ndarray]) -> int | None:
    """Width of the text that the UNet is given, as far as learnt words tell: a pair's two widths come one after the other."""
    vectors = {key: tensor.shape[-1] for key, tensor in state.items() if tensor.dtype.kind in "fV" and tensor.ndim}
    if vectors.keys() == embeddings.PAIR.keys():
        return sum(vectors.values())
    return next(iter(vectors.values())) if len(set(vectors.values())) == 1 else None


def _targets(preset: Preset) -> dict[str, Params]:
    parts = diffusers.components(preset)
    return {name: diffusers.shapes(name, getattr(preset, part.field)) for name, part in parts.items()}


def _remark(own: Mapping[str, changes.Change]) -> str:
    """Families, ranks and scales of the layers."""
    names = Counter(f"{c.family}{'' if c.magnitude is None else ' with DoRA'}" for c in own.values())
    ranks = Counter(changes.rank(c.factors) for c in own.values())
    scales = sorted({round(c.ratio, 6) for c in own.values()})
    kinds = ", ".join(f"{count} {name}" for name, count in names.most_common())
    rank = ", ".join(str(rank or "none") for rank, _ in ranks.most_common(4)) + (", ..." if len(ranks) > 4 else "")
    scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    return f"{kinds}; rank {rank}; alpha / rank {scale}"


def _family(width: int | None) -> str:
    if width is None:
        return "unknown"
    return FAMILIES[width][0] if width in FAMILIES else f"a model with text of width {width}"


def _part(name: str, state: Mapping[str, np.ndarray], remark: str, dtypes: str | None = None) -> Part:
    return Part(name, sum(tensor.size for tensor in state.values()), dtypes or _dtypes(state), remark)


def _dtypes(state: Mapping[str, np.ndarray]) -> str:
    return ", ".join(name for name, _ in Counter(str(tensor.dtype) for tensor in state.values()).most_common())


def _not_finite(state: Mapping[str, np.ndarray], prefix: str) -> list[Problem]:
    floats = {key: tensor for key, tensor in state.items() if tensor.dtype.kind in "fV"}
    return [("not finite", prefix + key) for key, tensor in floats.items() if not np.isfinite(tensor).all()]
