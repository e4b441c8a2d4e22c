"""Meshes of eight virtual devices, `pmap`, and two processes give what one device gives."""

import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec
from meshes import COLLECTIVES, without_talk

from dmsec_jax import parallel
from dmsec_jax.core import pgd, spread, trees
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.methods import advdm, cgi_dm, finextract, membership, spot
from dmsec_jax.models import presets, unet

SCHEDULE = ScheduleConfig()
KEY = jax.random.key(0)
COUNT, SHAPE = 16, (4, 4, 2)

eps_fn = toy.eps_fn_of(toy.alpha_bars())
PARAMS = {
    "base": toy.gaussian(np.zeros(SHAPE), 1.0),
    "tuned": toy.memoriser(np.random.default_rng(0).normal(size=(4, *SHAPE)), 0.1),
}
KNOWN = np.random.default_rng(1).normal(size=(COUNT, *SHAPE)).astype(np.float32)
MASK = np.asarray(cgi_dm.checkerboard(4, 4, 2))
INDEX = np.arange(COUNT)


def pair_fn(params, z_t, t):
    first, second = z_t if isinstance(z_t, tuple) else (z_t, z_t)
    context = toy.empty_context(len(first))
    return eps_fn(params["base"], first, t, context), eps_fn(params["tuned"], second, t, context)


def recover(key, params, known, index):
    cfg = cgi_dm.Config(eps=2.0, alpha=0.2, num_steps=4, num_draws=2)
    state, info = cgi_dm.run(key, known, known * MASK, MASK, index, params, cfg, pair_fn=pair_fn, schedule=SCHEDULE)
    return state.delta, info.contrast.T


def sample(key, params, z_T, index):
    cfg = finextract.Config(w=2.0, num_steps=4)
    state, _ = finextract.run(key, z_T, index, params, cfg, pair_fn=pair_fn, schedule=SCHEDULE)
    return state.sampler.z


def losses(key, params, known, index):
    model = lambda z_t, t: eps_fn(params["tuned"], z_t, t, toy.empty_context(len(z_t)))
    return membership.losses(key, model, known, SCHEDULE, num_draws=4, index=index, draw=draws.stratified_draw)


def encode(params, image):
    return jnp.tanh(2 * image), jnp.full_like(image, -4.0)


def protect(key, params, image, index):
    cfg = advdm.Config(attack=pgd.Config(num_steps=4), num_draws=2)
    model = lambda params, z_t, t: eps_fn(params["tuned"], z_t, t, toy.empty_context(len(z_t)))
    functions = {"objective_fn": advdm.denoising, "encode_fn": encode, "eps_fn": model, "schedule": SCHEDULE}
    image = jnp.tanh(image)
    state, info = advdm.run(key, image, jnp.ones_like(image), 0.0, index, params, cfg, **functions)
    return state.attack.delta, info.value.T


COVARIANCE = np.array([[1, 0.6, 0.3], [0.6, 1, 0.5], [0.3, 0.5, 1]], np.float32)


def search(key, params, known, index):
    """Rows are starts."""
    cfg = spot.Config(num_steps=2, inner_steps=10, refresh=5)
    start = lambda j: spot.run(jax.random.fold_in(key, j), COVARIANCE, 500, spot.guide_mag(np.full((3, 3), 0.5)), cfg)
    state, info = jax.vmap(start)(index)
    return state.directed, state.bidirected, info.score


RUNS = (recover, sample, losses, protect, search)
each_run = pytest.mark.parametrize("run", RUNS)


@pytest.fixture(scope="module")
def alone():
    return {run: jax.device_get(jax.jit(run)(KEY, PARAMS, KNOWN, INDEX)) for run in RUNS}


