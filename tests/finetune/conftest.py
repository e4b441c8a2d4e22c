"""Two denoisers small enough to train in milliseconds: one with a kernel of each kind, one whose loss is a parabola."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples

CHANNELS, WIDTH = 3, 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)  # numpy: nothing to compile


def eps_fn(params, z_t, t, context):
    block = params["block"]
    dims = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(z_t, block["conv1"]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
    h = jnp.tanh(h + block["conv1"]["bias"] + 1e-3 * t[:, None, None, None])  # [B, h, w, WIDTH]
    h = h + (context.mean(1) @ block["attn2"]["to_k"]["kernel"])[:, None, None, :]
    return block["norm"]["scale"] * (h @ block["attn1"]["to_out_0"]["kernel"] + block["attn1"]["to_out_0"]["bias"])


@pytest.fixture(scope="session")
def toy():
    unet = {
        "block": {
            "conv1": {"kernel": 0.3 * normal(0, 3, 3, CHANNELS, WIDTH), "bias": jnp.zeros(WIDTH)},
            "attn2": {"to_k": {"kernel": normal(1, 5, WIDTH)}},
            "attn1": {"to_out_0": {"kernel": normal(2, WIDTH, CHANNELS), "bias": jnp.zeros(CHANNELS)}},
            "norm": {"scale": jnp.ones(CHANNELS)},
        }
    }
    mean = normal(3, 5, 2, 2, CHANNELS)
    instance = examples(mean, normal(4, 5, 2, 5), 0 * mean - 2)
    return SimpleNamespace(
        eps_fn=eps_fn,
        params=unet,
        network={"eps_fn": eps_fn, "adapter": full(), "schedule": ScheduleConfig()},
        data=Data(instance),
        both=Data(instance, examples(mean[::-1] + 1, normal(5, 1, 2, 5), mean)),
    )


def level(params, z_t, t, context):
    return jnp.broadcast_to(params["level"], z_t.shape)


def pictures(values, **more):
    """One-pixel pictures of the given values."""
    return examples(jnp.array(values, jnp.float32)[:, None, None, None], jnp.zeros((1, 1, 1)), **more)


@pytest.fixture(scope="session")
def flat():
    """A network that predicts z_0 to be one number `level`: the loss of a picture of value c is (level - c)^2."""
    return SimpleNamespace(
        params={"level": jnp.zeros(1)},
        network={"eps_fn": level, "adapter": full(), "schedule": ScheduleConfig(prediction_type="sample")},
        pictures=pictures,
    )
