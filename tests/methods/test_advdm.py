"""AdvDM and its family on distributions whose denoisers are known in closed form, behind a linear encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dmsec_jax.core import pgd
from dmsec_jax.core.pgd import Budget
from dmsec_jax.diffusion import draws, loss, schedule
from dmsec_jax.methods import advdm

SD = schedule.ScheduleConfig()
ALPHA_BAR = schedule.alpha_bars(SD)
WORLD_FN = toy.eps_fn_of(ALPHA_BAR)
SHAPE = (4, 4, 2)
MATRIX = jnp.array([[1.0, -0.4], [0.6, 1.2], [-0.5, 0.8]])
MEANS = 1.5 * jax.random.normal(jax.random.key(3), (3, *SHAPE))
PARAMS = {"world": toy.mixture(MEANS, 0.4), "matrix": MATRIX, "logvar": jnp.float32(-4.0)}
IMAGES = jax.random.uniform(jax.random.key(5), (24, 4, 4, 3), minval=-0.9, maxval=0.9)
ALL = jnp.ones((1, 1, 1, 1))
TARGET = jax.random.normal(jax.random.key(6), (1, *SHAPE))
CFG = advdm.Config(attack=pgd.Config(num_steps=10, budget=Budget(0.1, "pm1"), step_size=Budget(0.02, "pm1")), rate=3.0)


def encode(params, image):
    mean = image @ params["matrix"]
    return mean, jnp.broadcast_to(params["logvar"], mean.shape)


def eps(params, z_t, t):
    return WORLD_FN(params["world"], z_t, t, toy.empty_context(len(z_t)))


OPTIONS = {"objective_fn": advdm.denoising, "encode_fn": encode, "eps_fn": eps, "schedule": SD}
STATIC = ("objective_fn", "encode_fn", "eps_fn", "schedule", "draw_fn")
RUN = jax.jit(advdm.run, static_argnames=STATIC)
ADVANCE = jax.jit(advdm.advance, static_argnames=(*STATIC, "num_steps"))
UNIFORM = jax.jit(draws.uniform_draw, static_argnums=(2, 3, 4))
NORMAL = jax.jit(draws.standard_normal, static_argnums=1)
OBJECTIVES = {
    name: getattr(advdm, name)
    for name in (
        "denoising",
        "denoising_descent",
        "distillation",
        "distillation_descent",
        "distillation_targeted",
        "textural",
        "fused",
        "encoder",
        "score",
    )
}


def protect(images=IMAGES, cfg=CFG, *, index=None, params=PARAMS, mask=ALL, target=TARGET, **options):
    index = jnp.arange(len(images)) if index is None else index
    return RUN(jax.random.key(0), images, mask, target, index, params, cfg, **{**OPTIONS, **options})


def protocol_case():
    attack = dataclasses.replace(CFG.attack, num_steps=4, start="random", momentum=0.3, decay=0.5)
    key_start = jax.random.fold_in(jax.random.key(0), 4)
    return {
        "cfg": dataclasses.replace(CFG, attack=attack, num_draws=2),
        "params": PARAMS,
        "init": (key_start, IMAGES[:3], ALL, jnp.arange(3)),
        "step": (IMAGES[:3], ALL, TARGET),
        "run": (IMAGES[:3], ALL, TARGET, jnp.arange(3)),
        "options": OPTIONS,
    }


def draws_of(key, count, cfg=CFG):
    """(t, noise, posterior noise), each [B K, ...], of a step with this key, drawn here on their own."""
    found = []
    for j in range(count):
        own = jax.random.fold_in(key, j)
        for k in range(cfg.num_draws):
            t, noise = UNIFORM(own, jnp.int32(k), cfg.num_draws, SHAPE, (cfg.t_min, cfg.t_max))
            own_posterior = jax.random.fold_in(jax.random.fold_in(own, cfg.num_draws), k)
            found.append((t, noise, NORMAL(own_posterior, SHAPE)))
    return [jnp.stack(part) for part in zip(*found, strict=True)]


def latents(image, posterior):
    mean, logvar = encode(PARAMS, image)
    repeats = len(posterior) // len(mean)
    return jnp.repeat(mean, repeats, axis=0) + jnp.exp(0.5 * jnp.repeat(logvar, repeats, axis=0)) * posterior


@functools.partial(jax.jit, static_argnames=("objective_fn", "eps_fn"))
def _gradient(images, params, cfg, objective_fn, eps_fn):
    options = {**OPTIONS, "objective_fn": objective_fn, "eps_fn": eps_fn}
    return advdm._gradient_fn(jnp.arange(len(images)), TARGET, params, cfg, **options)(jax.random.key(2), images)


def gradient(name, cfg=CFG, eps_fn=eps, params=PARAMS):
    """The gradient that the first step follows, per example, and what is reported."""
    return _gradient(IMAGES[:3], params, cfg, OBJECTIVES[name], eps_fn)


def shifted(params, z_t, t):
    return z_t + params["shift"]


def test_sds_is_the_encoders_gradient_and_the_full_gradient_where_the_network_is_the_identity():
    params = PARAMS | {"shift": jax.random.normal(jax.random.key(8), SHAPE)}
    t, noise, posterior = draws_of(jax.random.key(2), 3)
    z0, back = jax.vjp(lambda image: latents(image, posterior), IMAGES[:3])
    z_t = schedule.add_noise(ALPHA_BAR, z0, noise, t)
    (expected,) = back(z_t + params["shift"] - noise)
    sds, reported = gradient("distillation", eps_fn=shifted, params=params)
    np.testing.assert_allclose(sds, expected, rtol=1e-4, atol=1e-4)
    full, loss = gradient("denoising", eps_fn=shifted, params=params)
    factor = 2 * jnp.sqrt(ALPHA_BAR[t]) / np.prod(SHAPE)
    np.testing.assert_allclose(full, factor[:, None, None, None] * sds, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(jnp.sign(full), jnp.sign(sds))
    np.testing.assert_allclose(reported, loss, rtol=1e-5)


@pytest.mark.slow  # compiles for long
def test_sds_does_not_ask_for_the_networks_jacobian():
    blocked = lambda params, z_t, t: jax.lax.stop_gradient(eps(params, z_t, t))
    np.testing.assert_array_equal(gradient("distillation")[0], gradient("distillation", eps_fn=blocked)[0])
    assert not np.allclose(gradient("denoising")[0], gradient("denoising", eps_fn=blocked)[0])


def test_descents_are_the_negatives():
    for name in ("denoising", "distillation"):
        # two programs: XLA may fuse their sums differently
        np.testing.assert_allclose(gradient(name)[0], -gradient(f"{name}_descent")[0], rtol=1e-5, atol=1e-5)


def test_textural_and_encoder_gradients_are_closed_forms():
    _, _, posterior = draws_of(jax.random.key(2), 3)
    error = latents(IMAGES[:3], posterior) - TARGET
    found, distance = gradient("textural")
    np.testing.assert_allclose(found, -2 * error @ MATRIX.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(distance, jnp.square(error).sum((1, 2, 3)), rtol=1e-5)
    found, _ = gradient("encoder")
    np.testing.assert_allclose(found, -2 * (IMAGES[:3] @ MATRIX - TARGET) @ MATRIX.T, rtol=1e-4, atol=1e-5)


def test_fused_is_the_sum_of_its_terms():
    denoising, textural = gradient("denoising")[0], gradient("textural")[0]
    np.testing.assert_allclose(gradient("fused")[0], CFG.rate * denoising + textural, rtol=1e-4, atol=1e-4)
    sds = gradient("distillation")[0]
    np.testing.assert_allclose(gradient("distillation_targeted")[0], textural - CFG.rate * sds, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # compiles for long
def test_score_pulls_the_prediction_to_the_target():
    t, noise, posterior = draws_of(jax.random.key(2), 3)

    def distance(image):
        z_t = schedule.add_noise(ALPHA_BAR, latents(image, posterior), noise, t)
        return jnp.square(eps(PARAMS, z_t, t) - TARGET).mean((1, 2, 3)).sum()

    np.testing.assert_allclose(gradient("score")[0], -jax.grad(distance)(IMAGES[:3]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow  # compiles for long
def test_draws_are_averaged():
    cfg = dataclasses.replace(CFG, num_draws=4, t_min=100, t_max=600)
    t, noise, posterior = draws_of(jax.random.key(2), 3, cfg)
    assert ((t >= 100) & (t < 600)).all()

    def losses(image):
        z0 = latents(image, posterior)
        return loss.denoising_loss(lambda z, t: eps(PARAMS, z, t), ALPHA_BAR, z0, t, noise).reshape(3, 4).mean(1)

    found, value = gradient("denoising", cfg)
    np.testing.assert_allclose(value, losses(IMAGES[:3]), rtol=1e-4)
    np.testing.assert_allclose(found, jax.grad(lambda x: losses(x).sum())(IMAGES[:3]), rtol=1e-3, atol=1e-5)


@jax.jit
def held_out(images):
    """L_DM of posterior means at 64 draws that no attack saw."""
    z0, model = encode(PARAMS, images)[0], lambda z, t: eps(PARAMS, z, t)
    options = {"num_draws": 64, "draw": draws.stratified_draw, "chunk": 64}
    return loss.monte_carlo_loss(jax.random.key(99), model, ALPHA_BAR, z0, **options).mean(1)


@pytest.mark.slow  # compiles for long
def test_every_attack_does_what_it_says_and_noise_does_not():
    cfg = dataclasses.replace(CFG, num_draws=4)
    start = np.asarray(held_out(IMAGES))
    index = jnp.arange(len(IMAGES))
    random = np.asarray(held_out(IMAGES + advdm.control(jax.random.key(4), IMAGES, ALL, index, cfg))) - start

    def attacked(name):
        state, info = protect(cfg=cfg, objective_fn=OBJECTIVES[name])
        assert info.finite.all()
        return IMAGES + state.attack.delta

    def distance(images):
        return np.asarray(jnp.square(encode(PARAMS, images)[0] - TARGET).sum((1, 2, 3)))

    def t_statistic(x):
        x = np.asarray(x)
        return x.mean() / (x.std(ddof=1) / np.sqrt(len(x)))

    for name in ("denoising", "distillation"):
        assert t_statistic(held_out(attacked(name)) - start - random) > 5, name
    assert t_statistic(random - (held_out(attacked("denoising_descent")) - start)) > 5
    for name in ("textural", "encoder", "fused"):
        assert (distance(attacked(name)) < distance(IMAGES)).all(), name


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_control_has_the_norm_of_the_budget(norm):
    cfg = dataclasses.replace(CFG, attack=dataclasses.replace(CFG.attack, norm=norm))
    mask = jnp.ones((1, 4, 4, 1)).at[:, :2].set(0)
    delta = advdm.control(jax.random.key(0), IMAGES / 2, mask, jnp.arange(24), cfg)
    size = pgd.norm(delta) if norm == "l2" else jnp.abs(delta).max((1, 2, 3))
    np.testing.assert_allclose(size, 0.1, rtol=1e-5)
    assert (delta[:, :2] == 0).all()
    assert len(np.unique(delta, axis=0)) == 24
    radius = jnp.linspace(0.01, 0.1, 24)
    cfg = dataclasses.replace(cfg, attack=dataclasses.replace(cfg.attack, budget=Budget(radius, "pm1")))
    each = advdm.control(jax.random.key(0), IMAGES / 2, mask, jnp.arange(24), cfg)
    np.testing.assert_allclose(each, delta * radius[:, None, None, None] / 0.1, atol=1e-6)


@pytest.mark.parametrize("name", ["denoising", "distillation", "fused"])
def test_a_batch_is_its_examples(name):
    whole, info = protect(IMAGES[:4], objective_fn=OBJECTIVES[name])
    alone, single = protect(IMAGES[2:3], index=jnp.array([2]), objective_fn=OBJECTIVES[name])
    np.testing.assert_allclose(alone.attack.delta[0], whole.attack.delta[2], atol=1e-6)
    np.testing.assert_allclose(single.value[:, 0], info.value[:, 2], rtol=1e-4)


@pytest.mark.slow  # compiles for long
def test_pieces_are_the_whole():
    whole, info = protect(IMAGES[:3])
    state, values = advdm.init(jax.random.key(1), IMAGES[:3], ALL, jnp.arange(3), CFG), []
    for _ in range(2):
        state, part = ADVANCE(jax.random.key(0), state, IMAGES[:3], ALL, TARGET, PARAMS, CFG, num_steps=5, **OPTIONS)
        values.append(part.value)
    np.testing.assert_array_equal(state.attack.delta, whole.attack.delta)
    np.testing.assert_array_equal(np.concatenate(values), info.value)


def test_constants_of_the_public_codes():
    for cfg, budget, step_size in (
        (advdm.ADVDM, 8, 2),
        (advdm.MIST, 16, 1),
        (advdm.SDS, 16, 1),
        (advdm.PHOTOGUARD, 12.75, 1.9125),
        (advdm.ACE, 4, 0.6375),
    ):
        assert cfg.attack.budget == Budget(budget, "8bit")
        assert cfg.attack.step_size == Budget(step_size, "8bit")
