"""CGI-DM on distributions whose denoisers are known in closed form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from dmsec_jax.core import pgd
from dmsec_jax.diffusion import draws, schedule
from dmsec_jax.methods import cgi_dm

SD = schedule.ScheduleConfig()
EPS_FN = toy.eps_fn_of(schedule.alpha_bars(SD))
SHAPE = (4, 4, 1)
MASK = cgi_dm.checkerboard(4, 4, 2)
CFG = cgi_dm.Config(eps=20.0, alpha=0.4, num_steps=20, num_draws=2)
POINTS = jax.random.normal(jax.random.key(3), (8, *SHAPE))
MEMBERS, HOLDOUTS = POINTS[:4], POINTS[4:]
BASE = toy.gaussian(jnp.zeros(SHAPE), 1.0)
PARAMS = {"base": BASE, "tuned": toy.blend(BASE, toy.memoriser(MEMBERS, 0.1), 0.5)}


def pair(params, z_t, t):
    both = z_t if isinstance(z_t, tuple) else (z_t, z_t)
    return tuple(EPS_FN(world, z, t, toy.empty_context(len(z))) for world, z in zip(params.values(), both, strict=True))


RUN = jax.jit(cgi_dm.run, static_argnames=("pair_fn", "schedule", "latent_fn", "draw_fn"))
ADVANCE = jax.jit(cgi_dm.advance, static_argnames=("num_steps", "pair_fn", "schedule", "latent_fn", "draw_fn"))
STEP = jax.jit(cgi_dm.step, static_argnames=("pair_fn", "schedule", "latent_fn", "draw_fn"))
CONTRAST = jax.jit(cgi_dm.contrast, static_argnames=("pair_fn", "schedule", "draw_fn"))
OPTIONS = {"pair_fn": pair, "schedule": SD}


def start_of(known):
    return cgi_dm.kept(known, MASK, CFG)


def recover(known, cfg=CFG, key=0, index=None, **options):
    index = jnp.arange(len(known)) if index is None else index
    return RUN(jax.random.key(key), known, start_of(known), MASK, index, PARAMS, cfg, **{**OPTIONS, **options})


def protocol_case():
    known = POINTS[:3]
    return {
        "cfg": dataclasses.replace(CFG, num_steps=4),
        "params": PARAMS,
        "init": (start_of(known), jnp.arange(3)),
        "step": (known, start_of(known), MASK),
        "run": (known, start_of(known), MASK, jnp.arange(3)),
        "options": OPTIONS,
    }


def test_checkerboard_keeps_half_of_every_tile():
    mask = cgi_dm.checkerboard(64, 64)[0, :, :, 0]
    assert mask.sum() == 2048
    tiles = mask.reshape(16, 4, 16, 4).transpose(0, 2, 1, 3)
    assert (tiles[:, :, :2, :2] == 1).all()
    assert (tiles[:, :, 2:, 2:] == 1).all()
    with pytest.raises(ValueError, match="even and a divisor of 6 and 6"):
        cgi_dm.checkerboard(6, 6, 4)


def test_random_blocks_keep_their_share_and_differ():
    masks = cgi_dm.blocks(0, 5, 8, 8, block=2, kept=0.25)
    assert masks.shape == (5, 8, 8, 1)
    assert (masks.sum(axis=(1, 2, 3)) == 16).all()
    assert len(np.unique(masks.reshape(5, -1), axis=0)) > 1
    assert (masks.reshape(5, 4, 2, 4, 2).std(axis=(2, 4)) == 0).all()
    assert cgi_dm.half(4, 6)[0, :, :, 0].tolist() == [[1, 1, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize(
    ("mask", "domain"), [(MASK, "space"), (cgi_dm.low_pass(4, 4, 0.25), "frequency")], ids=["half", "blur"]
)
def test_what_is_kept_is_never_touched(mask, domain):
    cfg = dataclasses.replace(CFG, domain=domain)
    start = jnp.zeros_like(MEMBERS)
    state, _ = RUN(jax.random.key(0), MEMBERS, start, mask, jnp.arange(4), PARAMS, cfg, **OPTIONS)
    recovered = cgi_dm.completed(state, MEMBERS, start, mask, cfg)
    np.testing.assert_allclose(cgi_dm.kept(recovered, mask, cfg), cgi_dm.kept(MEMBERS, mask, cfg), atol=1e-5)
    once = cgi_dm.kept(MEMBERS, mask, cfg)
    np.testing.assert_allclose(cgi_dm.kept(once, mask, cfg), once, atol=1e-5)
    assert float(jnp.abs(recovered - once).max()) > 0.1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_each_step_has_its_size_and_stays_in_the_ball(norm):
    cfg = dataclasses.replace(CFG, norm=norm, eps=1.0, alpha=0.4)
    start = start_of(MEMBERS)
    state = cgi_dm.init(start, jnp.arange(4), cfg)
    size = pgd.norm if norm == "l2" else lambda x: jnp.abs(x).max(axis=(1, 2, 3))
    for i in range(5):
        key = jax.random.fold_in(jax.random.key(1), i)
        before = state.delta
        state, info = STEP(key, state, MEMBERS, start, MASK, PARAMS, cfg, **OPTIONS)
        if i < 2:  # the ball is not reached yet
            np.testing.assert_allclose(size(state.delta - before), 0.4, rtol=1e-5)
        assert (size(state.delta) <= 1.0 + 1e-5).all()
        assert info.finite.all()


def test_a_radius_for_each_example():
    radius = jnp.array([0.1, 0.2, 0.3, 0.4])
    state, _ = recover(MEMBERS, dataclasses.replace(CFG, eps=radius))
    np.testing.assert_allclose(pgd.norm(state.delta), radius, rtol=1e-4)


def test_a_batch_is_its_examples():
    whole, info = recover(POINTS)
    for j in range(len(POINTS)):
        single, alone = recover(POINTS[j : j + 1], index=jnp.array([j]))
        np.testing.assert_allclose(single.delta[0], whole.delta[j], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(alone.contrast[:, 0], info.contrast[:, j], rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compiles for long
def test_pieces_are_the_whole():
    key = jax.random.key(0)
    whole, info = recover(MEMBERS)
    start = start_of(MEMBERS)
    state, contrasts = cgi_dm.init(start, jnp.arange(4), CFG), []
    for count in (7, 7, 6):
        state, part = ADVANCE(key, state, MEMBERS, start, MASK, PARAMS, CFG, num_steps=count, **OPTIONS)
        contrasts.append(part.contrast)
    np.testing.assert_array_equal(state.delta, whole.delta)
    np.testing.assert_array_equal(np.concatenate(contrasts), info.contrast)


def test_common_noise_has_the_smaller_variance():
    slight = PARAMS | {"tuned": toy.gaussian(jnp.zeros(SHAPE), 0.95)}  # fine-tuned a little

    def draws_of(noise):
        cfg = dataclasses.replace(CFG, noise=noise, num_draws=1)
        keys = jax.random.split(jax.random.key(2), 300)
        return np.array([CONTRAST(key, MEMBERS, slight, cfg, jnp.arange(4), **OPTIONS) for key in keys])

    common, independent = draws_of("common"), draws_of("independent")
    assert (common.var(axis=0) < 0.1 * independent.var(axis=0)).all()
    error = np.sqrt((common.var(axis=0) + independent.var(axis=0)) / 300)
    assert (np.abs(common.mean(axis=0) - independent.mean(axis=0)) < 5 * error).all()  # and both estimate the same


@pytest.mark.parametrize("noise", ["common", "independent"])
@pytest.mark.parametrize("draw", [draws.uniform_draw, draws.stratified_draw, draws.antithetic_draw])
def test_contrast_is_the_loss_difference(noise, draw):
    cfg = dataclasses.replace(CFG, noise=noise, num_draws=4, t_min=100, t_max=600)
    found = CONTRAST(jax.random.key(4), POINTS[:2], PARAMS, cfg, jnp.array([5, 6]), draw_fn=draw, **OPTIONS)
    alpha_bar = schedule.alpha_bars(SD)
    for j in range(2):
        own, losses = jax.random.fold_in(jax.random.key(4), 5 + j), []
        for k in range(4):
            t, eps = draw(own, jnp.int32(k), 4, SHAPE, (100, 600))
            assert 100 <= int(t) < 600
            other = eps
            if noise == "independent":
                other = draw(jax.random.fold_in(own, 4), jnp.int32(k), 4, SHAPE, (100, 600))[1]
            z_base, z_tuned = (schedule.add_noise(alpha_bar, POINTS[j][None], n[None], t[None]) for n in (eps, other))
            base, tuned = pair(PARAMS, (z_base, z_tuned), t[None])
            losses.append(jnp.mean((tuned[0] - other) ** 2) - jnp.mean((base[0] - eps) ** 2))
        np.testing.assert_allclose(found[j], np.mean(losses), rtol=1e-4, atol=1e-5)


def test_a_memoriser_gives_its_pictures_back_and_no_others():
    cfg = dataclasses.replace(CFG, num_steps=150, num_draws=4, alpha=0.2)
    state, info = recover(POINTS, cfg)
    error = np.asarray(pgd.norm(cgi_dm.completed(state, POINTS, start_of(POINTS), MASK, cfg) - POINTS))
    before = np.asarray(pgd.norm(start_of(POINTS) - POINTS))
    assert (error[:4] < 0.5 * before[:4]).all()
    assert (error[4:] > before[4:]).all()
    assert info.contrast.shape == (150, 8)


def test_pixels_go_through_the_encoder():
    double = lambda params, x: 2.0 * x
    cfg = dataclasses.replace(CFG, bound=1.0)
    state, _ = recover(MEMBERS / 2, cfg, latent_fn=double)
    recovered = start_of(MEMBERS / 2) + state.delta
    assert float(jnp.abs(recovered).max()) <= 1.0 + 1e-6
    plain, _ = recover(MEMBERS, dataclasses.replace(CFG, alpha=0.8, eps=40.0, bound=2.0))
    np.testing.assert_allclose(2 * state.delta, plain.delta, rtol=1e-3, atol=1e-4)  # the same problem, twice as large


def test_gradients_that_are_not_finite_change_nothing_and_are_reported():
    def broken(params, z_t, t):
        base, tuned = pair(params, z_t, t)
        return base, tuned.at[0].multiply(jnp.nan)

    state, info = recover(MEMBERS, dataclasses.replace(CFG, num_steps=3), pair_fn=broken)
    assert not info.finite[:, 0].any()
    assert info.finite[:, 1:].all()
    assert (state.delta[0] == 0).all()
    assert np.isfinite(state.delta).all()


def test_public_start_is_quantised():
    decode = lambda z: jnp.clip(jnp.repeat(z, 3, axis=-1) / 4, -1, 1)
    encode = lambda x: (4 * x[..., :1], jnp.full((*x.shape[:-1], 1), -2.0))
    start = functools.partial(cgi_dm.initial, MEMBERS, MASK, CFG, encode_fn=encode, decode_fn=decode)
    np.testing.assert_allclose(start(), cgi_dm.kept(MEMBERS, MASK, CFG), atol=1e-6)
    levels = (np.asarray(start(quantise=True)) / 4 + 1) * 127.5
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    spread = np.asarray(start(key=jax.random.key(0)) - start())
    assert 0.2 < spread.std() < 0.6  # exp(-1) = 0.37
    joint = start(key=jax.random.key(0))[:1]
    alone = cgi_dm.initial(MEMBERS[:1], MASK, CFG, encode_fn=encode, decode_fn=decode, key=jax.random.key(0))
    np.testing.assert_allclose(joint, alone, rtol=1e-6)
