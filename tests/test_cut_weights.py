"""A model whose weights are cut over `fsdp` computes, is tuned and is written as one that lies on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from dmsec_jax import parallel, pipeline, tuning
from dmsec_jax.core import config, spread
from dmsec_jax.data import images

PROMPT = "a red dog"
KEY = jax.random.key(0)


@pytest.fixture
def mesh(monkeypatch):
    monkeypatch.setattr(spread, "SMALL", 64)  # so that weights of this size are cut
    return parallel.make_mesh("data=2,fsdp=4")


def bytes_of_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def close(found, expected, atol):
    found, expected = jax.device_get((found, expected))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=atol), found, expected)


def test_a_device_holds_a_share_and_all_of_them_compute_the_same(tiny_folder, tiny_pipeline, pictures, mesh):
    known = images.read_folder(pictures, 16).images
    asked = lambda model: (pipeline.encode(model, known), pipeline.sample(KEY, model, PROMPT, 3, num_steps=2))
    expected = asked(tiny_pipeline)
    with jax.set_mesh(mesh):
        cut = pipeline.load(tiny_folder)
        found = asked(cut)
    for part, tree in tiny_pipeline.params.items():
        assert bytes_of_a_device(cut.params[part]) < 0.4 * bytes_of_a_device(tree), part
    close(cut.params, tiny_pipeline.params, 0)
    close(found, expected, 1e-4)


@pytest.mark.slow  # compiles a training twice
@pytest.mark.parametrize("kind", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_tuned_model_stays_cut_and_is_written_whole(kind, tiny_folder, tiny_pipeline, pictures, mesh, tmp_path):
    tune = {"num_steps": 2, "batch_size": 8, "adam_epsilon": 1e-3}
    recipe, known = config.from_dict(tuning.Recipe, {"tune": tune} | kind), images.read_folder(pictures, 16).images
    expected = tuning.tune(KEY, tiny_pipeline, known, [PROMPT], recipe)
    with jax.set_mesh(mesh):
        tuned = tuning.tune(KEY, pipeline.load(tiny_folder), known, [PROMPT], recipe)
        pipeline.save(tmp_path / "model", dataclasses.replace(tiny_pipeline, params=tuned.params))
    plan = parallel.plan(tuned.params, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, tuned.params, plan))
    close(tuned.trainable, expected.trainable, 2e-5)
    close(pipeline.load(tmp_path / "model").params, expected.params, 2e-5)
