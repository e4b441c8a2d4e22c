"""Adapters that PEFT itself makes and saves: LoHa, LoKr and OFT, on layers of a tiny UNet, change our kernels as they change theirs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.checkpoints import configs, mapping
from dmsec_jax.checkpoints.adapter_export import write_oft
from dmsec_jax.checkpoints.adapters import merge, read_adapter
from dmsec_jax.checkpoints.diffusers import shapes
from dmsec_jax.core.trees import flatten
from dmsec_jax.finetune.oft import oft
from dmsec_jax.models import presets

pytestmark = pytest.mark.torch
TARGET = shapes("unet", presets.TINY.unet)
LINEAR, WINDOW = ["to_q", "to_out.0"], ["conv1"]
CASES = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "target_modules": LINEAR + WINDOW}),
    "loha, cores": ("LoHaConfig", {"r": 3, "alpha": 2, "target_modules": WINDOW, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": LINEAR + WINDOW}),
    "lokr, whole": ("LoKrConfig", {"r": 64, "alpha": 16, "target_modules": LINEAR}),
    "lokr, cores": ("LoKrConfig", {"r": 2, "alpha": 3, "target_modules": WINDOW, "use_effective_conv2d": True}),
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3, "target_modules": LINEAR + WINDOW, "use_rslora": True}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR}),
    "oft, three terms": ("OFTConfig", {"r": 2, "oft_block_size": 0, "target_modules": LINEAR, "num_cayley_neumann_terms": 3}),
    "oft, inverse": ("OFTConfig", {"r": 2, "oft_block_size": 0, "target_modules": LINEAR, "use_cayley_neumann": False}),
    "oft, shared": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": LINEAR, "block_share": True}),
    "oft, window": ("OFTConfig", {"r": 0, "oft_block_size": 4, "target_modules": WINDOW}),
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    values = configs.write_config(presets.TINY.unet, configs.UNET)
    return diffusers.UNet2DConditionModel(**{key: value for key, value in values.items() if not key.startswith("_")})


def tree_of(network):
    return mapping.to_tree({name: t.detach().numpy() for name, t in network.state_dict().items()}, mapping.UNET, TARGET)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_changes_our_kernels_alike(network, tmp_path, case):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    kind, options = CASES[case]
    base = tree_of(network)
    wrapped = peft.get_peft_model(copy.deepcopy(network), getattr(peft, kind)(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path)
    found = merge({"unet": base}, read_adapter(tmp_path, {"unet": TARGET}))["unet"]
    expected, before = flatten(tree_of(wrapped.merge_and_unload())), flatten(base)
    moved = 0
    for path, leaf in flatten(found).items():
        np.testing.assert_allclose(leaf, expected[path], atol=2e-6, err_msg=path)
        moved += not np.allclose(leaf, before[path], atol=1e-3)
    assert moved >= 5


@pytest.mark.parametrize("cayley", ["reference", "peft"])
def test_our_oft_comes_back(network, tmp_path, cayley):
    adapter, base = oft(4, "attention", cayley), tree_of(network)
    draw = np.random.default_rng(0)
    turn = lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32)
    trainable = jax.tree.map(turn, adapter.init(jax.random.key(0), base))
    write_oft(tmp_path, trainable, cayley)
    found = flatten(merge({"unet": base}, read_adapter(tmp_path, {"unet": TARGET}))["unet"])
    for path, leaf in flatten(adapter.merge(base, trainable)).items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-6, err_msg=path)
