"""Scores of samples from made-up features, against their definitions written out."""

import numpy as np
import pytest

from dmsec_jax.metrics import perception

RNG = np.random.default_rng(0)


def rows(count, width=5):
    x = RNG.normal(size=(count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_fidelity_is_the_mean_over_all_pairs():
    samples, training = rows(4), rows(3)
    pairs = [a @ b for a in samples for b in training]
    np.testing.assert_allclose(perception.fidelity(samples, training), np.mean(pairs))
    np.testing.assert_allclose(perception.fidelity(training[:1], training[:1]), 1)


def test_quality_is_the_share_of_the_first_of_two_texts():
    samples, texts = rows(6), rows(2)
    logits = 100 * samples @ texts.T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(perception.quality(samples, texts), (shares / shares.sum(1, keepdims=True))[:, 0])
    assert perception.quality(texts[:1], texts) > 0.5
    np.testing.assert_allclose(perception.quality(samples, texts) + perception.quality(samples, texts[::-1]), 1)


def test_alignment_takes_one_text_for_all_or_one_for_each():
    samples, texts = rows(3), rows(3)
    np.testing.assert_allclose(perception.text_alignment(samples, texts), np.diag(samples @ texts.T))
    np.testing.assert_allclose(perception.text_alignment(samples, texts[:1]), samples @ texts[0])


def test_distances_and_diversity():
    x = RNG.normal(size=(4, 7))
    found = perception.squared_distances(x)
    np.testing.assert_allclose(found, [[((a - b) ** 2).sum() for b in x] for a in x], atol=1e-12)
    pairs = [found[i, j] for i in range(4) for j in range(i)]
    np.testing.assert_allclose(perception.diversity(found), np.mean(pairs))
    twice = perception.squared_distances(np.repeat(x[:2], 2, axis=0))  # two pictures, each given twice
    np.testing.assert_allclose(perception.diversity(twice), found[0, 1] * 4 / 6)
    assert perception.diversity(found[:1, :1]) == 0.0


def test_nothing_has_no_score():
    for score in (perception.fidelity, perception.quality):
        with pytest.raises(ValueError, match="of one picture at least"):
            score(rows(0), rows(2))
