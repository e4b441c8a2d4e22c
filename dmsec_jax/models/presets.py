"""Named configurations of complete models: numbers only; weights come from a folder (`checkpoints`) or from `init`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmsec_jax.models.clip import TextConfig
from dmsec_jax.models.unet import UNetConfig
from dmsec_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A latent diffusion model without its weights.

    Attributes:
        unet, vae, text: the networks.
        scheduler: what diffusers' `scheduler_config.json` says.
        text_2: the second text encoder of Stable Diffusion XL, whose pooled state is projected.
        silent_empty: the empty prompt stands for an embedding of zeros, not for what the text encoders make of it.
    """

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    scheduler: Mapping[str, Any]
    text_2: TextConfig | None = None
    silent_empty: bool = False


def _scheduler(class_name: str, prediction_type: str, **more: Any) -> dict[str, Any]:
    return {
        "_class_name": class_name,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
        **more,
    }


_PNDM = _scheduler("PNDMScheduler", "epsilon", skip_prk_steps=True)

SD14 = Preset(
    unet=UNetConfig(),
    vae=VAEConfig(),
    text=TextConfig(eos_token_id=2, bos_token_id=0),
    scheduler=_PNDM,
)
"""Stable Diffusion 1.4: 512 px, CLIP ViT-L/14 text encoder."""

SD15 = SD14
"""Stable Diffusion 1.5: the architecture of 1.4 with other weights."""

SD21_BASE = Preset(
    unet=UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    vae=VAEConfig(),
    text=TextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=512,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        eos_token_id=2,
        bos_token_id=0,
    ),
    scheduler=_PNDM,
)
"""Stable Diffusion 2.1 base: 512 px, 23 of the 24 layers of OpenCLIP ViT-H/14."""

SD21 = Preset(
    unet=dataclasses.replace(SD21_BASE.unet, sample_size=96, upcast_attention=True),
    vae=dataclasses.replace(SD21_BASE.vae, sample_size=768),
    text=SD21_BASE.text,
    scheduler=_scheduler("DDIMScheduler", "v_prediction"),
)
"""Stable Diffusion 2.1: 768 px, predicts v."""

SDXL = Preset(
    unet=UNetConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    vae=VAEConfig(scaling_factor=0.13025, sample_size=1024),
    text=TextConfig(eos_token_id=2, bos_token_id=0),
    text_2=TextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
        eos_token_id=2,
        bos_token_id=0,
    ),
    scheduler=_scheduler("EulerDiscreteScheduler", "epsilon", timestep_spacing="leading"),
    silent_empty=True,
)
"""Stable Diffusion XL base 1.0: 1024 px, CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""

NANO = Preset(
    unet=UNetConfig(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    ),
    vae=VAEConfig(
        latent_channels=16,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        sample_size=64,
    ),
    text=TextConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        pad_token_id=1999,
        bos_token_id=1998,
        eos_token_id=1999,
    ),
    scheduler=_scheduler("DDIMScheduler", "v_prediction"),
)
"""The embedded model: 64 px pictures, latents of 8x8x16; trains and runs on a laptop."""

TINY = Preset(
    unet=UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ),
    vae=VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16),
    text=TextConfig(
        vocab_size=600,
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=599,
        bos_token_id=598,
        eos_token_id=599,
    ),
    scheduler=_scheduler("DDIMScheduler", "epsilon"),
)
"""For tests: random weights, 16 px pictures, every kind of block once."""

TINY_XL = Preset(
    unet=UNetConfig(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        cross_attention_dim=20,
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        norm_num_groups=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    ),
    vae=dataclasses.replace(TINY.vae, scaling_factor=0.13025),
    text=TINY.text,
    text_2=dataclasses.replace(TINY.text, hidden_size=12, projection_dim=16, hidden_act="gelu", pad_token_id=0),
    scheduler=_scheduler("EulerDiscreteScheduler", "epsilon", timestep_spacing="leading"),
    silent_empty=True,
)
"""TINY in the manner of Stable Diffusion XL; its context takes two rows besides the tokens."""
