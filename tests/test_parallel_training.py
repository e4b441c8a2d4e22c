"""Training on meshes of eight virtual devices and under `pmap` is training on one device, in place and with one program."""

import contextlib
import dataclasses
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import COLLECTIVES

from dmsec_jax import parallel, tuning
from dmsec_jax.causal import sem, skeleton
from dmsec_jax.core import spread
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import dreambooth, driver
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.finetune.lora import lora
from dmsec_jax.methods import bayes_dm
from dmsec_jax.models import skeleton_net

SCHEDULE = ScheduleConfig()
KEY = jax.random.key(0)

WIDE = 256  # a kernel of spread.SMALL entries
TUNED = {"net": {"kernel": 0.05 * jax.random.normal(KEY, (WIDE, WIDE)), "bias": jnp.zeros(WIDE)}}
DATA = Data(examples(jax.random.normal(jax.random.key(1), (8, 2, 2, WIDE)), jnp.zeros((8, 1, 1))))
CFG = dreambooth.Config(num_steps=3, batch_size=8, accumulation=2, learning_rate=1e-2, sample_posterior=False)
CFG = dataclasses.replace(CFG, adam_epsilon=1e-3)  # or Adam makes whole steps of gradients that are rounding errors
BAYES = bayes_dm.Config(**vars(CFG), selection=("kernel$",), sigma_rate=1e-3, sigma0=0.1, kl_weight=0.1)
NETWORK = {
    "eps_fn": lambda params, z_t, t, context: jnp.tanh(z_t @ params["net"]["kernel"] + params["net"]["bias"]),
    "schedule": SCHEDULE,
}
LORA = lora(4, targets=["kernel$"])


def tune_plain(key, state, data, params, axis_name=None):
    return dreambooth.run(key, state, data, params, CFG, adapter=full(), axis_name=axis_name, **NETWORK)


def tune_lora(key, state, data, params, axis_name=None):
    return dreambooth.run(key, state, data, params, CFG, adapter=LORA, axis_name=axis_name, **NETWORK)


def tune_bayes(key, state, data, params, axis_name=None):
    options = {"num_steps": 3, "adapter": full(), "axis_name": axis_name}
    return bayes_dm.advance(key, state, data, params, BAYES, **options, **NETWORK)


def assert_same(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def assert_twin_is_alone(tune, args, alone):
    """`tune(key, state, ...)` under `pmap`, the state on every device: each ends with what one device has."""
    key, state, *others = args
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), state)
    in_axes = (None, 0, *[None] * len(others))
    twin = jax.pmap(partial(tune, axis_name="rows"), axis_name="rows", in_axes=in_axes)
    for_each = jax.device_get(twin(key, copies, *others))
    for device in (0, 7):
        assert_same(jax.tree.map(operator.itemgetter(device), for_each), alone)


