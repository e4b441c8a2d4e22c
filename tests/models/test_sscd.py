"""SSCD without PyTorch: published sizes, unit descriptors, named preprocessing."""

import jax
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import sscd

TINY = sscd.Config(blocks=(1, 1, 1, 1), width=4, groups=2, group_width=32, dims=6)


@pytest.mark.parametrize(("cfg", "trunk"), [(sscd.DISC_MIXUP, 23_508_032), (sscd.DISC_LARGE, 42_128_704)])
def test_trunks_have_the_published_size(cfg, trunk):
    leaves = trees.flatten(jax.eval_shape(lambda: sscd.init(jax.random.key(0), cfg)))
    size = lambda path: int(np.prod(leaves[path].shape))
    kernels = sum(size(path) for path in leaves if path.endswith("kernel") and not path.startswith("fc"))
    biases = sum(size(path) for path in leaves if path.endswith("bias") and not path.startswith("fc"))
    assert kernels + 2 * biases == trunk  # a batch norm has two trained parameters per channel
    assert leaves["fc/kernel"].shape == (2048, cfg.dims)


def test_descriptors_have_unit_length_and_depend_on_the_preprocessing(weights):
    params = weights(sscd.init, TINY)
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    embed = jax.jit(sscd.embed, static_argnums=0, static_argnames="preprocessing")
    found = {name: embed(TINY, params, pictures, preprocessing=name) for name in sscd.PREPROCESSINGS}
    for descriptors in found.values():
        np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, rtol=1e-5)
    assert np.abs(found["sscd-288-imagenet"] - found["dcr-256-224-half"]).max() > 1e-3


def test_preprocessed_shapes():
    shape = lambda name: (
        jax.eval_shape(lambda x: sscd.preprocess(x, name), jax.ShapeDtypeStruct((1, 64, 96, 3), "float32")).shape
    )
    assert shape("sscd-288-imagenet") == (1, 288, 432, 3)
    assert shape("dcr-256-224-half") == (1, 224, 224, 3)
    with pytest.raises(ValueError, match="one of sscd-288-imagenet, dcr-256-224-half, got 'other'"):
        sscd.preprocess(np.zeros((1, 8, 8, 3), np.float32), "other")
