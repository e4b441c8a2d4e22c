"""Whole models in one file: round trips, spellings of real files, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dmsec_jax.checkpoints import ldm, single_file
from dmsec_jax.checkpoints.diffusers import components, shapes
from dmsec_jax.checkpoints.io import read_tensors, write_tensors
from dmsec_jax.core.trees import flatten, map_paths
from dmsec_jax.models import presets

OPEN_CLIP = dataclasses.replace(
    presets.TINY,
    unet=dataclasses.replace(presets.TINY.unet, use_linear_projection=True, attention_head_dim=(2, 4)),
    text=dataclasses.replace(presets.TINY.text, hidden_act="gelu"),
)
PRESETS = {"clip": presets.TINY, "open clip": OPEN_CLIP}


def filled(preset):
    draw = np.random.default_rng(0)
    fill = lambda _, leaf: draw.normal(size=leaf.shape).astype(np.float32)
    fields = {name: component.field for name, component in components(preset).items()}
    return {name: map_paths(fill, shapes(name, getattr(preset, field))) for name, field in fields.items()}


MODELS = {name: filled(preset) for name, preset in PRESETS.items()}


def written(tmp_path, name, dtype="float32"):
    path = tmp_path / "model.safetensors"
    single_file.write_model(path, PRESETS[name], MODELS[name], dtype)
    return path, {key: np.array(value) for key, value in read_tensors(path).items()}


def assert_equal(read, expected):
    assert read.keys() == expected.keys()
    for name in read:
        one, other = flatten(read[name]), flatten(expected[name])
        assert one.keys() == other.keys()
        for path in one:
            np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_is_exact(tmp_path, name):
    path, _ = written(tmp_path, name)
    assert_equal(single_file.read_params(path, PRESETS[name]), MODELS[name])


@pytest.mark.slow  # traces four networks
def test_round_trip_of_xl_is_exact(tmp_path):
    params = filled(presets.TINY_XL)
    single_file.write_model(tmp_path / "xl.safetensors", presets.TINY_XL, params, "float32")
    assert_equal(single_file.read_params(tmp_path / "xl.safetensors", presets.TINY_XL), params)
    names = read_tensors(tmp_path / "xl.safetensors")
    for name in ("embedders.0.transformer.text_model.final_layer_norm.weight", "embedders.1.model.text_projection"):
        assert f"conditioner.{name}" in names
    np.testing.assert_array_equal(
        names["conditioner.embedders.1.model.text_projection"], params["text_encoder_2"]["text_projection"]["kernel"]
    )


def test_names_and_layouts_of_latent_diffusion(tmp_path):
    """Spot checks against names that its code is known for."""
    _, clip = written(tmp_path, "clip")
    _, open_clip = written(tmp_path, "open clip")
    unet, vae = MODELS["clip"]["unet"], MODELS["clip"]["vae"]
    for key, leaf in {
        "model.diffusion_model.time_embed.2.weight": unet["time_embedding"]["linear_2"]["kernel"].T,
        "model.diffusion_model.input_blocks.1.0.in_layers.2.bias": unet["down_blocks_0"]["resnets_0"]["conv1"]["bias"],
        "model.diffusion_model.input_blocks.2.0.op.bias": unet["down_blocks_0"]["downsamplers_0"]["conv"]["bias"],
        "model.diffusion_model.middle_block.1.norm.weight": unet["mid_block"]["attentions_0"]["norm"]["scale"],
        "model.diffusion_model.output_blocks.1.1.conv.bias": unet["up_blocks_0"]["upsamplers_0"]["conv"]["bias"],
        "model.diffusion_model.output_blocks.3.0.skip_connection.bias": unet["up_blocks_1"]["resnets_1"][
            "conv_shortcut"
        ]["bias"],
        "model.diffusion_model.out.2.bias": unet["conv_out"]["bias"],
        "first_stage_model.decoder.up.1.block.0.norm1.weight": vae["decoder"]["up_blocks_0"]["resnets_0"]["norm1"][
            "scale"
        ],
        "first_stage_model.encoder.down.0.downsample.conv.bias": vae["encoder"]["down_blocks_0"]["downsamplers_0"][
            "conv"
        ]["bias"],
        "first_stage_model.encoder.mid.attn_1.proj_out.bias": vae["encoder"]["mid_block"]["attentions_0"]["to_out_0"][
            "bias"
        ],
    }.items():
        np.testing.assert_array_equal(clip[key], leaf, err_msg=key)
    assert clip["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in clip
    layer = MODELS["open clip"]["text_encoder"]["encoder"]["layers_1"]["self_attn"]
    fused = np.concatenate([layer[f"{name}_proj"]["kernel"].T for name in "qkv"])
    np.testing.assert_array_equal(
        open_clip["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"], fused
    )
    assert open_clip["cond_stage_model.model.positional_embedding"].shape == (16, 8)


def resaved(path, state):
    write_tensors(path, state)
    return path


def test_what_real_files_hold_besides(tmp_path):
    path, state = written(tmp_path, "open clip")
    more = {"betas": 4, "alphas_cumprod": 4, "sqrt_alphas_cumprod": 4, "posterior_variance": 4, "model_ema.decay": 1}
    text = {"text_projection": 8, "logit_scale": 1, "transformer.resblocks.2.ln_1.weight": 8, "attn_mask": 2}
    more |= {f"cond_stage_model.model.{key}": size for key, size in text.items()}
    state |= {key: np.ones(size, np.float32) for key, size in more.items()}
    nested = {f"state_dict.{key}": value for key, value in state.items()} | {"optimizer_states.0.exp_avg": np.ones(3)}
    for content in (state, nested):
        assert_equal(single_file.read_params(resaved(path, content), OPEN_CLIP), MODELS["open clip"])


def test_names_of_novelai(tmp_path):
    path, state = written(tmp_path, "clip")
    state = {key.replace(".transformer.text_model.", ".transformer."): value for key, value in state.items()}
    state["cond_stage_model.transformer.embeddings.position_ids"] = np.arange(16)
    assert_equal(single_file.read_params(resaved(path, state), presets.TINY), MODELS["clip"])


def test_the_average_is_taken_by_name(tmp_path):
    path, state = written(tmp_path, "clip")
    with pytest.raises(ValueError, match=r"missing: model_ema\.diffusion_modelinput_blocks00weight \[8, 4, 3, 3\]"):
        single_file.read_params(path, presets.TINY, "model_ema")
    prefix = "model.diffusion_model."
    own = {key.removeprefix("model.").replace(".", ""): v for key, v in state.items() if key.startswith(prefix)}
    state |= {f"model_ema.{key}": value + 1 for key, value in own.items()} | {"model_ema.num_updates": np.arange(1)}
    resaved(path, state)
    assert_equal(single_file.read_params(path, presets.TINY), MODELS["clip"])
    average = single_file.read_params(path, presets.TINY, "model_ema")
    plus_one = map_paths(lambda _, leaf: leaf + 1, MODELS["clip"]["unet"])
    assert_equal(average, MODELS["clip"] | {"unet": plus_one})


def test_one_error_lists_everything_that_is_wrong_in_the_names_of_the_file(tmp_path):
    path, state = written(tmp_path, "open clip")
    del state["model.diffusion_model.out.2.bias"]
    state["first_stage_model.quant_conv.bias"] = np.ones(3, np.float32)
    state["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"] = np.ones((25, 8), np.float32)
    state |= {"lora_unet_x.alpha": np.ones(1, np.float32), "model.other": np.ones(1, np.float32)}
    with pytest.raises(ValueError, match=r"model\.safetensors must be exactly the tensors") as caught:
        single_file.read_params(resaved(path, state), OPEN_CLIP)
    assert str(caught.value).split("\n")[1:] == [
        "  mis-shaped: first_stage_model.quant_conv.bias [3], expected [8]",
        *(f"  missing: cond_stage_model.model.transformer.resblocks.0.attn.{name}.weight [8, 8]" for name in "kqv"),
        "  missing: model.diffusion_model.out.2.bias [4]",
        "  unused: cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight [25, 8]",
        "  unused: lora_unet_x.alpha [1]",
        "  unused: model.other [1]",
    ]


def test_weights_that_are_not_finite_are_named(tmp_path):
    path, state = written(tmp_path, "clip")
    state["first_stage_model.quant_conv.bias"][0] = np.nan
    with pytest.raises(ValueError, match=r"tensor first_stage_model\.quant_conv\.bias .* must be finite"):
        single_file.read_params(resaved(path, state), presets.TINY)


@pytest.mark.parametrize(("width", "kind", "expected"), [
    (768, "epsilon", presets.SD15),
    (1024, "epsilon", presets.SD21_BASE),
    (1024, "v_prediction", presets.SD21),
    (2048, "epsilon", presets.SDXL),
])  # fmt: skip
def test_family_from_the_width_of_the_text(width, kind, expected):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    weight = np.broadcast_to(np.float32(0), (320, width))
    assert single_file.preset_of({key: weight}, "file", kind) == expected
    with pytest.raises(ValueError, match="of width 768, 1024, 2048, got 640"):
        single_file.preset_of({key: np.broadcast_to(np.float32(0), (320, 640))}, "file", kind)


def test_more_input_channels_and_marks_of_velocity():
    keys = (
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    )
    shapes = ((640, 2048), (320, 9, 3, 3))
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in zip(keys, shapes, strict=True)}
    marked = state | {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}
    assert single_file.prediction_of(Path("model.ckpt"), state) is None
    assert single_file.prediction_of(Path("model.ckpt"), marked) == "v_prediction"
    preset = single_file.preset_of(marked, "file", "v_prediction")
    assert (preset.unet.in_channels, preset.unet.out_channels) == (9, 4)
    assert preset.scheduler["rescale_betas_zero_snr"]


def test_velocity_with_the_first_family_keeps_its_networks():
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    preset = single_file.preset_of({key: np.zeros((1, 768), np.float32)}, "file", "v_prediction")
    assert preset.unet == presets.SD15.unet
    assert preset.scheduler["prediction_type"] == "v_prediction"


def test_what_weights_do_not_tell_is_asked_for(tmp_path):
    path, _ = written(tmp_path, "clip")
    with pytest.raises(ValueError, match="give --prediction-type epsilon or v_prediction, as its author says"):
        single_file.model_of(single_file.read(path), path, tmp_path, None)
    config = path.with_suffix(".yaml")
    for text, found in (
        ("model: {params: {parameterization: x}}", "parameterization of .* must be eps or v"),
        ("model: [", "must be a config of latent diffusion"),
        ("model: 3", "must be a config of latent diffusion"),
        ("model: {params: {parameterization: v}}", "tokenizer of .* must be given"),
        ("model: {params: {}}", "tokenizer of .* must be given"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=found):
            single_file.model_of(single_file.read(path), path, None, None)


def test_a_tokenizer_completes_the_model(tmp_path, monkeypatch):
    path, _ = written(tmp_path, "clip")
    for name, text in {"vocab.json": "{}", "merges.txt": ""}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="of width 768, 1024, 2048, got 8"):
        single_file.model_of(single_file.read(path), path, tmp_path, "epsilon")
    monkeypatch.setattr(single_file.presets, "SD15", presets.TINY)
    monkeypatch.setattr(single_file, "preset_of", lambda state, name, kind: presets.TINY)
    model = single_file.model_of(single_file.read(path), path, tmp_path, "epsilon")
    assert_equal(model.params, MODELS["clip"])
    assert model.tokenizer == tmp_path


@pytest.mark.slow  # traces networks of full size
@pytest.mark.parametrize("preset", ["SD15", "SD21", "SDXL"])
def test_full_size_names_are_one_to_one(preset):
    preset = getattr(presets, preset)
    parts = single_file._parts(preset, "model", open_clip=preset is presets.SD21)
    names = [part.prefix + name for part in parts.values() for name in part.rules.names]
    assert len(set(names)) == len(names)
    if preset is presets.SDXL:
        assert "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight" in names
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in names
        assert "conditioner.embedders.1.model.text_projection.weight" in names
    else:
        assert "model.diffusion_model.input_blocks.11.0.in_layers.0.weight" in names
        assert "model.diffusion_model.output_blocks.8.2.conv.weight" in names
    assert "first_stage_model.decoder.up.3.upsample.conv.weight" in names
    assert ldm.EMA not in "".join(names)
