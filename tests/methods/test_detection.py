"""Detectors of protected pictures, against an encoder that is known to listen to one pattern."""

import numpy as np
import pytest

from dmsec_jax.methods import detection, purify
from dmsec_jax.metrics import evidence

RNG = np.random.default_rng(0)
X, Y = np.meshgrid(np.linspace(0, 3, 16), np.linspace(0, 2, 16))
PICTURES = np.stack([np.sin(X + a)[..., None] * [0.3, 0.2, 0.1] + 0.1 * np.cos(Y * b)[..., None] for a, b in RNG.uniform(0, 6, (20, 2))])  # fmt: skip
PATTERN = RNG.choice([-1, 1], (16, 16, 3)) / 16
GAIN = 6.0


def natural():
    """Pictures with detail of their own."""
    return (PICTURES + RNG.normal(0, 0.03, PICTURES.shape)).astype(np.float32)


def encode(images):
    """The identity, but `GAIN` times as loud along one pattern."""
    unit = PATTERN / np.linalg.norm(PATTERN)
    along = np.einsum("bhwc,hwc->b", images, unit)
    return images + (GAIN - 1) * along[:, None, None, None] * unit


def smooth(images):
    return purify.blur(images, 1.0)


def respond(images):
    return detection.encoder_response(images, smooth(images), encode_fn=encode)


def test_the_response_to_a_change_is_the_encoders_gain():
    flat = np.zeros((2, 16, 16, 3), np.float32)
    pattern = np.broadcast_to(PATTERN, flat.shape).astype(np.float32)
    np.testing.assert_allclose(detection.encoder_response(pattern, flat, encode_fn=encode), np.log(GAIN), rtol=1e-4)
    across = RNG.normal(size=flat.shape)
    across -= np.einsum("bhwc,hwc->b", across, PATTERN)[:, None, None, None] * PATTERN / np.square(PATTERN).sum()
    found = detection.encoder_response(across.astype(np.float32), flat, encode_fn=encode)
    np.testing.assert_allclose(found, 0, atol=1e-4)
    assert (detection.encoder_response(flat, flat, encode_fn=encode) == -np.inf).all()


def test_what_the_encoder_listens_to_is_told_from_clean_and_from_noise_of_the_same_size():
    clean, size = natural(), 1.0
    protected = clean + np.float32(size) * PATTERN.astype(np.float32)
    noise = clean + np.float32(size) * RNG.choice([-1, 1], clean.shape).astype(np.float32) / 16
    assert evidence.auc(respond(protected), respond(clean)).low > 0.8
    assert evidence.auc(respond(protected), respond(noise)).low > 0.8
    other = evidence.auc(respond(natural()), respond(clean))
    assert other.low < 0.5 < other.high


def test_loss_response_is_the_log_of_the_ratio_and_refuses_what_is_no_loss():
    np.testing.assert_allclose(detection.loss_response(np.array([0.2, 0.3]), np.array([0.1, 0.3])), [np.log(2), 0])
    for bad in (0.0, np.nan):
        with pytest.raises(ValueError, match="losses must be positive"):
            detection.loss_response(np.array([bad]), np.array([0.1]))
