"""Our LoRA in PyTorch diffusers, and theirs here: the same weights change what both networks compute alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.checkpoints.adapter_export import write_lora, write_oft
from dmsec_jax.checkpoints.io import read_tensors, write_tensors
from dmsec_jax.finetune.lora import lora
from dmsec_jax.finetune.oft import oft

pytestmark = pytest.mark.torch
PROMPT = "a twemoji icon of a red heart"
RATIO = 2.0


@pytest.fixture(scope="module")
def base():
    return pipeline.load()


@pytest.fixture
def theirs():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    return diffusers.StableDiffusionPipeline.from_pretrained(str(pipeline.EMBEDDED), dtype=torch.float32)


@pytest.fixture(scope="module")
def trainable(base):
    """Factors that change every kind of layer noticeably."""
    rank, key = 3, jax.random.key(1)
    adapters = {"unet": lora(rank, None, "attention+ff+conv"), "text_encoder": lora(rank, None, "text-attention")}
    trees = {part: adapter.init(key, base.params[part]) for part, adapter in adapters.items()}
    leaves, structure = jax.tree.flatten(trees)
    noise = [leaf + 0.05 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, noise)


def ours(tuned):
    """Context of the prompt, and what the UNet predicts with it."""
    z_t = jax.random.normal(jax.random.key(2), (1, *tuned.latent_shape))
    context = pipeline.contexts(tuned, [PROMPT])
    return context, jax.jit(tuned.functions.predict_fn)(tuned.params["unet"], z_t, jnp.array([300]), context), z_t


def both(tuned, theirs):
    import torch

    context, found, z_t = ours(tuned)
    with torch.no_grad():
        ids = theirs.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
        expected = theirs.text_encoder(ids)[0]
        latent = torch.from_numpy(np.array(np.moveaxis(np.asarray(z_t), -1, 1)))
        predicted = theirs.unet(latent, torch.tensor([300]), expected).sample
    return (context, np.moveaxis(np.asarray(found), -1, 1)), (expected.numpy(), predicted.numpy())


def assert_alike(tuned, theirs, untuned):
    found, expected = both(tuned, theirs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(np.asarray(ours(tuned)[1] - ours(untuned)[1])).max() > 0.1, "the adapter does nothing"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_our_lora_loads_there(base, theirs, trainable, tmp_path, layout):
    file = tmp_path / "lora.safetensors"
    write_lora(file, trainable, RATIO, layout)
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert_alike(pipeline.load_tuned(file, base), theirs, base)


def assert_same_weights(one, other):
    same = jax.tree.map(lambda a, b: bool(np.allclose(a, b, rtol=1e-6, atol=1e-6)), one, other)
    assert jax.tree.all(same)


def test_what_they_save_loads_here(base, theirs, trainable, tmp_path):
    peft = pytest.importorskip("peft")
    file = tmp_path / "lora.safetensors"
    write_lora(file, trainable, RATIO)
    tuned = pipeline.load_tuned(file, base)
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    theirs.save_lora_weights(
        tmp_path / "whole",
        unet_lora_layers=peft.get_peft_model_state_dict(theirs.unet, adapter_name="default_0"),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(theirs.text_encoder, adapter_name="default_0"),
        unet_lora_adapter_metadata=theirs.unet.peft_config["default_0"].to_dict(),
        text_encoder_lora_adapter_metadata=theirs.text_encoder.peft_config["default_0"].to_dict(),
    )
    assert_same_weights(pipeline.load_tuned(tmp_path / "whole", base).params, tuned.params)
    theirs.unet.save_lora_adapter(
        tmp_path / "unet", adapter_name="default_0"
    )  # one network, keys without the part's name
    unet = pipeline.load_tuned(tmp_path / "unet", base).params
    assert_same_weights(unet, {**tuned.params, "text_encoder": base.params["text_encoder"]})


def test_dora_means_the_same_there(base, theirs, trainable, tmp_path):
    layers = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (96, 96),
        "down_blocks.0.resnets.0.conv1": None,
    }
    draw, state = np.random.default_rng(0), {}
    for layer in layers:
        kernel = base.params["unet"]["down_blocks_0"]
        conv = "resnets" in layer
        kernel = (
            kernel["resnets_0"]["conv1"] if conv else kernel["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]
        )
        weight = np.asarray(kernel["kernel"])
        weight = weight.transpose(3, 2, 0, 1) if conv else weight.T
        norms = np.sqrt(np.square(weight).sum(tuple(range(1, weight.ndim)))) * draw.uniform(0.3, 3, len(weight))
        norms = norms.astype(np.float32)
        random = lambda *shape: draw.normal(0, 0.1, shape).astype(np.float32)
        state |= {
            f"unet.{layer}.lora_A.weight": random(2, *weight.shape[1:]),
            f"unet.{layer}.lora_B.weight": random(len(weight), 2, *(1,) * (weight.ndim - 2)),
            f"unet.{layer}.lora_magnitude_vector": norms.reshape(1, -1, 1, 1) if conv else norms,
        }
    write_tensors(tmp_path / "dora.safetensors", state)
    theirs.load_lora_weights(str(tmp_path), weight_name="dora.safetensors")
    assert_alike(pipeline.load_tuned(tmp_path / "dora.safetensors", base), theirs, base)


def old_keys(state):
    """PEFT's keys of attention layers as diffusers spelt them before 0.22."""
    renamed = {}
    for key, value in state.items():
        key = key.replace(".lora_A.", ".down.").replace(".lora_B.", ".up.")
        layer, factor = key.rsplit(".", 2)[0], ".".join(key.rsplit(".", 2)[1:])
        place, _, name = layer.removesuffix(".0").rpartition(".")
        text = layer.startswith("text_encoder")
        short = f"to_{name.removesuffix('_proj')}_lora" if text else f"processor.{name}_lora"
        renamed[f"{place}.{short}.{factor}"] = value
    return renamed


