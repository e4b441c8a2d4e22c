"""Feature networks from the user's own files: CLIP as transformers saves it, DINO as transformers, its authors or timm do."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmsec_jax.checkpoints import configs, mapping, torch_archive
from dmsec_jax.checkpoints.configs import Format
from dmsec_jax.checkpoints.io import read_tensors
from dmsec_jax.checkpoints.mapping import Rules
from dmsec_jax.checkpoints.weights import read_weights
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import read_json
from dmsec_jax.core.types import Params
from dmsec_jax.models import clip_pair, vit
from dmsec_jax.models.clip_pair import ClipConfig
from dmsec_jax.models.vit import DINO_S16, VisionConfig

OTHER_FILE = "name another file or folder"
VISION = Format(
    config=VisionConfig,
    absent={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    fixed={"num_channels": 3, "attention_dropout": 0.0, "dropout": 0.0},
    ignored=frozenset(configs.TRANSFORMERS_OPTIONS.split()),
)
VIT = Format(
    config=VisionConfig,
    absent={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
    fixed={"num_channels": 3, "qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ignored=frozenset((*configs.TRANSFORMERS_OPTIONS.split(), "encoder_stride", "pooler_act", "pooler_output_size")),
)
CLIP_RULES = Rules(ignored=(r"(text|vision)_model\.embeddings\.position_ids",))
_TRANSFORMERS = {
    r"layernorm_before": "layer_norm1",
    r"layernorm_after": "layer_norm2",
    r"attention\.output\.dense": "self_attn.out_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}
_AUTHORS = {r"norm1": "layer_norm1", r"norm2": "layer_norm2", r"attn\.proj": "self_attn.out_proj"}
_AUTHORS |= {rf"mlp\.fc{i}": f"mlp.fc{i}" for i in (1, 2)}
_LAYER = r"(?:encoder\.layer|blocks)\.(\d+)\."
DINO_RULES = Rules(
    renames=(
        *((rf"{_LAYER}{old}\.(weight|bias)", rf"encoder.layers.\1.{new}.\2") for old, new in _TRANSFORMERS.items()),
        *((rf"{_LAYER}{old}\.(weight|bias)", rf"encoder.layers.\1.{new}.\2") for old, new in _AUTHORS.items()),
        *(
            (rf"{_LAYER}attention\.attention\.{name}\.(weight|bias)", rf"encoder.layers.\1.self_attn.{name[0]}_proj.\2")
            for name in ("query", "key", "value")
        ),
        (rf"{_LAYER}attn\.([qkv])\.(weight|bias)", r"encoder.layers.\1.self_attn.\2_proj.\3"),  # after `_split`
        (r"(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.(weight|bias)", r"embeddings.patch_embedding.\1"),
        (r"(?:layernorm|norm)\.(weight|bias)", r"post_layernorm.\1"),
        (r"(?:embeddings\.)?cls_token", "embeddings.class_embedding"),
        (r"embeddings\.position_embeddings|pos_embed", "embeddings.position_embedding.weight"),
    ),
    ignored=(r"pooler\.dense\.(weight|bias)",),
)  # fmt: skip


def read_clip(folder: str | Path) -> tuple[ClipConfig, Params]:
    """A folder that `transformers.CLIPModel` reads, for example of openai/clip-vit-large-patch14: config and NumPy parameters.

    Raises:
        FileNotFoundError: without `config.json`.
        ValueError: on another kind of model, an option that we do not implement, or weights that do not fit (one error with the whole list).
    """
    folder = Path(folder)
    values, name = read_json(folder / "config.json"), str(folder / "config.json")
    kind = values.get("model_type")
    require(kind == "clip", f"model_type of {name}", "'clip'", repr(kind), OTHER_FILE)
    parts = {part: values.get(f"{part}_config") for part in ("text", "vision")}
    tables = all(isinstance(part, dict) for part in parts.values())
    require(tables, name, "one with a text_config and a vision_config", "others", OTHER_FILE)
    width = values.get("projection_dim", 512)
    whole = isinstance(width, int) and 0 < width < 2**16
    require(whole, f"projection_dim of {name}", "a width", repr(width)[:50], OTHER_FILE)
    cfg = ClipConfig(
        text=configs.read_config(parts["text"], configs.TEXT_ENCODER, f"text_config of {name}"),
        vision=configs.read_config(parts["vision"], VISION, f"vision_config of {name}"),
        projection_dim=width,
    )
    target = jax.eval_shape(lambda key: clip_pair.init(key, cfg), jax.random.key(0))
    return cfg, _tree(read_weights(folder, "model"), CLIP_RULES, target, f"weights of {folder}")


def read_dino(path: str | Path) -> tuple[VisionConfig, Params]:
    """DINO's ViT: a folder that `transformers.ViTModel` reads, or the file of its authors (ViT-S/16) or of timm.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: as `read_clip`.
    """
    path, cfg = Path(path), DINO_S16
    if path.is_dir():
        values, name = read_json(path / "config.json"), str(path / "config.json")
        kind = values.get("model_type")
        require(kind == "vit", f"model_type of {name}", "'vit'", repr(kind), OTHER_FILE)
        cfg = configs.read_config(values, VIT, name, first_norm=False, patch_bias=True)
        state = read_weights(path, "model")
    else:
        state = read_tensors(path) if path.suffix == ".safetensors" else torch_archive.read(path)
    target = jax.eval_shape(lambda key: vit.init(key, cfg), jax.random.key(0))
    return cfg, _tree(_split(state), DINO_RULES, target, f"weights of {path}")


def _tree(state: Mapping[str, np.ndarray], rules: Rules, target: Any, name: str) -> Params:
    views = mapping.align(state, rules, target, name)
    mapping.require_finite(views, rules, name)
    return mapping.placed(views)


def _split(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor for query, key and value becomes three; class token and positions lose their leading ones."""
    found: dict[str, np.ndarray] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.+\.attn\.)qkv\.(weight|bias)", key)
        if match and tensor.ndim > 0 and len(tensor) % 3 == 0:
            found |= {
                f"{match[1]}{part}.{match[2]}": rows for part, rows in zip("qkv", np.split(tensor, 3), strict=True)
            }
        elif re.fullmatch(r"(embeddings\.)?cls_token", key) and tensor.shape[:-1] == (1, 1):
            found[key] = tensor[0, 0]
        elif re.fullmatch(r"embeddings\.position_embeddings|pos_embed", key) and tensor.ndim == 3 and len(tensor) == 1:
            found[key] = tensor[0]
        else:
            found[key] = tensor
    return found
