"""Copy detection: features against a plain NumPy reading of their definition, centring, calibration."""

import numpy as np
import pytest
from scipy import ndimage

from dmsec_jax.metrics import similarity


def pictures(count, size=64, seed=0):
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((count, size, size, 3)), (0, 4, 4, 0))
    return np.clip(smooth * 6, -1, 1).astype(np.float32)


def histograms(images):
    grey = ndimage.gaussian_filter(images @ np.array(similarity.LUMA, np.float32), (0, 1, 1), mode="nearest")
    dy, dx = np.gradient(grey, axis=1), np.gradient(grey, axis=2)
    position = np.arctan2(dy, dx) % (2 * np.pi) / (2 * np.pi) * 8
    votes = np.zeros((*grey.shape, 8))
    low = np.floor(position).astype(int)
    place = np.indices(grey.shape)
    np.add.at(votes, (*place, low % 8), np.hypot(dx, dy) * (1 - position + low))
    np.add.at(votes, (*place, (low + 1) % 8), np.hypot(dx, dy) * (position - low))
    cells = votes.reshape(len(images), 16, 4, 16, 4, 8).mean((2, 4))
    flat = (cells / np.sqrt((cells**2).sum(-1, keepdims=True) + 1e-4)).reshape(len(images), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_features_follow_their_definition():
    np.testing.assert_allclose(similarity.embed(pictures(3)), histograms(pictures(3)), atol=2e-4)


def test_features_do_not_depend_on_the_batch():
    np.testing.assert_allclose(similarity.embed(pictures(5), batch_size=2), similarity.embed(pictures(5)), atol=1e-6)


def test_a_blurred_copy_is_nearer_than_any_other_picture():
    clean = pictures(12)
    copies = ndimage.gaussian_filter(clean, (0, 1.5, 1.5, 0)) + 0.1
    features, queries = similarity.embed(clean), similarity.embed(np.clip(copies, -1, 1))
    mean = features.mean(0)
    score = similarity.centred(queries, mean) @ similarity.centred(features, mean).T
    assert (score.argmax(1) == np.arange(12)).all()
    threshold = similarity.calibrate(similarity.centred(features, mean), rate=0.02)
    assert (np.diag(score) >= threshold.value).all()


def test_a_flat_picture_has_a_feature_without_nan():
    assert np.isfinite(similarity.embed(np.zeros((1, 64, 64, 3), np.float32))).all()


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5])
def test_calibration_lets_at_most_its_share_of_pairs_through(rate):
    rows = np.random.default_rng(1).standard_normal((40, 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = similarity.calibrate(rows, rate=rate)
    scores = (rows @ rows.T)[np.triu_indices(40, 1)]
    assert found.pairs == 780
    assert found.rate == (scores >= found.value).mean() <= rate
    assert found.low <= found.rate <= found.high
    if rate >= 0.01:
        assert found.rate > rate - 2 / 780 - 1e-3, "no stricter than needed"


def test_calibration_across_two_sets():
    first, second = np.eye(4)[:2], np.eye(4)[2:]
    found = similarity.calibrate(first, second)
    assert found.pairs == 4
    assert found.rate == 0


def strangers_let_through(threshold_of, count, rng):
    """Share of pictures that are no part of the style's mean which reach the threshold, with a common style and independent pictures."""
    style = 3 * rng.standard_normal(32)
    rows = style + rng.standard_normal((count + 200, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    known, strangers = rows[:count], rows[count:]
    mean = known.mean(0)
    score = similarity.centred(strangers, mean) @ similarity.centred(known, mean).T
    return (score >= threshold_of(known, mean)).mean()


def test_a_mean_that_holds_the_pictures_does_not_spoil_the_threshold():
    rng = np.random.default_rng(2)
    left_out = lambda known, mean: similarity.calibrate_style(known, rate=0.05).value
    naive = lambda known, mean: similarity.calibrate(similarity.centred(known, mean), rate=0.05).value
    honest = np.mean([strangers_let_through(left_out, 10, rng) for _ in range(40)])
    assert honest < 0.05
    assert np.mean([strangers_let_through(naive, 10, rng) for _ in range(40)]) > 3 * honest


def test_left_out_similarities_are_those_of_a_stranger():
    first, second = np.random.default_rng(3).standard_normal((2, 4, 8))
    pool = np.concatenate([first, second])
    scores = []
    for j in range(4, 8):
        mean = np.delete(pool, j, axis=0).mean(0)
        scores += [
            similarity.centred(first[i : i + 1], mean)[0] @ similarity.centred(pool[j][None], mean)[0] for i in range(4)
        ]
    found = similarity.calibrate_style(first, second, rate=0.25)
    ordered = np.sort(scores)
    assert found.pairs == 16
    assert ordered[-5] < found.value <= ordered[-4]
    alone = similarity.calibrate_style(first, rate=0.5)
    assert alone.pairs == 6
    assert alone.rate == 0.5


@pytest.mark.parametrize(("call", "message"), [
    (lambda: similarity.embed(np.zeros((1, 60, 60, 3), np.float32)), "multiples of 16"),
    (lambda: similarity.embed(np.full((1, 64, 64, 3), np.nan, np.float32)), "finite"),
    (lambda: similarity.calibrate(np.eye(3), rate=1.5), "in \\(0, 1\\)"),
    (lambda: similarity.calibrate(np.eye(3)[:1]), "two different pictures"),
    (lambda: similarity.calibrate_style(np.eye(3)[:2]), "at least three pictures"),
    (lambda: similarity.centred(np.ones((1, 4)), np.ones(4)), "different from the style's mean"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
