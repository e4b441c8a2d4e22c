import dataclasses

import pytest

from dmsec_jax.checkpoints.configs import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE, read_config, write_config
from dmsec_jax.models import presets

FORMATS = {"unet": UNET, "vae": VAE, "text": TEXT_ENCODER, "text_2": TEXT_ENCODER_2}
PRESETS = {name: value for name, value in vars(presets).items() if isinstance(value, presets.Preset)}
NETWORKS = [(preset, field) for preset in PRESETS for field in FORMATS if getattr(PRESETS[preset], field) is not None]


@pytest.mark.parametrize(("preset", "field"), NETWORKS)
def test_round_trip_of_every_preset(preset, field):
    cfg, fmt = getattr(PRESETS[preset], field), FORMATS[field]
    assert read_config(write_config(cfg, fmt), fmt, "config.json") == cfg


@pytest.mark.parametrize("field", FORMATS)
def test_own_fields_stay_out_and_foreign_ones_are_complete(field):
    cfg, fmt = getattr(presets.TINY_XL, field), FORMATS[field]
    ours = {f.name for f in dataclasses.fields(cfg)} - fmt.absent.keys()
    assert ours <= {"dtype", "remat"}
    assert not ours & write_config(cfg, fmt).keys()


def test_absent_options_mean_what_the_foreign_library_assumes():
    cfg = read_config({"_class_name": "UNet2DConditionModel", "sample_size": 8}, UNET, "config.json")
    assert cfg.cross_attention_dim == 1280  # our default is 768
    assert read_config({}, TEXT_ENCODER, "config.json").hidden_size == 512


def test_notes_and_ignored_options_change_nothing():
    cfg = presets.TINY.unet
    values = write_config(cfg, UNET) | {"_name_or_path": "x", "addition_embed_type_num_heads": 64}
    values |= {"only_cross_attention": False, "mid_block_only_cross_attention": False, "class_embed_type": None}
    assert read_config(values, UNET, "config.json") == cfg


UNSUPPORTED = [
    (UNET, "unet", "class_embed_type", "timestep"),
    (UNET, "unet", "addition_embed_type", ["text_time"]),
    (UNET, "unet", "dual_cross_attention", True),
    (UNET, "unet", "attention_type", "gated"),
    (UNET, "unet", "mid_block_type", None),
    (UNET, "unet", "only_cross_attention", [True, True]),
    (UNET, "unet", "resnet_time_scale_shift", "scale_shift"),
    (UNET, "unet", "layers_per_block", [1, 2]),
    (UNET, "unet", "layers_per_block", 0),
    (UNET, "unet", "layers_per_block", 10**6),
    (UNET, "unet", "transformer_layers_per_block", [1, 10**6]),
    (UNET, "unet", "transformer_layers_per_block", [1, 25]),
    (UNET, "unet", "block_out_channels", [8] * 100),
    (VAE, "vae", "layers_per_block", 9),
    (TEXT_ENCODER, "text", "num_hidden_layers", 49),
    (UNET, "unet", "block_out_channels", [8, -16]),
    (UNET, "unet", "attention_head_dim", 0),
    (UNET, "unet", "norm_eps", float("nan")),
    (UNET, "unet", "in_channels", "4"),
    (UNET, "unet", "use_linear_projection", "yes"),
    (VAE, "vae", "use_quant_conv", False),
    (VAE, "vae", "shift_factor", 0.1),
    (VAE, "vae", "scaling_factor", 0.0),
    (VAE, "vae", "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    (VAE, "vae", "up_block_types", ["UpDecoderBlock2D"]),
    (TEXT_ENCODER, "text", "attention_dropout", 0.1),
    (TEXT_ENCODER, "text", "num_hidden_layers", 10**6),
    (TEXT_ENCODER, "text", "vocab_size", 1 << 40),
]


@pytest.mark.parametrize(("fmt", "field", "option", "value"), UNSUPPORTED)
def test_unsupported_value_is_named(fmt, field, option, value):
    values = write_config(getattr(presets.TINY, field), fmt) | {option: value}
    with pytest.raises(ValueError, match=rf"config\.json\W+{option}"):
        read_config(values, fmt, "config.json")


def test_depth_is_bounded_so_that_tracing_ends():
    values = write_config(presets.TINY.unet, UNET) | {"layers_per_block": 8, "transformer_layers_per_block": 24}
    with pytest.raises(ValueError, match=r"config\.json: depth must be at most 200 blocks, got 816"):
        read_config(values, UNET, "config.json")
    levels = {"block_out_channels": [8] * 16, "layers_per_block": 8}
    levels |= {
        f"{side}_block_types": [f"{side.title()}{kind}coderBlock2D"] * 16
        for side, kind in (("down", "En"), ("up", "De"))
    }
    with pytest.raises(ValueError, match=r"config\.json: depth must be at most 200 blocks, got 272"):
        read_config(write_config(presets.TINY.vae, VAE) | levels, VAE, "config.json")


def test_unknown_option_is_named_with_the_nearest():
    values = write_config(presets.TINY.unet, UNET)
    with pytest.raises(ValueError, match=r"unknown 'cross_attention_dims' = 8; did you mean 'cross_attention_dim'\?"):
        read_config(values | {"cross_attention_dims": 8}, UNET, "config.json")
    with pytest.raises(ValueError, match=r"unknown 'zzz' = 1; use a model of the Stable Diffusion"):
        read_config(values | {"zzz": 1}, UNET, "config.json")
