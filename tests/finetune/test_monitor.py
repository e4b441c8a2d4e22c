"""Stages of samples whose stage is known: those of a base model, noisy ones, and copies."""

import numpy as np
import pytest

from dmsec_jax.finetune import monitor


def pictures(seed, count, waves=3):
    """Smooth random pictures [N, 32, 32, 3] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32] / 32
    images = np.zeros((count, 32, 32, 3))
    for _ in range(waves):
        fy, fx, phase = rng.uniform(0.5, 3, (3, count, 1, 1, 3))
        images += np.sin(2 * np.pi * (fy * y[..., None] + fx * x[..., None]) + 6 * phase) / waves
    return images.astype(np.float32)


def noisy(images, level):
    return np.clip(images + level * np.random.default_rng(9).normal(size=images.shape), -1, 1).astype(np.float32)


TRAINING, BASE, SAMPLES = pictures(0, 6), pictures(1, 8), pictures(2, 8)
KNOWN = monitor.reference(TRAINING, BASE)


def judged(samples, known=KNOWN):
    return monitor.measure(10, samples, (0.5, 0.4), 0.1, known)


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_noise_levels_are_those_that_were_added(level):
    flat = np.full((20, 32, 32, 3), 0.1)
    found = monitor.noise_levels(flat + level * np.random.default_rng(0).normal(size=flat.shape))
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - level) < 5 * error
    assert 5 * error < 0.1 * level
    ramp = np.broadcast_to(np.linspace(-1, 1, 32)[:, None, None], (1, 32, 32, 3))
    np.testing.assert_allclose(monitor.noise_levels(ramp), 0, atol=1e-12)


@pytest.mark.parametrize(("samples", "stage"), [
    (BASE, "learning"),
    (SAMPLES, "learning"),
    (noisy(BASE, 0.1), "corrupting"),
    (np.concatenate([TRAINING, TRAINING[:2]]), "copying"),
    (noisy(np.concatenate([TRAINING, TRAINING[:2]]), 0.02), "copying"),
])  # fmt: skip
def test_known_stages_are_named(samples, stage):
    assert judged(samples).stage == stage


def test_a_base_model_that_draws_look_alikes_has_copied_nothing():
    base = noisy(np.concatenate([TRAINING, BASE[:2]]), 0.02)  # six of eight match a picture before any training
    known = monitor.reference(TRAINING, base)
    assert judged(base, known).copied == 0
    assert {judged(base, known).stage, judged(SAMPLES, known).stage} == {"learning"}
    assert judged(np.concatenate([TRAINING, TRAINING[:2]]), known).stage == "copying"


def test_measures_follow_what_was_made():
    same = np.repeat(SAMPLES[:1], 8, axis=0)
    np.testing.assert_allclose(judged(same).diversity, 0, atol=1e-6)
    assert judged(SAMPLES).diversity > 0.05
    copies = judged(np.concatenate([TRAINING, TRAINING[:2]]))
    assert copies.copied == 1
    assert copies.fidelity > judged(SAMPLES).fidelity
    assert (copies.step, copies.widths, copies.drift) == (10, (0.5, 0.4), 0.1)
    assert judged(noisy(BASE, 0.1)).noise > judged(BASE).noise


def test_scores_of_networks_take_the_place_of_the_substitutes():
    given = monitor.measure(10, SAMPLES, (0.5, 0.4), 0.1, KNOWN, scores=monitor.Scores(0.3, 0.8, 0.25))
    assert (given.diversity, given.quality, given.alignment) == (0.3, 0.8, 0.25)
    assert (judged(SAMPLES).quality, judged(SAMPLES).alignment) == (None, None)
    assert given.stage == judged(SAMPLES).stage


def test_chance_copies_do_not_make_a_stage():
    """Samples with one copy among them match no more often than different pictures of the style would."""
    one = np.concatenate([TRAINING[:1], SAMPLES[1:]])
    assert 0 < judged(one).copied < 1
    assert judged(one).stage == "learning"


@pytest.mark.parametrize("training", [TRAINING[:1], TRAINING[:2], np.repeat(TRAINING[:1], 4, axis=0)])
def test_few_or_equal_pictures_are_told_from_the_base_models(training):
    known = monitor.reference(training, BASE)
    assert judged(BASE, known).stage == "learning"
    assert judged(np.repeat(training[:1], 8, axis=0), known).stage == "copying"


def course(*stages):
    probabilities = {"learning": (1.0, 1.0), "corrupting": (1.0, 0.0), "copying": (0.0, 0.0)}
    empty = judged(SAMPLES)
    return [
        empty._replace(
            step=100 * (i + 1), fidelity=i / 10, copied_p=probabilities[stage][0], noise_p=probabilities[stage][1]
        )
        for i, stage in enumerate(stages)
    ]


def test_stages_are_found_and_the_advice_is_the_step_before():
    seen = course("learning", "learning", "corrupting", "copying", "learning")
    assert [monitor.reached(seen, stage) for stage in monitor.STAGES] == [100, 300, 400]
    assert monitor.advice(seen) == "Samples were corrupting at step 300: stop at step 200, the most faithful before it."
    assert monitor.reached(course("learning", "copying"), "corrupting") == 200
    assert monitor.advice(course("learning")) == "No corruption and no copies were found in 100 steps."
    assert "from the first measurement, at step 100" in monitor.advice(course("copying"))
    assert "Nothing was measured" in monitor.advice([])


def test_another_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="samples must be 8, as many as of the base model, got 3"):
        judged(SAMPLES[:3])
