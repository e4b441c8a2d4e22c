import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion.loss import snr
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.dreambooth import Config, averaged, check, draw, losses
from dmsec_jax.finetune.examples import Data, Examples
from dmsec_jax.finetune.lora import lora

KEY = jax.random.key(0)
CFG = Config(num_steps=6, batch_size=2, accumulation=2, learning_rate=1e-2, ema_decay=0.5, sample_posterior=False)
FLAT = Config(num_steps=8, learning_rate=0.1, sample_posterior=False, clip_norm=1.5, weight_decay=0.2)
SAMPLE = ScheduleConfig(prediction_type="sample")
STATIC = ("eps_fn", "adapter", "schedule", "text_fn")
init = partial(dreambooth.init, KEY)
step = jax.jit(dreambooth.step, static_argnames=STATIC)
run = jax.jit(dreambooth.run, static_argnames=(*STATIC, "num_steps"))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def finished(case, cfg, data, **more):
    network = case.network | more
    return run(KEY, init(case.params, cfg, adapter=network["adapter"]), data, case.params, cfg, **network)


# Corruption and the loss of each example


@pytest.mark.slow  # compiles for long
def test_corruption_samples_posterior_flip_and_window():
    """100 ramps known exactly, to see flips; 300 level pictures of variance 1/4, to see the posterior."""
    ramp = jnp.broadcast_to(jnp.arange(4.0), (100, 4, 4))[..., None]
    mean = jnp.concatenate([ramp, jnp.full((300, 4, 4, 1), 2.0)])
    logvar = jnp.concatenate([jnp.full(ramp.shape, -200.0), jnp.full((300, 4, 4, 1), jnp.log(0.25))])
    batch = Examples(mean, jnp.zeros((400, 1, 1)), logvar)
    cfg, keys = Config(horizontal_flip=True, t_min=2, t_max=6), jax.random.split(KEY, 400)
    corrupt = jax.jit(dreambooth.corrupt, static_argnames="schedule")
    z0, t, noise = corrupt(keys, batch, cfg, schedule=ScheduleConfig())

    assert set(np.unique(t).tolist()) == {2, 3, 4, 5}
    flipped = np.all(z0[:100] == ramp[:, :, ::-1], axis=(1, 2, 3))
    assert 30 < flipped.sum() < 70
    np.testing.assert_array_equal(z0[:100][~flipped], ramp[:1].repeat((~flipped).sum(), 0))
    scaled = (z0[100:] - 2.0) * 2.0
    for draws in (scaled, noise):  # 5 standard errors of mean and variance
        assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
        assert abs(draws.var() - 1) < 5 * np.sqrt(2 / draws.size)
    assert abs((scaled * noise[100:]).mean()) < 5 / np.sqrt(scaled.size)  # two draws, not one

    again = corrupt(keys[7:8], jax.tree.map(lambda leaf: leaf[7:8], batch), cfg, schedule=ScheduleConfig())
    for part, whole in zip(again, (z0, t, noise), strict=True):  # an example depends on its own key alone
        np.testing.assert_array_equal(part, whole[7:8])


def squares(cfg, value, z0):
    """Losses of a network that predicts z_0 to be `value(t)`: the mean of (value(t) - z0)^2."""
    batch, keys = Examples(z0, jnp.zeros((len(z0), 1, 1))), jax.random.split(KEY, len(z0))
    eps_fn = lambda params, z_t, t, context: jnp.broadcast_to(value(t), z_t.shape)
    return jax.jit(partial(losses, eps_fn=eps_fn, schedule=SAMPLE))(keys, batch, {}, cfg)


def test_mean_latents_are_taken_as_they_are_where_nothing_is_sampled():
    z0 = jnp.arange(6.0).reshape(3, 1, 2, 1)
    cfg = Config(sample_posterior=False)
    np.testing.assert_allclose(squares(cfg, lambda t: jnp.zeros(()), z0), np.mean(z0**2, axis=(1, 2, 3)))


def test_min_snr_weight_multiplies_the_loss():
    z0, cfg = jnp.zeros((50, 1, 1, 1)), Config(sample_posterior=False)
    itself = lambda t: 1.0 * t[:, None, None, None]
    plain = squares(cfg, itself, z0)  # t^2
    weighted = squares(dataclasses.replace(cfg, min_snr_gamma=0.1), itself, z0)
    t = jnp.round(jnp.sqrt(plain)).astype(jnp.int32)
    weight = np.minimum(snr(alpha_bars(ScheduleConfig()), t), 0.1)
    assert len(np.unique(weight)) > 10
    np.testing.assert_allclose(weighted, plain * weight, rtol=1e-5)


