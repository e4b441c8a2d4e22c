"""Sizes of networks that no preset has."""

import dataclasses

from dmsec_jax.models import presets

MIDDLE = dataclasses.replace(
    presets.SD14.unet,
    sample_size=32,
    block_out_channels=(128, 256, 384),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=256,
    attention_head_dim=4,
)
"""Between the embedded model and Stable Diffusion: 32 x 32 latents, 29 million weights."""
