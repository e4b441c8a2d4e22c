"""A model whose weights are cut over `fsdp` computes, is tuned and is written as one that lies on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from processes import in_two

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


def test_two_processes_hold_a_half_each_and_write_the_whole(tiny_folder, tiny_pipeline, tmp_path):
    ended = in_two(CHILD, str(tiny_folder), str(tmp_path / "model"))
    assert [process.returncode for process in ended] == [0, 0], ended
    close(pipeline.load(tmp_path / "model").params, tiny_pipeline.params, 0)
    close(np.load(tmp_path / "context.npy"), pipeline.contexts(tiny_pipeline, [PROMPT]), 1e-5)


CHILD = """
import sys
from pathlib import Path
import jax
import numpy as np
from dmsec_jax import launch, pipeline
from dmsec_jax.core import spread

spread.SMALL = 64
where, i, folder, out = sys.argv[1:]
with launch.on(launch.Devices(mesh="fsdp=2", coordinator=where, num_processes=2, process_id=int(i))):
    model = pipeline.load(folder)
    kernel = model.params["unet"]["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.nbytes * 2 == kernel.nbytes
    context = np.asarray(pipeline.contexts(model, ["a red dog"]))
    pipeline.save(out, model)
    if i == "0":
        np.save(Path(out).parent / "context.npy", context)
"""


@pytest.mark.slow  # compiles a training twice
@pytest.mark.parametrize("kind", [
    pytest.param({}, id="full"),
    pytest.param({"lora": {"rank": 2}}, marks=pytest.mark.long, id="lora"),
])  # fmt: skip
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
