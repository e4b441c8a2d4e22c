"""Strict reading and writing of the `config.json` files of a Stable Diffusion folder.

Every option of the foreign class is one of four things, or the file is refused with the option's name: a field of our
config; fixed to the one value that we implement; a list that repeats one name for each level; ignored, because it does
not change what the network computes. Tests hold these tables against the signatures of diffusers and transformers.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.config import from_dict, to_dict
from dmsec_jax.models import clip, unet, vae

OTHER_NETWORK = "use a model of the Stable Diffusion 1.x, 2.x or XL family"
MAY_BE_ZERO = ("freq_shift", "pad_token_id", "bos_token_id", "eos_token_id")
LARGEST = {"layers_per_block": 8, "num_hidden_layers": 48, "transformer_layers_per_block": 24}
"""Bounds on depth, beside 2^20 for every other number: tracing a hostile config must end. OpenCLIP's largest encoder has 48 layers."""
MAX_LEVELS = 16
MAX_BLOCKS = 200
"""Blocks of all levels together, each as deep as the deepest; Stable Diffusion XL has 150 by this count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """What a `config.json` may say.

    Attributes:
        config: our dataclass.
        absent: our fields, each with what the foreign class assumes where the file is silent (not always our default).
        fixed: options with one supported value, which is also the foreign default.
        repeated: options that list this name once per entry of `block_out_channels`.
        ignored: options without influence on the result.
        written: further lines that our own files get.
    """

    config: type
    absent: Mapping[str, Any]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeated: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TRANSFORMERS_OPTIONS = """
    architectures attn_implementation dtype initializer_factor initializer_range model_type torch_dtype
    transformers_version chunk_size_feed_forward gradient_checkpointing output_attentions output_hidden_states
    pruned_heads return_dict tie_word_embeddings torchscript use_bfloat16 use_cache use_return_dict tf_legacy_loss
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder bad_words_ids
    begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
    temperature top_k top_p typical_p finetuning_task id2label label2id prefix problem_type task_specific_params
    tokenizer_class
"""
"""How transformers initialises, stores, labels and generates: nothing that the encoder's forward pass reads."""

UNET = Format(
    config=unet.UNetConfig,
    absent={
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
        "attention_head_dim": 8,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "upcast_attention": False,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    },
    fixed=dict(unet.FIXED) | {"attention_type": "default"},
    ignored=frozenset(("addition_embed_type_num_heads",)),  # read only where `addition_embed_type` is "text"
    written={"_class_name": "UNet2DConditionModel"},
)
VAE = Format(
    config=vae.VAEConfig,
    absent={
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "sample_size": 32,
        "mid_block_add_attention": True,
    },
    fixed={
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    repeated={"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"},
    ignored=frozenset(("force_upcast",)),  # a rule for half precision; ours is `dtype`
    written={"_class_name": "AutoencoderKL"},
)
TEXT_ENCODER = Format(
    config=clip.TextConfig,
    absent={
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    fixed={"attention_dropout": 0.0, "dropout": 0.0},
    ignored=frozenset(TRANSFORMERS_OPTIONS.split()),
    written={
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    },
)

TEXT_ENCODER_2 = dataclasses.replace(
    TEXT_ENCODER, written=dict(TEXT_ENCODER.written) | {"architectures": ["CLIPTextModelWithProjection"]}
)
"""Of the second text encoder of Stable Diffusion XL."""


def read_config(values: Mapping[str, Any], fmt: Format, name: str, **ours: Any) -> Any:
    """The dataclass `fmt.config` that a parsed `config.json` describes.

    Args:
        values: the JSON object; keys that begin with "_" are notes of the foreign library.
        fmt: `UNET`, `VAE` or `TEXT_ENCODER`.
        name: what to call the file in errors.
        ours: fields that the foreign class does not have, where the default does not fit.

    Raises:
        ValueError: on an unknown option, a value that means a network that we do not have, or one of the wrong type;
            names the option.
    """
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    known = fmt.absent.keys() | fmt.fixed.keys() | fmt.repeated.keys() | fmt.ignored
    for key in values.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        cure = f"did you mean {near[0]!r}?" if near else OTHER_NETWORK
        raise fail(name, f"made of options of {fmt.config.__name__}", f"unknown {key!r} = {values[key]!r}"[:200], cure)
    for key, only in fmt.fixed.items():
        value = values.get(key, only)
        same = value == only or (value in (None, False) and only in (None, False))
        require(same, f"{name}: {key}", repr(only), repr(value)[:200], OTHER_NETWORK)
    cfg = from_dict(fmt.config, {key: values.get(key, default) for key, default in fmt.absent.items()} | ours, name)
    _check_numbers(cfg, fmt, name)
    for key, only in fmt.repeated.items():
        wanted = [only] * len(cfg.block_out_channels)
        given = values.get(key, wanted)
        require(given == wanted, f"{name}: {key}", repr(wanted), repr(given)[:200], OTHER_NETWORK)
    return cfg


def _check_numbers(cfg: Any, fmt: Format, name: str) -> None:
    """Every number is one that a network can have."""
    for key in fmt.absent:
        value = getattr(cfg, key)
        entries = value if isinstance(value, tuple) else (value,)
        require(len(entries) <= MAX_LEVELS, f"{name}: {key}", f"at most {MAX_LEVELS} long", len(entries), OTHER_NETWORK)
        low, high = int(key not in MAY_BE_ZERO), LARGEST.get(key, 2**20)
        for n in entries:
            if isinstance(n, int) and not isinstance(n, bool):
                require(low <= n <= high, f"{name}: {key}", f"in [{low}, {high}]", n, OTHER_NETWORK)
            elif isinstance(n, float):
                require(0 < n < math.inf, f"{name}: {key}", "positive and finite", n, OTHER_NETWORK)
    if hasattr(cfg, "layers_per_block"):
        depths = getattr(cfg, "transformer_layers_per_block", 1)
        deepest = max(depths, default=1) if isinstance(depths, tuple) else depths
        blocks = len(cfg.block_out_channels) * (2 * cfg.layers_per_block + 1) * deepest
        require(blocks <= MAX_BLOCKS, f"{name}: depth", f"at most {MAX_BLOCKS} blocks", blocks, OTHER_NETWORK)


def write_config(cfg: Any, fmt: Format) -> dict[str, Any]:
    """The JSON object for a config: the inverse of `read_config`, without the fields that are ours alone (`dtype`)."""
    values = to_dict(cfg)
    repeated = {key: [only] * len(cfg.block_out_channels) for key, only in fmt.repeated.items()}
    return dict(fmt.written) | repeated | {key: values[key] for key in fmt.absent}
