"""The causal, pre-norm text encoder of CLIP.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

Architecture and parameter paths are those of `transformers.CLIPTextModel`, without the `text_model` prefix, and of
`transformers.CLIPTextModelWithProjection`, which has a branch of that name beside its projection.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.types import Key, Params
from dmsec_jax.models import initial
from dmsec_jax.models.attention import attention

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
LEGACY_EOS_TOKEN_ID = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What layers of both towers are made by, in the names of transformers; `dtype` (compute) is ours."""

    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
    """Field names of `transformers.CLIPTextConfig`, defaults of SD 1.x.

    `eos_token_id=2` is what configs written before transformers 4.32 say, whatever the vocabulary: there the end token
    is the one with the largest id.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407


class TextOutput(NamedTuple):
    """Float32 hidden states: after the final norm; after the last but one layer, without norm; the first at the end token."""

    last_hidden: Float[Array, "B L D"]
    penultimate: Float[Array, "B L D"]
    pooled: Float[Array, "B D"]


def init(key: Key, cfg: TextConfig) -> Params:
    """Random float32 parameters with the standard deviations of the reference implementation.

    Raises:
        ValueError: on a width that the heads do not divide, or an unknown activation or dtype.
    """
    check_config(cfg)
    ids = jax.ShapeDtypeStruct((1, cfg.max_position_embeddings), jnp.int32)
    return initial.init(key, TextModel(cfg), ids, std=partial(starting_std, cfg))


def starting_std(cfg: TextConfig, path: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a random leaf, as in the reference: embeddings 0.02, most layers smaller with depth."""
    layer = path.split("/")[-2]
    if layer in ("token_embedding", "position_embedding"):
        return 0.02
    if layer == "out_proj":
        return cfg.hidden_size**-0.5
    return (2 * cfg.hidden_size * (1 if layer == "fc1" else cfg.num_hidden_layers)) ** -0.5


def apply(cfg: TextConfig, params: Params, ids: Int[Array | np.ndarray, "B L"]) -> TextOutput:
    """Encodes token ids, L <= `cfg.max_position_embeddings`. Token i sees tokens 0..i only; there is no padding mask.

    Every row must contain the end token (the tokenizer puts it there); a row without one is pooled at its first token.

    Raises:
        ValueError: if ids are not [B, L] integers, too long, or (NumPy arrays only) outside the vocabulary.
    """
    check_config(cfg)
    check_ids(cfg, ids)
    last_hidden, penultimate = TextModel(cfg).apply({"params": params}, ids)
    is_end = ids if cfg.eos_token_id == LEGACY_EOS_TOKEN_ID else ids == cfg.eos_token_id
    end = is_end.argmax(axis=-1)
    pooled = jnp.take_along_axis(last_hidden, end[:, None, None], axis=1)[:, 0]
    return TextOutput(last_hidden=last_hidden, penultimate=penultimate, pooled=pooled)


def init_projected(key: Key, cfg: TextConfig) -> Params:
    """Random parameters of the encoder with a projection of its pooled state to `cfg.projection_dim`; raises like `init`."""
    check_config(cfg)
    ids = jax.ShapeDtypeStruct((1, cfg.max_position_embeddings), jnp.int32)
    return initial.init(key, TextModelWithProjection(cfg), ids, std=partial(starting_std, cfg))


def apply_projected(cfg: TextConfig, params: Params, ids: Int[Array | np.ndarray, "B L"]) -> TextOutput:
    """`apply` for parameters of `init_projected`; `pooled` is projected."""
    output = apply(cfg, params["text_model"], ids)
    kernel = params["text_projection"]["kernel"].astype(cfg.dtype)
    return output._replace(pooled=(output.pooled.astype(cfg.dtype) @ kernel).astype(jnp.float32))


def check_config(cfg: TowerConfig) -> None:
    """Raises ValueError on settings that this architecture does not have."""
    if cfg.hidden_size % cfg.num_attention_heads:
        raise fail(
            "hidden_size", f"a multiple of num_attention_heads={cfg.num_attention_heads}", cfg.hidden_size, "change one"
        )
    if cfg.hidden_act not in ACTIVATIONS:
        raise fail(
            "hidden_act", f"one of {sorted(ACTIVATIONS)}", repr(cfg.hidden_act), "use an activation that CLIP has"
        )
    if cfg.dtype not in ("float32", "bfloat16"):
        raise fail("dtype", "'float32' or 'bfloat16'", repr(cfg.dtype), "choose one of them")


