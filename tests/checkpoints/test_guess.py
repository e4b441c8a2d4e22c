"""The base model of an adapter, from its shapes and from what trainers note."""

import numpy as np
import pytest

from dmsec_jax.checkpoints.guess import text_width

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
KEYS = f"{BLOCK}_attn2_to_k"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CASES = {
    "lora": ({f"{KEYS}.lora_down.weight": (4, 768), f"{KEYS}.lora_up.weight": (320, 4)}, 768),
    "peft": ({f"{PEFT}.lora_A.weight": (4, 2048)}, 2048),
    "old diffusers": ({f"unet.{PEFT[17:-5]}.processor.to_k_lora.down.weight": (4, 1024)}, 1024),
    "loha": ({f"{KEYS}.hada_w1_b": (4, 768), f"{KEYS}.hada_w1_a": (320, 4)}, 768),
    "lokr": ({f"{KEYS}.lokr_w1": (8, 16), f"{KEYS}.lokr_w2_a": (40, 4), f"{KEYS}.lokr_w2_b": (4, 64)}, 1024),
    "half a lokr": ({f"{KEYS}.lokr_w1": (8, 16)}, None),
    "oft of peft": ({f"{PEFT}.oft_R.weight": (32, 276)}, 768),
    "difference": ({f"{KEYS}.diff": (320, 768)}, 768),
    "text encoder": ({f"{TEXT}.lora_down.weight": (4, 1024), f"{TEXT}.lora_up.weight": (1024, 4)}, 1024),
    "two text encoders": ({f"{TEXT.replace('te', 'te1', 1)}.lora_down.weight": (4, 768)}, 2048),
    "deep": ({f"{BLOCK[:-1]}9_attn1_to_q.lora_down.weight": (4, 1280)}, 2048),
    "self-attention": ({f"{BLOCK}_attn1_to_q.lora_down.weight": (4, 320)}, None),
    "contradiction": ({f"{KEYS}.lora_down.weight": (4, 768), f"{TEXT}.lora_down.weight": (4, 1024)}, None),
    "other keys": ({"a": (2, 768)}, None),
    "no axes": ({f"{KEYS}.lora_down.weight": ()}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_tell(case):
    shapes, width = CASES[case]
    found = text_width({key: np.ones(shape, np.float32) for key, shape in shapes.items()}, {})
    assert found == (None if width is None else (width, "its shapes"))


@pytest.mark.parametrize(("note", "width"), [
    ({"ss_base_model_version": "sd_v1"}, 768),
    ({"ss_base_model_version": "sd_v2_v"}, 1024),
    ({"ss_base_model_version": "sdxl_base_v1-0"}, 2048),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, 2048),
    ({"modelspec.architecture": "flux-1-dev"}, None),
    ({}, None),
])  # fmt: skip
def test_else_notes_do(note, width):
    state = {f"{BLOCK}_attn1_to_q.lora_down.weight": np.ones((4, 320), np.float32)}
    assert text_width(state, note) == (None if width is None else (width, next(iter(note))))
    assert text_width({f"{KEYS}.diff": np.ones((320, 768))}, note) == (768, "its shapes")
