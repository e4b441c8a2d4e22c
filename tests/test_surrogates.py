"""Attacks on a model that learns: the order of ASPL, and both in whole on the tiny model."""

import jax
import numpy as np
import pytest

from dmsec_jax import protection, surrogates
from dmsec_jax.protection import Settings
from dmsec_jax.surrogates import Surrogate

KEY = jax.random.key(0)
SURROGATE = Surrogate(prompt="a red dog", steps=2, learning_rate=1e-3, batch_size=2, train_steps=1, attack_steps=2)


def test_aspl_trains_a_copy_on_clean_attacks_it_and_trains_the_model_on_what_is_left():
    """States are the histories themselves; the clean picture is 0, the attacked one says how often it was attacked."""
    keys = []

    def train(key, state, pictures, steps):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return (*state, f"learn {pictures.item():g} x{steps}")

    found = surrogates.alternate(
        KEY,
        (),
        (),
        np.zeros((1, 1, 1, 1), np.float32),
        2,
        train_fn=train,
        attack_fn=lambda attack, learnt: (*attack, learnt),
        attacked_fn=lambda attack: np.full((1, 1, 1, 1), len(attack), np.float32),
        train_steps=3,
    )
    assert found == (("learn 0 x3",), ("learn 1 x3", "learn 0 x3"))
    assert len(set(keys)) == 4


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="attack_steps must be at least 1"):
        Surrogate(prompt="", attack_steps=0)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.mark.slow  # compiles the gradients of training and attack
def test_fsmg_learns_and_leaves_the_model_alone(tiny_pipeline, pictures):
    before = jax.tree.map(np.asarray, tiny_pipeline.params["unet"])
    learnt = surrogates.fsmg(KEY, tiny_pipeline, pictures / np.float32(127.5) - 1, SURROGATE)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, learnt)
    assert max(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, before, tiny_pipeline.params["unet"])


@pytest.mark.slow  # compiles the gradients of training and attack
def test_aspl_keeps_the_budget_and_differs_from_the_plain_attack_whatever_the_batches(tiny_pipeline, pictures):
    model, saved = protection.model_of(tiny_pipeline, "a red dog"), {}
    steps = {"begin_fn": protection.begin, "advance_fn": protection.advance}
    alternating = surrogates.aspl(tiny_pipeline, SURROGATE, **steps)
    for name, attack_fn, size in (("plain", None, 2), ("aspl", alternating, 2), ("together", alternating, 3)):
        settings = Settings(num_steps=4, batch_size=size)
        jobs = [protection.job(one, one, None, 16, settings) for one in pictures]
        batch = size if attack_fn is None else len(jobs)
        found = protection.protect(KEY, model, jobs, settings, batch_size=batch, attack_fn=attack_fn)
        saved[name] = np.stack(found).astype(int)
        assert 1 <= np.abs(saved[name] - pictures).max() <= 8
    assert (saved["aspl"] != saved["plain"]).any()
    # a sign may flip where a gradient is nearly zero
    assert (saved["aspl"] != saved["together"]).mean() < 0.02
