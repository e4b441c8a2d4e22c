"""What PEFT's configuration says of an adapter: families, scales, rotations. tests/parity holds the numbers against PEFT itself."""

import json

import numpy as np
import pytest

from dmsec_jax.checkpoints.adapter_export import write_oft
from dmsec_jax.checkpoints.adapters import merge, read_adapter
from dmsec_jax.checkpoints.diffusers import shapes
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core.trees import flatten, map_paths
from dmsec_jax.models import presets

TARGETS = {"unet": shapes("unet", presets.TINY.unet)}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PATH = LAYER.replace(".0", "_0").replace(".", "/") + "/kernel"
OFT = {"peft_type": "OFT", "use_cayley_neumann": False}
DRAW = np.random.default_rng(0)
BASE = {"unet": map_paths(lambda path, leaf: DRAW.normal(size=leaf.shape).astype(np.float32), TARGETS["unet"])}


def read(folder, factors, config):
    state = {f"base_model.model.{LAYER}.{name}": np.asarray(value, np.float32) for name, value in factors.items()}
    write_tensors(folder / "adapter_model.safetensors", state)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(folder, TARGETS)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(0, 0.3, shape)


WHOLE = {"lokr_w1": random(2, 4), "lokr_w2": random(4, 2)}
LOHA = {"hada_w1_a": random(8, 3), "hada_w1_b": random(3, 8), "hada_w2_a": random(8, 3), "hada_w2_b": random(3, 8)}


@pytest.mark.parametrize(("factors", "config", "ratio"), [
    (LOHA, {"peft_type": "LOHA", "r": 3, "alpha": 6}, 2),
    (LOHA, {"peft_type": "LOHA", "r": 9, "alpha": 6, "rank_pattern": {LAYER: 3}, "alpha_pattern": {"to_q": 9}}, 3),
    (WHOLE, {"peft_type": "LOKR", "r": 4, "alpha": 6}, 1.5),
    (WHOLE, {"peft_type": "LOKR", "r": 4, "alpha": 6, "rank_pattern": {"to_q": 2}}, 3),
    (WHOLE, {"peft_type": "LOKR", "alpha": 6}, 1),
])  # fmt: skip
def test_scales_of_the_other_families(tmp_path, factors, config, ratio):
    (change,) = read(tmp_path, factors, config).changes["unet"].values()
    assert change.ratio == pytest.approx(ratio)


def test_a_rotation_of_inputs_by_the_matrix_equation(tmp_path):
    upper = random(1, 28)
    found = flatten(merge(BASE, read(tmp_path, {"oft_R.weight": upper}, OFT))["unet"])[PATH]
    skew = np.zeros((8, 8))
    skew[np.triu_indices(8, 1)] = upper[0]
    skew -= skew.T
    before = flatten(BASE["unet"])[PATH]
    np.testing.assert_allclose(
        np.linalg.inv(np.eye(8) - skew) @ (np.eye(8) + skew) @ found, before, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), np.linalg.norm(before, axis=0), rtol=1e-5)
    assert np.abs(found - before).max() > 0.1


def test_its_series_approaches_the_inverse(tmp_path):
    """PEFT's two ways turn in opposite directions."""
    upper = 0.1 * random(2, 6)
    exact = flatten(merge(BASE, read(tmp_path, {"oft_R.weight": -upper}, OFT))["unet"])[PATH]
    errors = []
    for terms in (1, 2, 3, 5, 9):
        settings = {"peft_type": "OFT", "num_cayley_neumann_terms": terms}
        found = flatten(merge(BASE, read(tmp_path, {"oft_R.weight": upper}, settings))["unet"])[PATH]
        errors.append(np.abs(found - exact).max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < 1e-2 < errors[0]


@pytest.mark.parametrize(("factors", "config", "message"), [
    ({"oft_R.weight": random(1, 6)}, OFT, "one block for all"),
    ({"oft_R.weight": random(3, 6)}, OFT, r"\[n, m \(m - 1\) / 2\] with n m = 8"),
    ({"oft_R.weight": random(2, 5)}, OFT, "mis-shaped"),
    ({"oft_R.weight": random(6)}, OFT, "mis-shaped"),
    ({"oft_R.weight": random(0, 6)}, OFT, "mis-shaped"),
    ({"oft_R.weight": random(2, 6), "alpha": 1}, OFT, "unused: .*alpha"),
    ({"oft_R.weight": random(2, 6), "oft_blocks": random(2, 4, 4)}, OFT, "unused"),
    ({"oft_R.weight": random(2, 6)}, {"peft_type": "LORA", "lora_alpha": 1}, "without PEFT's configuration of it"),
    ({"oft_R.weight": random(2, 6)}, OFT | {"coft": True}, "coft must be False"),
    ({"oft_R.weight": random(2, 6)}, OFT | {"block_share": "yes"}, "block_share must be true or false"),
    ({"oft_R.weight": random(2, 6)}, OFT | {"num_cayley_neumann_terms": 10**9}, r"terms must be in \[1, 32\]"),
    (LOHA, {"peft_type": "LOHA", "alpha": 1, "r": 0}, "r must be a positive number"),
    (LOHA, {"peft_type": "LOHA", "alpha": 1, "rank_pattern": {".*": 1}}, "rank_pattern must be a table"),
    (LOHA, {"peft_type": "LOHA", "lora_alpha": 1}, "alpha must be a positive number"),
])  # fmt: skip
def test_what_has_no_single_meaning_is_refused(tmp_path, factors, config, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, factors, config)


def test_one_block_for_all(tmp_path):
    one, two = random(1, 6), np.repeat(random(1, 6), 2, 0)
    shared = merge(BASE, read(tmp_path, {"oft_R.weight": one}, OFT | {"block_share": True}))["unet"]
    apart = merge(BASE, read(tmp_path, {"oft_R.weight": two}, OFT))["unet"]
    np.testing.assert_array_equal(flatten(shared)[PATH], flatten(apart)[PATH])


def test_what_we_write_is_read_and_strength_goes_from_base_to_tuned(tmp_path):
    tree = {
        "down_blocks_0": {"attentions_0": {"transformer_blocks_0": {"attn1": {"to_q": {"generator": random(2, 4, 4)}}}}}
    }
    write_oft(tmp_path, tree)
    adapter = read_adapter(tmp_path, TARGETS)
    before, full = flatten(BASE["unet"])[PATH], flatten(merge(BASE, adapter)["unet"])[PATH]
    half = flatten(merge(BASE, adapter, 0.5)["unet"])[PATH]
    np.testing.assert_allclose(half, (before + full) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(full - before).max() > 0.1