@pytest.mark.parametrize("window", [(5, 5), (-1, 5), (0, 1001)])
def test_window_outside_the_schedule_raises(window):
    cfg = Config(t_min=window[0], t_max=window[1], sample_posterior=False)
    with pytest.raises(ValueError, match=r"must be a range within \[0, 1000\]"):
        squares(cfg, lambda t: t, jnp.zeros((1, 1, 1, 1)))


def test_sampling_a_posterior_that_is_not_known_raises():
    with pytest.raises(ValueError, match="logvar must be given"):
        squares(Config(), lambda t: t, jnp.zeros((1, 1, 1, 1)))


# Steps against their formulas: the loss is a parabola, so every gradient is known


def by_hand(values, cfg, prior=0.0, gammas=(0.9, 0.999)):
    """Levels, averages and gradient norms of AdamW on mean (level - values)^2 + prior_weight (level - prior)^2."""
    level = average = first = second = 0.0
    rows = []
    for i in range(cfg.num_steps):
        grad = 2 * np.mean(level - values) + cfg.prior_weight * 2 * (level - prior)
        clipped = grad * min(1, cfg.clip_norm / (abs(grad) + 1e-6))
        first = gammas[0] * first + (1 - gammas[0]) * clipped
        second = gammas[1] * second + (1 - gammas[1]) * clipped**2
        rate = cfg.learning_rate * min(1, (i + 1) / max(cfg.warmup_steps, 1))
        moment, spread = first / (1 - gammas[0] ** (i + 1)), second / (1 - gammas[1] ** (i + 1))
        level -= rate * (moment / (np.sqrt(spread) + 1e-8) + cfg.weight_decay * level)
        decay = min(cfg.ema_decay or 0, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * level
        rows.append(abs(grad))
    return level, average, rows


@pytest.mark.parametrize(
    "fields",
    [{"ema_decay": 0.3, "warmup_steps": 5}, {"batch_size": 2, "accumulation": 3}],
    ids=str,
)
def test_steps_follow_adamw_clipping_warm_up_and_average(flat, fields):
    cfg = dataclasses.replace(FLAT, **fields)
    values = [1.0, 3.0, 5.0] if cfg.batch_size == 2 else [3.0] * 3  # a batch of six holds two epochs
    cfg_alone = dataclasses.replace(cfg, prior_weight=0.0)
    state, info = finished(flat, cfg_alone, Data(flat.pictures(values)))
    level, average, norms = by_hand(np.array(values), cfg_alone)
    np.testing.assert_allclose(state.trainable["level"], level, rtol=1e-5)
    np.testing.assert_allclose(averaged(state)["level"], average if cfg.ema_decay else level, rtol=1e-5)
    np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-5)
    assert (info.prior_loss == 0).all()
    np.testing.assert_allclose(info.loss[0], np.mean(np.square(values)), rtol=1e-5)
    assert state.step == cfg.num_steps
    assert info.finite.all()
    assert (state.ema is None) == (cfg.ema_decay is None)


def test_weights_from_a_step_on_are_averaged_equally():
    cfg = dataclasses.replace(FLAT, swa_start=2)
    state, seen = init({"level": jnp.zeros(1)}, cfg, adapter=full()), []
    for i in range(5):
        state = dreambooth.update(state, {"level": jnp.array([1.0 + i])}, jnp.float32(1 + i), cfg)
        seen.append(state.trainable["level"])
        if i < 3:
            np.testing.assert_array_equal(averaged(state)["level"], seen[-1])
    np.testing.assert_allclose(averaged(state)["level"], np.mean(seen[2:], axis=0), rtol=1e-6)


def test_class_pictures_add_their_weighted_loss(flat):
    data = Data(flat.pictures([3.0] * 3), flat.pictures([-1.0] * 3))
    cfg = dataclasses.replace(FLAT, prior_weight=2.0)
    state, info = finished(flat, cfg, data)
    level, _, norms = by_hand(np.array([3.0]), cfg, prior=-1.0)
    np.testing.assert_allclose(state.trainable["level"], level, rtol=1e-5)
    np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-4)
    np.testing.assert_allclose([info.instance_loss[0], info.prior_loss[0], info.loss[0]], [9, 1, 11], rtol=1e-6)
    unweighted, info = finished(flat, dataclasses.replace(FLAT, prior_weight=0.0), data)
    without, _ = finished(flat, FLAT, Data(data.instance))
    np.testing.assert_array_equal(unweighted.trainable["level"], without.trainable["level"])
    np.testing.assert_array_equal(info.loss, info.instance_loss)


