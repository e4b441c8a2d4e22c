import functools

import jax
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import clip, presets, unet, vae

PRESETS = {name: getattr(presets, name) for name in ("SD14", "SD15", "SD21_BASE", "SD21", "NANO", "TINY")}
each_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def shapes(init, cfg):
    return jax.eval_shape(functools.partial(init, cfg=cfg), jax.random.key(0))


@pytest.mark.parametrize(
    ("init", "cfg", "parameters"),
    [
        (unet.init, presets.SD15.unet, 859_520_964),
        (unet.init, presets.SD21.unet, 865_910_724),
        pytest.param(unet.init, presets.SDXL.unet, 2_567_463_684, marks=pytest.mark.slow),  # 24 transformers deep
        (vae.init, presets.SD15.vae, 83_653_863),
        (clip.init, presets.SD15.text, 123_060_480),
        (clip.init, presets.SD21.text, 340_387_840),
        (clip.init_projected, presets.SDXL.text_2, 694_659_840),
    ],
    ids=["unet-1.x", "unet-2.x", "unet-xl", "vae", "text-1.x", "text-2.x", "text-xl"],
)
def test_parameter_counts_are_those_of_the_published_models(init, cfg, parameters):
    assert trees.count(shapes(init, cfg)) == parameters


@each_preset
def test_the_three_networks_fit_each_other(preset):
    assert preset.unet.in_channels == preset.unet.out_channels == preset.vae.latent_channels
    assert preset.unet.cross_attention_dim == preset.text.hidden_size
    assert preset.unet.sample_size * preset.vae.factor == preset.vae.sample_size
    assert preset.unet.sample_size % preset.unet.factor == 0
    assert preset.scheduler["prediction_type"] in ("epsilon", "v_prediction")


@each_preset
def test_configs_are_static_arguments(preset):
    for cfg in (preset.unet, preset.vae, preset.text):
        assert hash(cfg) == hash(type(cfg)(**vars(cfg)))


def test_published_models_differ_where_they_should():
    assert presets.SD21.scheduler["prediction_type"] == "v_prediction"
    assert presets.SD21_BASE.scheduler["prediction_type"] == presets.SD15.scheduler["prediction_type"] == "epsilon"
    assert presets.SD21.unet.sample_size == 96


def test_tiny_has_every_kind_of_block():
    cfg = presets.TINY.unet
    assert set(cfg.down_block_types) == set(unet.DOWN_BLOCKS)
    assert set(cfg.up_block_types) == set(unet.UP_BLOCKS)
    networks = [(unet.init, cfg), (vae.init, presets.TINY.vae), (clip.init, presets.TINY.text)]
    paths = [path for pair in networks for path in trees.flatten(shapes(*pair))]
    for part in (
        "downsamplers_0",
        "upsamplers_0",
        "conv_shortcut",
        "time_emb_proj",
        "attn2",
        "quant_conv",
        "self_attn",
    ):
        assert any(part in path for path in paths), part
    assert sum(trees.count(shapes(*pair)) for pair in networks) < 150_000


@pytest.mark.parametrize("name", ["SD15", "SD21", "TINY"])
def test_paths_are_those_of_the_interchange_format(name):
    paths = trees.flatten(shapes(unet.init, PRESETS[name].unet))
    block = "down_blocks_0/attentions_0"
    expected = {
        f"{block}/transformer_blocks_0/attn1/to_out_0/kernel",
        f"{block}/transformer_blocks_0/ff/net_0/proj/kernel",
        f"{block}/transformer_blocks_0/ff/net_2/bias",
        "down_blocks_0/resnets_0/time_emb_proj/kernel",
        "down_blocks_0/downsamplers_0/conv/kernel",
        "up_blocks_0/upsamplers_0/conv/bias",
        "mid_block/resnets_1/norm2/scale",
        "time_embedding/linear_1/kernel",
        "conv_norm_out/scale",
    }
    assert expected <= paths.keys()
    rank = {"SD15": 4, "SD21": 2, "TINY": 4}[name]  # 1x1 convolution in 1.x, linear layer in 2.x
    assert len(paths[f"{block}/proj_in/kernel"].shape) == rank
