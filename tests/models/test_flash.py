"""The GPU kernel: where it is chosen and where not, and, on a GPU, that it is the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.models import flash
from dmsec_jax.models.attention import attention, chunked


def draw(dtype, width=40):
    rng = np.random.default_rng(0)
    make = lambda length: jnp.asarray(rng.standard_normal((2, length, 2, width)), dtype)
    return make(64), make(77), make(77)


@pytest.mark.parametrize(
    ("dtype", "width", "taken"),
    [
        (jnp.bfloat16, 40, True),
        (jnp.float16, 128, True),
        (jnp.float32, 40, False),
        (jnp.bfloat16, 160, False),  # the widest level of Stable Diffusion 1.x
        (jnp.bfloat16, 20, False),
    ],
)
def test_the_kernel_takes_half_precision_and_sizes_that_it_knows(dtype, width, taken, monkeypatch):
    assert not flash.suits(jnp.dtype(dtype), width) or flash.available()
    monkeypatch.setattr(flash, "available", lambda: True)
    assert flash.suits(jnp.dtype(dtype), width) == taken


class Device:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(("capability", "found"), [("7.5", False), ("8.0", True), ("10.3", True), ("gfx942", False)])
def test_gpus_that_have_it(capability, found, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(capability)])
    assert flash.available() == found


def test_only_programs_for_nvidia_gpus_have_it(monkeypatch):
    monkeypatch.setattr(flash, "available", lambda: True)
    monkeypatch.setattr(flash, "attention", lambda q, k, v: jnp.sin(q))  # cuDNN itself cannot be traced without a GPU
    text = lambda platform, **options: jax.export.export(
        jax.jit(lambda *qkv: attention(*qkv, **options)), platforms=[platform]
    )(*draw(jnp.bfloat16)).mlir_module()
    assert "sine" in text("cuda")
    assert "sine" not in text("cpu")
    assert "sine" not in text("cuda", mask=jnp.ones((64, 77), bool))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of machines without a GPU")
def test_without_a_gpu_half_precision_is_attended_in_chunks():
    qkv = draw(jnp.bfloat16)
    np.testing.assert_array_equal(attention(*qkv), chunked(*qkv))
    with pytest.raises(RuntimeError, match="cuDNN"):  # why `available` is asked first
        flash.attention(*qkv)


@pytest.mark.device
@pytest.mark.parametrize("width", [40, 64, 128])
def test_on_a_gpu_it_is_the_plain_product_and_so_is_its_gradient(width):
    if not flash.available():
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or more")
    qkv = draw(jnp.bfloat16, width)
    exact = [x.astype(jnp.float32) for x in qkv]
    loss = lambda attend: lambda *qkv: jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))
    np.testing.assert_allclose(np.float32(jax.jit(flash.attention)(*qkv)), chunked(*exact), atol=0.03)
    found = jax.jit(jax.grad(loss(flash.attention), (0, 1, 2)))(*qkv)
    for ours, plain in zip(found, jax.grad(loss(chunked), (0, 1, 2))(*exact), strict=True):
        np.testing.assert_allclose(np.float32(ours), plain, atol=0.03)
