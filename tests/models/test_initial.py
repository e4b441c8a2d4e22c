import itertools

import jax
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import clip, presets, unet, vae

NETWORKS = [
    pytest.param(unet.init, presets.TINY.unet, marks=pytest.mark.slow, id="unet"),  # compiles for long
    pytest.param(vae.init, presets.TINY.vae, marks=pytest.mark.slow, id="vae"),
    pytest.param(clip.init, presets.TINY.text, id="text"),
]


@pytest.mark.parametrize(("init", "cfg"), NETWORKS)
def test_norms_start_as_identities_and_every_kernel_is_its_own_draw(init, cfg):
    params = trees.flatten(init(jax.random.key(3), cfg))
    assert {leaf.dtype for leaf in params.values()} == {np.dtype("float32")}
    drawn = {path: leaf for path, leaf in params.items() if path.endswith(("kernel", "embedding"))}
    for path in params.keys() - drawn.keys():
        np.testing.assert_array_equal(params[path], float(path.endswith("scale")), err_msg=path)
    unit = [np.ravel(leaf) / np.std(leaf) for leaf in drawn.values() if leaf.size >= 64]
    for a, b in itertools.pairwise(unit):
        n = min(a.size, b.size)
        assert abs(np.mean(a[:n] * b[:n])) < 5 * n**-0.5  # 5 standard errors of the correlation of independent draws


def test_deviations_keep_the_variance_of_activations():
    params = trees.flatten(unet.init(jax.random.key(0), presets.TINY.unet))
    kernels = [leaf for path, leaf in params.items() if path.endswith("kernel") and leaf.size > 500]
    assert kernels
    for leaf in kernels:
        fan_in = leaf.size // leaf.shape[-1]
        assert np.std(leaf) * fan_in**0.5 == pytest.approx(1, abs=5 * (2 * leaf.size) ** -0.5)


def test_text_encoder_starts_with_the_deviations_of_the_reference():
    cfg = presets.TINY.text
    expected = {
        "embeddings/token_embedding/embedding": 0.02,
        "encoder/layers_0/self_attn/q_proj/kernel": (2 * 8 * 2) ** -0.5,
        "encoder/layers_1/self_attn/out_proj/kernel": 8**-0.5,
        "encoder/layers_1/mlp/fc1/kernel": (2 * 8) ** -0.5,
        "encoder/layers_1/mlp/fc2/kernel": (2 * 8 * 2) ** -0.5,
    }
    params = trees.flatten(clip.init(jax.random.key(0), cfg))
    for path, std in expected.items():
        assert np.std(params[path]) == pytest.approx(std, rel=4 * (2 * params[path].size) ** -0.5), path


def test_same_key_same_parameters():
    cfg = presets.TINY.text
    first, again, other = (clip.init(jax.random.key(seed), cfg) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    path = "embeddings/token_embedding/embedding"
    assert not np.allclose(trees.flatten(first)[path], trees.flatten(other)[path])