def test_one_random_adapter_in_three_layouts_gives_one_forward_pass(base, theirs, tmp_path):
    key, trees = jax.random.key(3), {}
    for part, targets in (("unet", "attention"), ("text_encoder", "text-attention")):
        trees[part] = lora(4, None, targets).init(key, base.params[part])
    leaves, structure = jax.tree.flatten(trees)
    noise = [leaf + 0.05 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
    trees = jax.tree.unflatten(structure, noise)
    files = {layout: tmp_path / f"{layout}.safetensors" for layout in ("diffusers", "kohya", "old")}
    for layout in ("diffusers", "kohya"):
        write_lora(files[layout], trees, RATIO, layout)
    write_tensors(files["old"], old_keys(read_tensors(files["diffusers"])))
    theirs.load_lora_weights(str(tmp_path), weight_name=files["diffusers"].name)
    _, expected = both(base, theirs)
    for layout, file in files.items():
        tuned = pipeline.load_tuned(file, base)
        context, found, _ = ours(tuned)
        np.testing.assert_allclose(context, expected[0], atol=1e-4, err_msg=layout)
        np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1), expected[1], atol=1e-4, err_msg=layout)


@pytest.mark.parametrize("cayley", ["reference", "peft"])
def test_our_oft_turns_their_network_too(base, theirs, tmp_path, cayley):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    adapter = oft(4, "attention", cayley)
    trainable = adapter.init(jax.random.key(0), base.params["unet"])
    turn = lambda leaf: 0.2 * jax.random.normal(jax.random.key(leaf.shape[-1]), leaf.shape)
    trainable = jax.tree.map(turn, trainable)
    write_oft(tmp_path, trainable, cayley)
    merged = adapter.merge(base.params["unet"], trainable)
    tuned = dataclasses.replace(base, params={**base.params, "unet": merged})
    context, found, z_t = ours(tuned)
    network = peft.PeftModel.from_pretrained(theirs.unet, str(tmp_path))
    with torch.no_grad():
        latent = torch.from_numpy(np.array(np.moveaxis(np.asarray(z_t), -1, 1)))
        expected = network(latent, torch.tensor([300]), torch.from_numpy(np.array(context))).sample
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1), expected.numpy(), atol=1e-4)
    assert np.abs(np.asarray(found - ours(base)[1])).max() > 0.1
