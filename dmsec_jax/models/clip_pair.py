"""CLIP whole: an image and a text tower whose projections are compared by their cosine (Radford et al. 2021).

Parameter paths are those of `transformers.CLIPModel`. The weights are the user's own: `checkpoints.feature_networks.read_clip`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmsec_jax.core.types import Image, Key, Params
from dmsec_jax.models import clip, initial, vit
from dmsec_jax.models.clip import TextConfig
from dmsec_jax.models.layers import unit
from dmsec_jax.models.preprocessing import preprocess
from dmsec_jax.models.vit import VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers, and the width of the space that they share."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    projection_dim: int = 768


def init(key: Key, cfg: ClipConfig) -> Params:
    """Random float32 parameters; raises as the towers' `init`."""
    clip.check_config(cfg.text)
    vit.check(cfg.vision)
    ids = jax.ShapeDtypeStruct((1, cfg.text.max_position_embeddings), jnp.int32)
    image = jax.ShapeDtypeStruct((1, cfg.vision.image_size, cfg.vision.image_size, 3), jnp.float32)
    return initial.init(key, _Pair(cfg), image, ids)


def image_features(cfg: ClipConfig, params: Params, image: Image) -> Float[Array, "B D"]:
    """Projected class tokens of unit length, of pictures [B, H, W, 3] in [-1, 1]."""
    x = preprocess(image, vit.clip_preprocessing(cfg.vision))
    pooled = vit.apply(cfg.vision, params["vision_model"], x).classes[:, -1]
    return unit(pooled @ params["visual_projection"]["kernel"])


def text_features(cfg: ClipConfig, params: Params, ids: Int[Array | np.ndarray, "B L"]) -> Float[Array, "B D"]:
    """Projected end tokens of unit length, of token ids as `clip.apply` takes them; raises like it."""
    return unit(clip.apply_projected(cfg.text, params, ids).pooled)


class _Pair(nn.Module):
    """The parameters of both towers, their projections, and the logarithm of the factor that cosines are multiplied by."""

    cfg: ClipConfig

    @nn.compact
    def __call__(self, image, ids):
        width = self.cfg.projection_dim
        pooled = vit.VisionModel(self.cfg.vision, name="vision_model")(image).classes[:, -1]
        text, _ = clip.TextModel(self.cfg.text, name="text_model")(ids)
        scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)
        project = lambda name, x: nn.Dense(width, use_bias=False, name=name)(x)
        return project("visual_projection", pooled), project("text_projection", text), scale