def test_non_finite_loss_is_flagged(flat):
    _, info = finished(flat, FLAT, Data(flat.pictures([1.0, jnp.nan, 1.0])))
    first = int(np.argmin(info.finite))
    assert first in (0, 1, 2)
    np.testing.assert_array_equal(info.finite, np.arange(8) < first)
    assert np.isnan(info.loss[first])


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"accumulation": 0},
        {"num_steps": 0},
        {"ema_decay": 1.0},
        {"swa_start": -1},
        {"swa_start": 1, "ema_decay": 0.5},
    ],
)
def test_mistakes_in_the_config_are_named(flat, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be"):
        init(flat.params, dataclasses.replace(FLAT, **fields), adapter=full())


@pytest.mark.parametrize(
    "fields",
    [
        {"num_steps": 0},
        {"learning_rate": -1e-4},
        {"learning_rate": float("inf")},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"beta2": 1.0},
        {"t_min": 5, "t_max": 5},
        {"t_max": 1001},
    ],
)
def test_check_refuses_what_makes_no_training(fields):
    check(FLAT, ScheduleConfig())
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.* must be"):
        check(dataclasses.replace(FLAT, **fields), ScheduleConfig())


def test_batch_that_cannot_be_split_raises(flat):
    data = Data(flat.pictures([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="multiple of accumulation=2"):
        dreambooth.step(KEY, init(flat.params, FLAT, adapter=full()), data, flat.params, CFG, **flat.network)


def test_draws_take_both_sets_in_orders_of_their_own():
    data = Data(*[Examples(jnp.arange(7.0), jnp.arange(7))] * 2)
    cfg = Config(batch_size=4, accumulation=3)
    batch = jax.jit(draw)(KEY, 1, data, cfg)
    assert batch.instance.prompt.shape == (12,)
    assert not np.array_equal(batch.instance.prompt, batch.prior.prompt)
    np.testing.assert_array_equal(
        batch.instance.prompt, jax.jit(draw)(KEY, 1, Data(data.instance), cfg).instance.prompt
    )


# Runs


def tilted(params, z_t, t, context):
    """Predicts z_0 from t, so that each row's own t matters."""
    return jnp.broadcast_to((params["level"] + params["slope"] * t / 1000)[:, None, None, None], z_t.shape)


@pytest.mark.slow  # compiles for long
def test_run_with_accumulation_is_a_loop_over_steps_of_large_batches(flat):
    params = {"level": jnp.zeros(1), "slope": jnp.zeros(1)}
    data = Data(flat.pictures([1.0, 2.0, 4.0]), flat.pictures([-1.0, 0.0]))
    network = {"eps_fn": tilted, "adapter": full(), "schedule": SAMPLE}
    state, info = run(KEY, init(params, CFG, adapter=full()), data, params, CFG, **network)
    at_once = dataclasses.replace(CFG, batch_size=4, accumulation=1)
    looped, infos = init(params, at_once, adapter=full()), []
    for i in range(CFG.num_steps):
        batch = draw(KEY, i, data, at_once)
        looped, one = step(jax.random.fold_in(KEY, i), looped, batch, params, at_once, **network)
        infos.append(one)
    close(state, looped, rtol=1e-4, atol=1e-6)
    close(info, jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos), rtol=1e-4, atol=1e-6)
    assert (state.trainable["slope"] != state.trainable["level"]).all()


def test_run_in_pieces_equals_a_run_in_one_piece(flat):
    data = Data(flat.pictures([1.0, 2.0, 4.0], logvar=jnp.zeros((3, 1, 1, 1))))
    cfg = dataclasses.replace(FLAT, sample_posterior=True, ema_decay=0.9)
    half = partial(run, KEY, data=data, params=flat.params, cfg=cfg, **flat.network, num_steps=4)
    state, first = half(init(flat.params, cfg, adapter=full()))
    state, second = half(state)
    infos = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
    assert len(np.unique(infos.loss)) == 8
    equal(finished(flat, cfg, data), (state, infos))


def test_ten_steps_and_a_sweep_trace_once(toy):
    traces = []

    def counted(*args):
        traces.append(1)
        return toy.eps_fn(*args)

    once = jax.jit(partial(dreambooth.step, **(toy.network | {"eps_fn": counted})))
    state = jax.eval_shape(lambda: init(toy.params, CFG, adapter=full()))
    batch = jax.eval_shape(lambda: draw(KEY, 0, toy.data, CFG))
    for i in range(10):
        once.eval_shape(jax.random.fold_in(KEY, i), state, batch, toy.params, CFG)
    floats = [field.name for field in dataclasses.fields(Config) if field.type is float]
    assert len(floats) == 8
    for name in floats:
        once.eval_shape(KEY, state, batch, toy.params, dataclasses.replace(CFG, **{name: 0.123}))
    assert len(traces) == 1
    once.eval_shape(KEY, state, batch, toy.params, dataclasses.replace(CFG, t_max=500))
    assert len(traces) == 2  # what is static does compile anew


def test_configs_can_be_mapped_over(flat):
    data, state = Data(flat.pictures([3.0] * 3)), init(flat.params, FLAT, adapter=full())

    def one(cfg):
        return dreambooth.run(KEY, state, data, flat.params, cfg, **flat.network)[0].trainable["level"]

    rates = jnp.array([0.01, 0.1])
    configs = jax.vmap(lambda rate: dataclasses.replace(FLAT, learning_rate=rate))(rates)
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, configs)
    levels = jax.jit(jax.vmap(one, in_axes=(axes,)))(configs)
    for level, rate in zip(levels, rates, strict=True):
        single, _ = finished(flat, dataclasses.replace(FLAT, learning_rate=float(rate)), data)
        np.testing.assert_allclose(level, single.trainable["level"], rtol=1e-5)


