"""The TPU kernel, run by Pallas' interpreter, against the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dmsec_jax import parallel
from dmsec_jax.models import splash
from dmsec_jax.models.attention import attention, chunked


def draw(n, m, heads=2, width=8, rows=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    make = lambda length: jnp.asarray(rng.standard_normal((rows, length, heads, width)), dtype)
    return make(n), make(m), make(m)


@pytest.mark.parametrize(("n", "m"), [(256, 256), (128, 77), (200, 130)], ids=["self", "cross", "odd"])
def test_the_kernel_is_the_plain_product(n, m):
    qkv = draw(n, m)
    with pltpu.force_tpu_interpret_mode():
        found = splash.attention(*qkv)
    np.testing.assert_allclose(found, chunked(*qkv), atol=1e-5)


def test_gradients_are_those_of_the_plain_product():
    qkv = draw(128, 77, heads=1, rows=1)
    loss = lambda attend: lambda *qkv: jnp.sum(jnp.sin(attend(*qkv)))
    with pltpu.force_tpu_interpret_mode():
        found = jax.grad(loss(splash.attention), (0, 1, 2))(*qkv)
    for ours, plain in zip(found, jax.grad(loss(chunked), (0, 1, 2))(*qkv), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_softmax_is_float32_under_bfloat16():
    q, k, v = draw(128, 128, dtype=jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode():
        found = splash.attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    exact = chunked(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.float32(found), exact, atol=0.03)


@pytest.mark.parametrize("rows", [8, 3], ids=["divided", "not divided"])
def test_on_a_mesh_each_device_takes_its_rows(rows):
    qkv = draw(128, 77, heads=1, rows=rows)
    with jax.set_mesh(parallel.make_mesh()), pltpu.force_tpu_interpret_mode():
        found = jax.jit(splash.attention)(*qkv)
    assert found.sharding.shard_shape(found.shape)[0] == (1 if rows == 8 else 3)
    np.testing.assert_allclose(found, chunked(*qkv), atol=1e-5)


@pytest.mark.parametrize(("positions", "kernels"), [(1024, 3), (64, 0)])
def test_a_program_for_tpu_has_the_kernels_where_sequences_are_long(positions, kernels):
    x = jax.ShapeDtypeStruct((1, positions, 8, 16), jnp.bfloat16)
    loss = jax.grad(lambda q: attention(q, q, q).astype(jnp.float32).sum())
    exported = jax.export.export(jax.jit(loss), platforms=["tpu"])(x)
    assert exported.mlir_module().count("tpu_custom_call") == kernels
    assert "tpu_custom_call" not in jax.jit(loss).lower(x).as_text()