def check_ids(cfg: TextConfig, ids) -> None:
    """Raises ValueError on ids of another rank or dtype, too long, or (NumPy only) outside the vocabulary."""
    shape, limit = jnp.shape(ids), cfg.max_position_embeddings
    require(len(shape) == 2, "ids", "[B, L]", f"shape {shape}", "add the batch axis with ids[None]")
    require(jnp.issubdtype(ids.dtype, jnp.integer), "ids", "integers", f"dtype {ids.dtype}", "pass the tokenizer's ids")
    require(shape[1] <= limit, "ids", f"at most {limit} tokens long", f"{shape[1]} tokens", "truncate the prompt")
    if isinstance(ids, np.ndarray) and ids.size:
        low, high = int(ids.min()), int(ids.max())
        contract = f"in [0, {cfg.vocab_size})"
        require(
            low >= 0 and high < cfg.vocab_size, "ids", contract, f"[{low}, {high}]", "use this model's own tokenizer"
        )


class TextModel(nn.Module):
    """ids [B, L] -> (last_hidden, penultimate), both [B, L, D] float32."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, ids):
        x = Embeddings(self.cfg, name="embeddings")(ids).astype(self.cfg.dtype)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        x, states = Encoder(self.cfg, name="encoder")(x, causal)
        x = layer_norm(self.cfg, "final_layer_norm")(x)
        return x.astype(jnp.float32), states[-2].astype(jnp.float32)


class TextModelWithProjection(nn.Module):
    """The parameters of a text model and of a projection without bias."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, ids):
        last_hidden, _ = TextModel(self.cfg, name="text_model")(ids)
        return nn.Dense(self.cfg.projection_dim, use_bias=False, name="text_projection")(last_hidden)


class Embeddings(nn.Module):
    """Token plus learnt position embeddings, added in float32."""

    cfg: TextConfig

    @nn.compact
    def __call__(self, ids):
        cfg = self.cfg
        tokens = nn.Embed(cfg.vocab_size, cfg.hidden_size, name="token_embedding")(ids)
        table = nn.Embed(cfg.max_position_embeddings, cfg.hidden_size, name="position_embedding")
        return tokens + table(jnp.arange(ids.shape[1]))


class Encoder(nn.Module):
    """The stack of layers; also returns the states before the first layer and after each one. `mask` [L, L] as `attention`'s."""

    cfg: TowerConfig

    @nn.compact
    def __call__(self, x, mask=None):
        states = [x]
        for i in range(self.cfg.num_hidden_layers):
            states.append(EncoderLayer(self.cfg, name=f"layers_{i}")(states[-1], mask))
        return states[-1], tuple(states)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: TowerConfig

    @nn.compact
    def __call__(self, x, mask=None):
        x = x + SelfAttention(self.cfg, name="self_attn")(layer_norm(self.cfg, "layer_norm1")(x), mask)
        return x + MLP(self.cfg, name="mlp")(layer_norm(self.cfg, "layer_norm2")(x))


class SelfAttention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    cfg: TowerConfig

    @nn.compact
    def __call__(self, x, mask=None):
        cfg, width = self.cfg, x.shape[-1]
        split = lambda a: rearrange(a, "b l (h d) -> b l h d", h=cfg.num_attention_heads)
        q, k, v = (split(dense(cfg, f"{name}_proj", width)(x)) for name in "qkv")
        return dense(cfg, "out_proj", width)(rearrange(attention(q, k, v, mask=mask), "b l h d -> b l (h d)"))


class MLP(nn.Module):
    """Two dense layers around the activation."""

    cfg: TowerConfig

    @nn.compact
    def __call__(self, x):
        hidden = dense(self.cfg, "fc1", self.cfg.intermediate_size)(x)
        return dense(self.cfg, "fc2", self.cfg.hidden_size)(ACTIVATIONS[self.cfg.hidden_act](hidden))


def dense(cfg: TowerConfig, name: str, features: int) -> nn.Dense:
    """A dense layer in the compute dtype with float32 parameters."""
    return nn.Dense(features, dtype=cfg.dtype, name=name)


def layer_norm(cfg: TowerConfig, name: str) -> nn.LayerNorm:
    """Layer norm whose statistics are float32 and whose output has the compute dtype."""
    return nn.LayerNorm(epsilon=cfg.layer_norm_eps, dtype=cfg.dtype, use_fast_variance=False, name=name)
