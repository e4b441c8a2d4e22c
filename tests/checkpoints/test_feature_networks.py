"""Files of CLIP and DINO without PyTorch: what fits is read, what does not is named."""

import json

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints import feature_networks, mapping
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core import trees
from dmsec_jax.models import clip_pair, vit

VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "model_type": "clip",
    "projection_dim": 6,
    "text_config": VISION | {"vocab_size": 20, "max_position_embeddings": 5, "projection_dim": 6, "top_k": 50},
    "vision_config": VISION
    | {"image_size": 4, "patch_size": 2, "projection_dim": 6, "model_type": "clip_vision_model"},
    "vision_config_dict": {"hidden_size": 8},
}


def random_tree(target, seed=0):
    rng = np.random.default_rng(seed)
    return trees.map_paths(lambda path, leaf: rng.normal(size=leaf.shape).astype(np.float32), target)


def shapes(init, cfg):
    return jax.eval_shape(lambda key: init(key, cfg), jax.random.key(0))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    cfg = clip_pair.ClipConfig(
        text=feature_networks.configs.read_config(CONFIG["text_config"], feature_networks.configs.TEXT_ENCODER, "text"),
        vision=vit.VisionConfig(**VISION, image_size=4, patch_size=2, projection_dim=6),
        projection_dim=6,
    )
    tree = random_tree(shapes(clip_pair.init, cfg))
    state = mapping.to_state(tree, feature_networks.CLIP_RULES)
    write_tensors(tmp_path / "model.safetensors", state)
    return tmp_path, cfg, tree, state


def test_clip_is_read_with_its_configuration(folder):
    place, cfg, tree, state = folder
    assert {"logit_scale", "vision_model.embeddings.class_embedding", "visual_projection.weight"} <= state.keys()
    write_tensors(place / "model.safetensors", state | {"vision_model.embeddings.position_ids": np.arange(5)[None]})
    found_cfg, found = feature_networks.read_clip(place)
    assert found_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_what_does_not_fit_clip_is_named(folder):
    place, _, _, state = folder
    dropped = {key: value for key, value in state.items() if key != "visual_projection.weight"}
    write_tensors(place / "model.safetensors", dropped | {"head.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"missing: visual_projection\.weight \[6, 8\][\s\S]*unused: head\.weight"):
        feature_networks.read_clip(place)
    write_tensors(place / "model.safetensors", state | {"logit_scale": np.array(np.nan, np.float32)})
    with pytest.raises(ValueError, match="logit_scale of .* must be finite"):
        feature_networks.read_clip(place)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "siglip"}, "model_type of .* must be 'clip', got 'siglip'"),
    ({"vision_config": None}, "a text_config and a vision_config"),
    ({"projection_dim": -1}, "projection_dim of .* must be a width"),
    ({"vision_config": VISION | {"patch_size": 2, "image_size": 4, "num_channels": 4}}, "num_channels must be 3, got 4"),
    ({"vision_config": VISION | {"depth": 4}}, "unknown 'depth'"),
])  # fmt: skip
def test_another_model_is_refused(folder, change, message):
    place = folder[0]
    (place / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        feature_networks.read_clip(place)


@pytest.fixture
def dino(monkeypatch):
    cfg = vit.VisionConfig(**VISION, image_size=4, patch_size=2, hidden_act="gelu", first_norm=False, patch_bias=True)
    monkeypatch.setattr(feature_networks, "DINO_S16", cfg)
    return cfg, random_tree(shapes(vit.init, cfg))


def authors_state(tree):
    """The tree under the names of DINO's authors and of timm."""
    renamed = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    state, joined = {}, {}
    for key, tensor in mapping.to_state(tree, feature_networks.DINO_RULES).items():
        key = key.replace("encoder.layers.", "blocks.").replace("post_layernorm", "norm")
        key = key.replace("embeddings.patch_embedding", "patch_embed.proj")
        for new, old in renamed.items():
            key = key.replace(new, old)
        if "self_attn" in key:
            joined[key.replace("self_attn", "attn")] = tensor
        else:
            state[key] = tensor
    for kind in ("weight", "bias"):
        parts = [joined[f"blocks.0.attn.{part}_proj.{kind}"] for part in "qkv"]
        state[f"blocks.0.attn.qkv.{kind}"] = np.concatenate(parts)
    state["cls_token"] = state.pop("embeddings.class_embedding")[None, None]
    state["pos_embed"] = state.pop("embeddings.position_embedding.weight")[None]
    return state


def test_dino_is_read_under_the_names_of_its_authors(dino, tmp_path):
    cfg, tree = dino
    state = authors_state(tree)
    assert {
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "patch_embed.proj.weight",
        "norm.bias",
    } <= state.keys()
    write_tensors(tmp_path / "dino.safetensors", state)
    found_cfg, found = feature_networks.read_dino(tmp_path / "dino.safetensors")
    assert found_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, found, tree)


@pytest.mark.parametrize(("change", "message"), [
    ({"blocks.0.attn.qkv.weight": np.zeros((25, 8), np.float32)}, r"missing: encoder\.layers\.0\.self_attn\.k_proj\.weight"),
    ({"blocks.0.attn.qkv.bias": np.zeros((), np.float32)}, r"unused: blocks\.0\.attn\.qkv\.bias \[\]"),
    ({"cls_token": np.zeros((0, 1, 8), np.float32)}, r"mis-shaped: cls_token \[0, 1, 8\]"),
    ({"pos_embed": np.zeros((1, 9, 8), np.float32)}, r"mis-shaped: pos_embed \[9, 8\]"),
])  # fmt: skip
def test_what_does_not_fit_dino_is_named(dino, tmp_path, change, message):
    write_tensors(tmp_path / "dino.safetensors", authors_state(dino[1]) | change)
    with pytest.raises(ValueError, match=message):
        feature_networks.read_dino(tmp_path / "dino.safetensors")
