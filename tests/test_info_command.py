"""`dmsec info` on every format: what it prints, and its exit status."""

import json
import shutil

import numpy as np
import pytest

from dmsec_jax import cli
from dmsec_jax.checkpoints import single_file
from dmsec_jax.checkpoints.adapter_export import write_lora, write_oft
from dmsec_jax.checkpoints.io import read_tensors, write_tensors
from dmsec_jax.core.files import sha256


@pytest.fixture
def info(capsys):
    def run(*arguments):
        status = cli.main(["info", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def factors(inputs, outputs, rank=2):
    draw = np.random.default_rng(0)
    return {"down": draw.normal(size=(inputs, rank)).astype("f4"), "up": draw.normal(size=(rank, outputs)).astype("f4")}


@pytest.fixture
def lora(tmp_path):
    attention = {"attn1": {"to_q": factors(8, 8)}, "attn2": {"to_k": factors(8, 8, 3)}}
    tree = {"unet": {"down_blocks_0": {"attentions_0": {"transformer_blocks_0": attention}}}}
    write_lora(tmp_path / "lora.safetensors", tree, 0.5, "kohya", metadata={"ss_\x1b[31mnote": "a\nb"})
    return tmp_path / "lora.safetensors"


def test_a_folder_that_loads(info, tiny_folder):
    status, page = info(tiny_folder)
    assert status == 0
    for text in ("diffusers folder", "epsilon", sha256(tiny_folder), "float32", "UNet2DConditionModel", "vocab.json"):
        assert text in page
    assert page.endswith("Everything fits: it can be loaded.\n")


def test_a_part_that_the_index_does_not_name_is_none_of_the_model(info, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "text_encoder_2").mkdir()  # of the model of another family that was there before
    status, page = info(folder)
    assert status == 0
    assert "it can be loaded" in page


def test_a_folder_that_does_not_load_says_everything(info, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {key: np.array(value) for key, value in read_tensors(weights).items()}
    del tensors["quant_conv.bias"]
    tensors["extra"] = np.full(3, np.nan, np.float32)
    write_tensors(weights, tensors)
    (folder / "unet" / "config.json").write_text("{")
    (folder / "tokenizer" / "vocab.json").write_text("[]")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_schedule": "none"}))
    status, page = info(folder)
    assert status == 1
    assert "It cannot be loaded: 6 problems" in page
    for text in ("missing: vae: quant_conv.bias [8]", "unused: vae: extra [3]", "not finite: vae: extra"):
        assert text in page
    assert page.count("unreadable: ") == 3


def test_an_adapter_and_its_base(info, lora, tiny_folder):
    status, page = info(lora, "--base", tiny_folder)
    assert status == 0
    for text in (
        "adapter, for a model with text of width 8",
        "layout  kohya",
        "2 LoRA; rank 2, 3; alpha / rank 0.5",
        "80",
    ):
        assert text in page
    assert "ss_\N{REPLACEMENT CHARACTER}[31mnote: a b" in page
    assert "\x1b" not in page
    status, page = info(lora)
    assert status == 1
    assert "unknown: the base model; name it with --base" in page


def test_an_adapter_for_another_base(info, lora, tiny_folder):
    tensors = {key: np.array(value) for key, value in read_tensors(lora).items()}
    tensors["lora_unet_elsewhere.alpha"] = np.float32(1)
    write_tensors(lora, tensors)
    status, page = info(lora, "--base", tiny_folder)
    assert status == 1
    assert "1 problem\n    unused: lora_unet_elsewhere.alpha []" in page


def test_an_oft_of_peft(info, tiny_folder, tmp_path):
    generator = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("f4")
    attention = {"attn1": {"to_q": {"generator": generator}}}
    write_oft(tmp_path / "oft", {"down_blocks_0": {"attentions_0": {"transformer_blocks_0": attention}}})
    status, page = info(tmp_path / "oft", "--base", tiny_folder)
    assert status == 0
    for text in ("layout  PEFT", "1 OFT; rank none", "          12  float32"):
        assert text in page


def test_what_a_stranger_wrote_does_not_steer_the_terminal(info, tmp_path):
    header = b'{"a\\u001b[2J\\u202e": 1}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    status, page = info(tmp_path / "x.safetensors")
    assert status == 1
    assert "described by dtype" in page
    assert page.rstrip("\n").isprintable()


def test_a_single_file_of_another_size_and_its_base(info, tiny_pipeline, tiny_folder, tmp_path):
    path = tmp_path / "model.safetensors"
    single_file.write_model(path, tiny_pipeline.configs, tiny_pipeline.params, "bfloat16")
    status, page = info(path)
    assert status == 1
    for text in (
        "single file",
        "weights do not say: ask the author, then --prediction-type",
        "name that with --base",
        "bfloat16",
        "CLIP",
        "conditioned on text of width 768, 1024, 2048, got 8",
    ):
        assert text in page


def test_other_files(info, tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
    status, page = info(tmp_path / "x.safetensors")
    assert (status, "neither a Stable Diffusion model nor an adapter" in page) == (1, True)
    write_tensors(tmp_path / "vae.safetensors", {"decoder.conv_in.bias": np.ones(2, np.float32)})
    status, page = info(tmp_path / "vae.safetensors")
    assert (status, "is      an autoencoder alone; name the whole model" in page) == (1, True)
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    for name, message in (("x.ckpt", "must be"), ("none.safetensors", "No such file"), (".", "a folder with one of")):
        status, page = info(tmp_path / name)
        assert status == 1
        assert message in page
        assert page.startswith("dmsec: ")


def test_learnt_words(info, tiny_folder, tmp_path):
    write_tensors(tmp_path / "style.safetensors", {"emb_params": np.ones((2, 768), np.float32)})
    status, page = info(tmp_path / "style.safetensors")
    assert status == 0
    for text in ("words of textual inversion, for Stable Diffusion 1.x", "style (2 vectors)", "1,536"):
        assert text in page
    status, page = info(tmp_path / "style.safetensors", "--base", tiny_folder)
    assert status == 1
    assert "of width 8, the text_encoder's, got 768" in page


@pytest.mark.slow  # traces four networks
def test_a_folder_of_xl(info, tiny_xl_folder):
    status, page = info(tiny_xl_folder)
    assert status == 0
    for text in ("text_encoder_2", "CLIPTextModelWithProjection", "tokenizer_2"):
        assert text in page