def test_no_implicit_promotion_in_losses_and_batches(flat, strict):
    """The optimiser is optax's, which promotes."""
    data = Data(flat.pictures([1.0, 2.0], logvar=jnp.zeros((2, 1, 1, 1))))
    cfg = dataclasses.replace(CFG, horizontal_flip=True, sample_posterior=True)
    network = {name: flat.network[name] for name in ("eps_fn", "schedule")}
    batch = jax.eval_shape(lambda: draw(KEY, jnp.int32(3), data, cfg)).instance
    keys = jax.eval_shape(lambda: jax.random.split(KEY, 4))
    per_example = jax.eval_shape(partial(losses, **network), keys, batch, flat.params, cfg)
    assert (per_example.shape, per_example.dtype) == ((4,), jnp.float32)


def spoken(params, z_t, t, context):
    """Predicts z_0 from the prompt alone."""
    return (context.mean(1) @ params["map"]["kernel"])[:, None, None, :] + 0 * z_t


def test_text_encoder_is_trained_inside_the_step(flat):
    """Picture i has the prompt [i, i], whose embedding is the prediction; AdamW's first step moves by the rate."""
    params = {"unet": {"map": {"kernel": jnp.eye(1)}}, "text_encoder": {"table": jnp.zeros((5, 1))}}
    data = Data(flat.pictures([2.0, -2.0, 2.0])._replace(prompt=jnp.array([[0, 0], [1, 1], [2, 2]])))
    text_fn = lambda tree, ids: tree["table"][ids]
    adapter = full(["^text_encoder/"])
    network = {"eps_fn": spoken, "schedule": SAMPLE, "text_fn": text_fn, "adapter": adapter}
    cfg = dataclasses.replace(FLAT, num_steps=1, batch_size=3, clip_norm=1e9)
    state, info = run(KEY, init(params, cfg, adapter=adapter), data, params, cfg, **network)
    np.testing.assert_allclose(info.loss, 4.0)
    np.testing.assert_allclose(state.trainable["text_encoder"]["table"][:, 0], [0.1, -0.1, 0.1, 0, 0], rtol=1e-5)
    assert set(state.trainable) == {"text_encoder"}


def test_low_rank_training_learns_a_low_rank_map():
    key_prompt, key_map = jax.random.split(KEY)
    prompt = jax.random.normal(key_prompt, (16, 1, 8))
    target = prompt[:, 0] @ (jax.random.normal(key_map, (8, 1)) @ jnp.array([[1.0, 2.0, -1.0]]))
    data = Data(Examples(target[:, None, None, :], prompt))
    params = {"map": {"kernel": jnp.zeros((8, 3))}}
    cfg = Config(num_steps=400, batch_size=16, learning_rate=1e-2, sample_posterior=False, weight_decay=0.0)
    adapter = lora(1, targets=["kernel"])
    state, info = run(
        KEY, init(params, cfg, adapter=adapter), data, params, cfg, eps_fn=spoken, schedule=SAMPLE, adapter=adapter
    )
    assert info.loss[-1] < 1e-3 * info.loss[0]
    assert np.linalg.matrix_rank(adapter.merge(params, averaged(state))["map"]["kernel"]) == 1
    np.testing.assert_array_equal(params["map"]["kernel"], 0)
