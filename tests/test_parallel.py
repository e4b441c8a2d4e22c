"""Meshes of eight virtual devices, `pmap`, and two processes give what one device gives."""

import dataclasses
import re
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

from dmsec_jax import parallel
from dmsec_jax.core import spread, trees
from dmsec_jax.diffusion import draws
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.methods import bayes_dm, cgi_dm, finextract, membership
from dmsec_jax.models import presets, unet

COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
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


each_run = pytest.mark.parametrize("run", [recover, sample, losses])


@pytest.fixture(scope="module")
def alone():
    return {run: jax.device_get(jax.jit(run)(KEY, PARAMS, KNOWN, INDEX)) for run in (recover, sample, losses)}


def assert_same(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@each_run
def test_a_mesh_gives_what_one_device_gives_and_its_devices_do_not_talk(run, alone):
    mesh = parallel.make_mesh("data=4,fsdp=2")
    known, index = parallel.shard_rows((KNOWN, INDEX), mesh)
    params = parallel.replicate(PARAMS, mesh)
    compiled = jax.jit(run).lower(KEY, params, known, index).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    found = compiled(KEY, params, known, index)
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 2 for leaf in jax.tree.leaves(found))
    assert_same(parallel.to_host(found), alone[run])


@each_run
def test_pmap_gives_what_one_device_gives(run, alone):
    found = parallel.pmapped(run, (None, None, 0, 0))(KEY, PARAMS, KNOWN, INDEX)
    assert_same(parallel.joined(found), alone[run])


WIDE = 256  # a kernel of spread.SMALL entries
TUNED = {"net": {"kernel": 0.05 * jax.random.normal(KEY, (WIDE, WIDE)), "bias": jnp.zeros(WIDE)}}
DATA = Data(examples(jax.random.normal(jax.random.key(1), (8, 2, 2, WIDE)), jnp.zeros((8, 1, 1))))
CFG = dreambooth.Config(num_steps=3, batch_size=8, accumulation=2, learning_rate=1e-2, sample_posterior=False)
CFG = dataclasses.replace(CFG, adam_epsilon=1e-3)  # or Adam makes whole steps of gradients that are rounding errors
BAYES = bayes_dm.Config(**vars(CFG), selection=("kernel$",), sigma_rate=1e-3, sigma0=0.1, kl_weight=0.1)
NETWORK = {
    "eps_fn": lambda params, z_t, t, context: jnp.tanh(z_t @ params["net"]["kernel"] + params["net"]["bias"]),
    "adapter": full(),
    "schedule": SCHEDULE,
}


def tune_plain(key, state, data, params, axis_name=None):
    return dreambooth.run(key, state, data, params, CFG, axis_name=axis_name, **NETWORK)


def tune_bayes(key, state, data, params, axis_name=None):
    return bayes_dm.advance(key, state, data, params, BAYES, num_steps=3, axis_name=axis_name, **NETWORK)


each_training = pytest.mark.parametrize(
    ("tune", "init", "cfg"), [(tune_plain, dreambooth.init, CFG), (tune_bayes, bayes_dm.init, BAYES)]
)


@each_training
def test_training_on_a_mesh_or_under_pmap_is_training_on_one_device(tune, init, cfg):
    state = init(KEY, TUNED, cfg, adapter=full())
    alone = jax.device_get(jax.jit(tune)(KEY, state, DATA, TUNED))
    mesh = parallel.make_mesh("data=2,fsdp=4")
    shardings = parallel.plan((state, TUNED), mesh)
    cut, params = jax.device_put((state, TUNED), shardings)
    with jax.set_mesh(mesh):
        jitted = jax.jit(tune, out_shardings=(shardings[0], None))
        compiled = jitted.lower(KEY, cut, parallel.replicate(DATA, mesh), params).compile()
    text = compiled.as_text()
    assert set(COLLECTIVES.findall(text)) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are summed over devices"
    found, info = compiled(KEY, cut, parallel.replicate(DATA, mesh), params)
    kernels = [leaf for leaf in jax.tree.leaves(found) if leaf.shape == (WIDE, WIDE)]
    assert len(kernels) >= 3, "weights and both moments"
    assert all(leaf.sharding.shard_shape(leaf.shape) == (WIDE, WIDE // 4) for leaf in kernels)
    assert_same(parallel.to_host((found, info)), alone)

    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), state)
    twin = jax.pmap(partial(tune, axis_name="rows"), axis_name="rows", in_axes=(None, 0, None, None))
    for_each = jax.device_get(twin(KEY, copies, DATA, TUNED))
    for device in (0, 7):
        assert_same(jax.tree.map(lambda leaf: leaf[device], for_each), alone)  # noqa: B023


def test_rows_that_devices_cannot_share_are_refused():
    odd = dataclasses.replace(CFG, batch_size=6)
    state = dreambooth.init(KEY, TUNED, odd, adapter=full())
    with (
        jax.set_mesh(parallel.make_mesh()),
        pytest.raises(ValueError, match="batch must be a multiple of 8, the devices"),
    ):
        jax.jit(partial(dreambooth.run, cfg=odd, **NETWORK))(KEY, state, DATA, TUNED)


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
    for run in (recover, sample, losses):
        found = parallel.to_host(jax.jit(run)(KEY, params, known, index))
        results |= {f"{run.__name__}{j}": leaf for j, leaf in enumerate(jax.tree.leaves(found))}
    np.savez(Path(folder) / f"{process}.npz", **results)
    jax.distributed.shutdown()