@pytest.mark.parametrize(
    ("tune", "begin", "kernels"),
    [
        (tune_plain, partial(dreambooth.init, cfg=CFG, adapter=full()), 3),  # weights and both moments
        (tune_lora, partial(dreambooth.init, cfg=CFG, adapter=LORA), 0),
        (tune_bayes, partial(bayes_dm.init, cfg=BAYES, adapter=full()), 3),
    ],
)
def test_training_on_a_mesh_or_under_pmap_is_training_on_one_device(tune, begin, kernels):
    state = begin(KEY, TUNED)
    alone = jax.device_get(jax.jit(tune)(KEY, state, DATA, TUNED))
    assert_twin_is_alone(tune, (KEY, state, DATA, TUNED), alone)

    mesh = parallel.make_mesh("data=2,fsdp=4")
    shardings = parallel.plan((state, TUNED), mesh)
    cut, params = jax.device_put((state, TUNED), shardings)
    with jax.set_mesh(mesh):
        jitted = jax.jit(tune, out_shardings=(shardings[0], None), donate_argnums=1)
        compiled = jitted.lower(KEY, cut, parallel.replicate(DATA, mesh), params).compile()
    text = compiled.as_text()
    assert set(COLLECTIVES.findall(text)) <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert "all-reduce" in text or "reduce-scatter" in text, "gradients are summed over devices"
    given = parallel.bytes_per_device(cut, shardings[0])
    assert compiled.memory_analysis().alias_size_in_bytes == given, "weights and moments are written in place"
    found, info = compiled(KEY, cut, parallel.replicate(DATA, mesh), params)
    large = [leaf for leaf in jax.tree.leaves(found) if leaf.shape == (WIDE, WIDE)]
    assert len(large) >= kernels
    assert all(leaf.sharding.shard_shape(leaf.shape) == (WIDE, WIDE // 4) for leaf in large)
    assert_same(parallel.to_host((found, info)), alone)


def of_four():
    return parallel.make_mesh("data=4", jax.devices()[:4])


@pytest.mark.parametrize(
    ("tune", "begin"),
    [
        (tune_plain, partial(dreambooth.init, cfg=CFG, adapter=full())),
        (tune_lora, partial(dreambooth.init, cfg=CFG, adapter=LORA)),
        (tune_bayes, partial(bayes_dm.init, cfg=BAYES, adapter=full())),
    ],
)
def test_devices_that_hold_all_weights_sum_their_gradients_at_the_end_of_a_step(tune, begin, monkeypatch):
    state = begin(KEY, TUNED)
    alone = jax.device_get(jax.jit(tune)(KEY, state, DATA, TUNED))
    plain, rows = NETWORK["eps_fn"], set()
    monkeypatch.setitem(NETWORK, "eps_fn", lambda params, z_t, *rest: rows.add(len(z_t)) or plain(params, z_t, *rest))
    mesh = of_four()
    args = parallel.replicate((KEY, state, DATA, TUNED), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(tune).lower(*args).compile()
    assert rows == {2}, "each device computes its own of the eight of a microbatch, and the compiler sums nothing"
    assert COLLECTIVES.findall(compiled.as_text()) == ["all-reduce"], "of all gradients at once"
    assert_same(jax.device_get(compiled(*args)), alone)


def test_rows_that_are_drawn_at_once_are_left_to_the_compiler():
    cfg = dataclasses.replace(BAYES, noise="activations", accumulation=1)
    shapes = []

    def noisy(params, sigma, key, z_t, t, context):
        shapes.append(z_t.shape)
        noise = jax.random.normal(key, z_t.shape)  # of every row its own
        return NETWORK["eps_fn"](params, z_t, t, context) + sigma["net"]["kernel"].mean() * noise

    def tune(key, state, data, params):
        options = {"num_steps": 2, "adapter": full(), "noisy_fn": noisy}
        return bayes_dm.advance(key, state, data, params, cfg, **options, **NETWORK)

    state = bayes_dm.init(KEY, TUNED, cfg, adapter=full())
    alone = jax.device_get(jax.jit(tune)(KEY, state, DATA, TUNED))
    mesh = of_four()
    with jax.set_mesh(mesh):
        found = jax.jit(tune)(*parallel.replicate((KEY, state, DATA, TUNED), mesh))
    assert set(shapes) == {(8, 2, 2, WIDE)}
    assert_same(jax.device_get(found), alone)


def test_leaves_of_any_type_and_size_are_summed_over_devices():
    def tree(i):
        sizes = {"brief": (3, 2), "one": (), "long": (spread.BRIEF,), "none": (0, 4)}
        floats = {name: jnp.full(shape, i + 0.5) for name, shape in sizes.items()}
        return floats | {"half": jnp.full(5, i, jnp.bfloat16), "count": jnp.full((2, 2), i, jnp.int32)}

    found = jax.pmap(lambda i: spread.summed(tree(i), "d"), axis_name="d")(jnp.arange(8))
    for name, leaf in tree(0).items():
        assert found[name].shape == (8, *leaf.shape)
        assert found[name].dtype == leaf.dtype
        assert (found[name] == (28 if name in ("half", "count") else 32)).all()


DRIVEN = pytest.mark.parametrize(
    ("method", "cfg", "adapter"),
    [(driver.DREAMBOOTH, CFG, full()), (driver.DREAMBOOTH, CFG, LORA), (tuning.BAYES, BAYES, full())],
    ids=["weights", "lora", "posterior"],
)


@DRIVEN
def test_ten_steps_of_the_driver_on_a_mesh_are_one_program(method, cfg, adapter):
    ten = dataclasses.replace(cfg, num_steps=10)
    before = driver._advance._cache_size()
    with jax.set_mesh(parallel.make_mesh("data=2,fsdp=4")):
        outcome = driver.fit(
            KEY, *parallel.placed((DATA, TUNED)), ten, adapter=adapter, method=method, chunk_steps=1, **NETWORK
        )
    assert len(outcome.past.info.loss) == 10
    assert driver._advance._cache_size() == before + 1


@DRIVEN
@pytest.mark.parametrize("axes", [None, "data=2,fsdp=4"])
def test_the_driver_writes_weights_and_moments_in_place(method, cfg, adapter, axes):
    mesh = contextlib.nullcontext() if axes is None else jax.set_mesh(parallel.make_mesh(axes))
    with mesh:
        data, params = parallel.placed((DATA, TUNED))
        state = driver._init(KEY, params, cfg, method=method, adapter=adapter)
        options = {"method": method, "adapter": adapter, "text_fn": None, "num_steps": 2, **NETWORK}
        compiled = driver._advance.lower(KEY, state, data, params, cfg, **options).compile()
    own = parallel.bytes_per_device(state, jax.tree.map(lambda leaf: leaf.sharding, state))
    assert compiled.memory_analysis().alias_size_in_bytes == own


POSTERIOR = skeleton.Config(num_steps=4, pairs=240, sizes=(6,), rows=(200, 2000))  # 16 data sets an update
NET = skeleton_net.EdgeMLP(width=8, depth=1)


def learn(key, state, axis_name=None):
    update = skeleton.updating(sem.SPOT, NET, POSTERIOR, axis_name=axis_name)
    return jax.lax.scan(lambda state, i: update(state, jax.random.fold_in(key, i), 6), state, jnp.arange(3))


def test_the_posterior_over_skeletons_is_learnt_by_all_devices_together():
    state = skeleton.init(KEY, NET, POSTERIOR)
    of = lambda result: (result[0].optim_state, result[1])  # all but the key
    alone = jax.device_get(of(jax.jit(learn)(KEY, state)))
    assert_twin_is_alone(lambda *args, **axis: of(learn(*args, **axis)), (KEY, state), alone)
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        compiled = jax.jit(learn).lower(KEY, parallel.replicate(state, mesh)).compile()
    assert "all-reduce" in set(COLLECTIVES.findall(compiled.as_text())) <= {"all-reduce", "all-gather"}
    assert_same(jax.device_get(of(compiled(KEY, parallel.replicate(state, mesh)))), alone)


def test_ten_updates_of_the_posterior_on_a_mesh_are_one_program():
    update = skeleton.updating(sem.SPOT, NET, POSTERIOR)

    @partial(jax.jit, static_argnames="size", donate_argnames="state")
    def advance(state, key, size):
        state, loss = update(state, key, size)
        return spread.cut(state), spread.whole(loss)

    compiled, programs = (
        [],
        [],
    )  # not `_cache_size`, which counts a state that holds a typed key twice without compiling it again
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: name == event and compiled.append(name))
    with jax.set_mesh(parallel.make_mesh()):
        state = parallel.placed(skeleton.init(KEY, NET, POSTERIOR))
        for i in range(10):
            state, _ = advance(state, jax.random.fold_in(KEY, i), size=6)
            programs.append(len(compiled))
    assert programs == [programs[0]] * 10
    assert programs[0] > 0


def test_rows_that_devices_cannot_share_are_refused():
    odd = dataclasses.replace(CFG, batch_size=6)
    state = dreambooth.init(KEY, TUNED, odd, adapter=full())
    with (
        jax.set_mesh(parallel.make_mesh()),
        pytest.raises(ValueError, match="batch must be a multiple of 8, the devices"),
    ):
        jax.jit(partial(dreambooth.run, cfg=odd, adapter=full(), **NETWORK))(KEY, state, DATA, TUNED)
