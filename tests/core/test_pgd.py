"""Projected gradient ascent: budgets with units, the ball, the box, the mask, steps of exact size."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from dmsec_jax.core import config, pgd
from dmsec_jax.core.pgd import Budget

SHAPE = (4, 5, 3)
POINTS = jax.random.uniform(jax.random.key(0), (6, *SHAPE), minval=-1.0, maxval=1.0)
TARGET = jax.random.uniform(jax.random.key(1), (6, *SHAPE), minval=-1.0, maxval=1.0)
ALL = jnp.ones((1, 1, 1, 1))
INDEX = jnp.arange(6)


def towards(target):
    """Ascends -|x - target|^2, and reports it."""
    return lambda key, x: (2 * (target - x), -jnp.square(x - target).sum(axis=(1, 2, 3)))


def noisy(key, x):
    """A gradient that depends on the key of the step alone."""
    return jax.random.normal(key, x.shape[1:])[None] + 0 * x, x.sum(axis=(1, 2, 3))


@jax.jit
def once(state, x, mask, cfg):
    return pgd.step(jax.random.key(0), state, x, mask, cfg, gradient_fn=noisy)


INIT = jax.jit(pgd.init)
ADVANCE = jax.jit(pgd.advance, static_argnames=("gradient_fn", "num_steps"))


def advance(cfg, num_steps, state=None, x=POINTS, mask=ALL, gradient_fn=noisy, index=INDEX):
    key = jax.random.key(7)
    state = INIT(key, x, mask, index, cfg) if state is None else state
    return ADVANCE(key, state, x, mask, cfg, gradient_fn=gradient_fn, num_steps=num_steps)


def test_budgets_of_different_units_are_one():
    assert Budget(8, "8bit") == Budget(8 / 255, "01") == Budget(16 / 255, "pm1")
    assert len({Budget(8, "8bit"), Budget(8 / 255, "01"), Budget(16 / 255, "pm1")}) == 1
    assert Budget(8, "8bit") != Budget(8 / 255, "pm1")
    assert Budget(8, "8bit") != Budget(8, "latent")
    assert Budget(0.05, "pm1").to("8bit") == pytest.approx(6.375)  # what Anti-DreamBooth calls 0.05
    assert Budget(0.05, "pm1").to("01") == pytest.approx(0.025)
    assert Budget(3.0, "latent").to("latent") == 3.0


def test_pixels_are_no_latents():
    for budget, unit in ((Budget(1, "latent"), "pm1"), (Budget(1, "01"), "latent")):
        with pytest.raises(ValueError, match=f"{budget.unit} to {unit}"):
            budget.to(unit)


def test_a_budget_in_a_config_is_read_and_traced():
    cfg = config.from_dict(pgd.Config, {"budget": {"value": 4, "unit": "8bit"}, "norm": "l2"})
    assert cfg.budget == Budget(8 / 255, "pm1")
    leaves = jax.tree.leaves(pgd.Config())
    assert len(leaves) == 2 + 4  # two budgets, and decay, momentum, low, high
    assert config.from_dict(pgd.Config, config.to_dict(cfg)) == cfg


@pytest.mark.parametrize("norm", ["l2", "linf"])
@hypothesis.given(
    budget=st.floats(0.1, 400),
    step_size=st.floats(0.1, 600),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    random=st.booleans(),
)
def test_ball_box_and_mask_hold_whatever_the_numbers(norm, budget, step_size, steps, seed, random):
    sizes = {"budget": Budget(budget, "8bit"), "step_size": Budget(step_size, "8bit"), "momentum": 0.5}
    cfg = pgd.Config(**sizes, norm=norm, start="random" if random else "zero")
    mask = jax.random.bernoulli(jax.random.key(seed), 0.5, (6, *SHAPE[:2], 1)).astype(jnp.float32)
    state = INIT(jax.random.key(seed), POINTS, mask, INDEX, cfg)
    for _ in range(steps):
        state = once(state, POINTS, mask, cfg)[0]
        assert (jnp.where(mask, 0.0, state.delta) == 0).all()
        assert float(jnp.abs(POINTS + state.delta).max()) <= 1 + 1e-6
        size = jnp.abs(state.delta).max() if norm == "linf" else pgd.norm(state.delta).max()
        assert float(size) <= budget * 2 / 255 * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_each_step_has_its_size_and_decays(norm):
    cfg = pgd.Config(budget=Budget(255, "8bit"), step_size=Budget(4, "8bit"), norm=norm, decay=0.01, num_steps=5)
    middle = POINTS / 2  # the box is not reached
    size = pgd.norm if norm == "l2" else lambda x: jnp.abs(x).max(axis=(1, 2, 3))
    state = INIT(jax.random.key(0), middle, ALL, INDEX, cfg)
    for i in range(5):
        before = state.delta
        state = once(state, middle, ALL, cfg)[0]
        expected = 4 * 2 / 255 * (1 - 0.99 * i / 4)
        np.testing.assert_allclose(size(state.delta - before), expected, rtol=1e-2 if i == 4 else 1e-4)


def test_momentum_accumulates_normalised_gradients():
    cfg = pgd.Config(momentum=0.7, num_steps=3)
    state, _, _ = advance(cfg, 3)
    velocity = 0
    for i in range(3):
        gradient = np.asarray(noisy(jax.random.fold_in(jax.random.key(7), i), POINTS)[0])
        velocity = 0.7 * velocity + gradient / np.abs(gradient).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(state.velocity, velocity, rtol=1e-5)


def test_ascent_reaches_the_best_point_of_the_ball():
    cfg = pgd.Config(budget=Budget(0.2, "pm1"), step_size=Budget(0.01, "pm1"))
    state, info, value = advance(cfg, 60, gradient_fn=towards(TARGET))
    best = jnp.clip(TARGET - POINTS, -0.2, 0.2)
    assert float(jnp.abs(state.delta - best).max()) <= 0.0101  # one step
    assert (value[-1] > value[0]).all()
    assert info.finite.all()
    cfg = dataclasses.replace(cfg, norm="l2", budget=Budget(0.5, "pm1"))
    state, _, _ = advance(cfg, 80, gradient_fn=towards(TARGET))
    np.testing.assert_allclose(state.delta, 0.5 * pgd.direction(TARGET - POINTS, "l2"), atol=0.01)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_batch_is_singles_and_pieces_are_the_whole(norm):
    cfg = pgd.Config(norm=norm, budget=Budget(20, "8bit"), start="random", momentum=0.5, decay=0.1)
    whole, info, _ = advance(cfg, 6)
    half = advance(cfg, 3)[0]
    pieces = advance(cfg, 3, half)[0]
    np.testing.assert_array_equal(pieces.delta, whole.delta)
    assert int(pieces.i) == 6
    assert info.gradient_norm.shape == (6, 6)
    alone = advance(cfg, 6, x=POINTS[2:3], index=INDEX[2:3])[0]
    np.testing.assert_allclose(alone.delta[0], whole.delta[2], atol=1e-6)


def test_random_start_fills_the_ball():
    radius = jnp.array([0.1, 0.3])
    draw = jax.jit(pgd.random_in_ball, static_argnums=(2, 4))
    for norm in ("linf", "l2"):
        drawn = draw(jax.random.key(0), jnp.arange(2), (8, 8), radius, norm)
        size = jnp.abs(drawn).max(axis=(1, 2)) if norm == "linf" else pgd.norm(drawn)
        assert (size <= radius * (1 + 1e-6)).all()
        assert (size >= 0.7 * radius).all()
        assert float(jnp.abs(drawn.mean())) < 0.05


def test_broken_gradients_leave_their_example_alone():
    def broken(key, x):
        gradient, report = noisy(key, x)
        return gradient.at[0].multiply(jnp.nan), report

    state, info, _ = advance(pgd.Config(), 3, gradient_fn=broken)
    assert (state.delta[0] == 0).all()
    assert not info.finite[:, 0].any()
    assert info.finite[:, 1:].all()
    assert (jnp.abs(state.delta[1:]).max(axis=(1, 2, 3)) > 0).all()