def assert_same(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@each_run
def test_a_mesh_gives_what_one_device_gives_and_its_devices_do_not_talk(run, alone):
    assert_same(without_talk(run, KEY, PARAMS, KNOWN, INDEX), alone[run])


@each_run
def test_pmap_gives_what_one_device_gives(run, alone):
    found = parallel.pmapped(run, (None, None, 0, 0))(KEY, PARAMS, KNOWN, INDEX)
    assert_same(parallel.joined(found), alone[run])


def test_weights_are_cut_as_planned_and_gathered_where_they_are_used():
    mesh = parallel.make_mesh("data=2,fsdp=4")
    params = {"dense": {"kernel": jnp.ones((256, 512)), "bias": jnp.ones(512)}, "odd": {"kernel": jnp.ones((300, 301))}}
    shardings = parallel.plan(params, mesh)
    specs = {path: where.spec for path, where in trees.flatten(shardings).items()}
    assert specs == {
        "dense/kernel": PartitionSpec(None, "fsdp"),
        "dense/bias": PartitionSpec(),
        "odd/kernel": PartitionSpec("fsdp", None),
    }
    assert parallel.bytes_per_device(params, shardings) == 4 * (256 * 128 + 512 + 75 * 301)
    params = jax.device_put(params, shardings)
    x = parallel.shard_rows(np.ones((16, 256), np.float32), mesh)

    def loss(params, x):
        whole = spread.whole(params)
        return jnp.square(x @ whole["dense"]["kernel"] + whole["dense"]["bias"]).mean()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, x).compile()
    assert set(COLLECTIVES.findall(step.as_text())) <= {"all-gather", "all-reduce", "reduce-scatter"}
    found, expected = step(params, x), jax.grad(loss)(params, x)
    assert_same(parallel.to_host(found), jax.device_get(expected))
    assert found["dense"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp")


def test_a_plan_divides_the_memory_of_stable_diffusion():
    params = jax.eval_shape(partial(unet.init, cfg=presets.SD15.unet), KEY)
    mesh = parallel.make_mesh("fsdp=8")
    share = parallel.bytes_per_device(params, parallel.plan(params, mesh)) / (4 * trees.count(params))
    assert 1 / 8 < share < 1 / 8 + 0.005


def test_one_axis_is_enough():
    assert parallel.make_mesh().shape == {"data": 8, "fsdp": 1}
    assert parallel.make_mesh(" fsdp=8").shape == {"data": 1, "fsdp": 8}
    assert parallel.make_mesh("data=2", jax.devices()[:2]).size == 2


@pytest.mark.parametrize(("call", "message"), [
    (lambda: parallel.make_mesh("data=3"), "mesh must be of 8 devices, got data=3"),
    (lambda: parallel.make_mesh("date=8"), "mesh must be like data=8,fsdp=4"),
    (lambda: parallel.make_mesh("data=-8"), "mesh must be like data=8,fsdp=4"),
    (lambda: parallel.make_mesh("data=8,fsdp"), "mesh must be like data=8,fsdp=4"),
    (lambda: parallel.shard_rows(np.ones((12, 2)), parallel.make_mesh()), "rows must be a multiple of 8 devices"),
    (lambda: parallel.own_rows(12, parallel.make_mesh()), "rows must be a multiple of 8 devices"),
    (lambda: parallel.pmapped(recover, (None, None, 0, 0))(KEY, PARAMS, KNOWN[:3], INDEX[:3]), "rows must be a multiple of 8 devices"),
    (lambda: parallel.initialize("localhost:1"), "must be all three or none"),
    (lambda: parallel.initialize("localhost:1", 2, 2), "process_id must be from 0 to 1, got 2"),
    (lambda: parallel.initialize("localhost:1", 2, 1, auto=True), "none where the cluster is asked"),
])  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_processes_give_what_one_device_gives(alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": Path(__file__).parent}
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, coordinator, str(i), str(tmp_path)], **pipes) for i in range(2)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as found:
            for run, expected in alone.items():
                for j, leaf in enumerate(jax.tree.leaves(expected)):
                    np.testing.assert_allclose(found[f"{run.__name__}{j}"], leaf, rtol=1e-4, atol=1e-5)


CHILD = """
import sys
import jax
from dmsec_jax import parallel

jax.config.update("jax_num_cpu_devices", 4)
parallel.initialize(sys.argv[1], 2, int(sys.argv[2]))

import test_parallel

test_parallel.one_of_two(int(sys.argv[2]), sys.argv[3])
"""


def one_of_two(process, folder):
    """What each of two processes runs: it holds half of the rows, and writes the whole result."""
    mesh = parallel.make_mesh()
    own = parallel.own_rows(COUNT, mesh)
    assert own == slice(8 * process, 8 * process + 8)
    known, index = parallel.from_own_rows((KNOWN[own], INDEX[own]), mesh)
    params = parallel.replicate(PARAMS, mesh)
    results = {}
    for run in RUNS:
        found = parallel.to_host(jax.jit(run)(KEY, params, known, index))
        results |= {f"{run.__name__}{j}": leaf for j, leaf in enumerate(jax.tree.leaves(found))}
    np.savez(Path(folder) / f"{process}.npz", **results)
    jax.distributed.shutdown()
