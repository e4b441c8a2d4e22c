import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.models.attention import Attention, Transformer2D, attention, gated

B, N, M, HEADS, D = 2, 16, 6, 2, 4


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture
def qkv():
    return draw(B, N, HEADS, D, seed=0), draw(B, M, HEADS, D, seed=1), draw(B, M, HEADS, D, seed=2)


def plain(q, k, v, mask=None):
    logits = np.einsum("bnhd,bmhd->bhnm", *(np.asarray(a, np.float64) for a in (q, k))) / np.sqrt(D)
    weights = np.exp(logits) * (1.0 if mask is None else mask)
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))


@pytest.mark.parametrize("max_logits", [10**6, HEADS * 4 * M, 1], ids=["whole", "chunks of 4", "chunks of 1"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_however_chunked(qkv, max_logits, masked):
    mask = np.random.default_rng(3).random((N, M)) < 0.6
    mask[:, 0] = True
    mask = mask if masked else None
    np.testing.assert_allclose(attention(*qkv, mask=mask, max_logits=max_logits), plain(*qkv, mask), atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_lengths_that_nothing_divides_are_chunked_too(qkv, masked):
    """As of pictures of 776 pixels: 97 x 97 positions."""
    q, k, v = qkv[0][:, :13], *qkv[1:]
    mask = np.ones((13, M), bool) & (np.arange(M) != 2) if masked else None
    for max_logits in (HEADS * 5 * M, HEADS * 9 * M):
        run = lambda q, k, v, limit=max_logits: attention(q, k, v, mask=mask, max_logits=limit)
        np.testing.assert_allclose(run(q, k, v), plain(q, k, v, mask), atol=1e-5)
        largest = max(np.prod(var.aval.shape) for var in _inner(jax.make_jaxpr(run)(q, k, v).jaxpr))
        assert largest < B * HEADS * 13 * M  # the matrix is never whole


def _inner(jaxpr):
    """All values of a jaxpr and of those in it."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _inner(inner)


def test_chunking_leaves_gradients_alone(qkv):
    def grads(max_logits):
        loss = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, max_logits=max_logits)))
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*qkv)

    for a, b in zip(grads(HEADS * 4 * M), grads(10**6), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_formula(qkv, masked):
    allowed = jnp.asarray(np.random.default_rng(3).random((N, M)) < 0.6).at[:, 0].set(True) if masked else None

    def formula(q, k, v):
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D)
        logits = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits, -1), v)

    cotangent = draw(B, N, HEADS, D, seed=4)
    ours = jax.vjp(lambda *args: attention(*args, mask=allowed), *qkv)[1](cotangent)
    for a, b in zip(ours, jax.vjp(formula, *qkv)[1](cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gated_unit_and_its_gradient_are_those_of_the_exact_gelu():
    def formula(both):
        value, gate = jnp.split(both, 2, -1)
        return value * jax.nn.gelu(gate, approximate=False)

    both, cotangent = 3 * draw(5, 16, seed=0), draw(5, 8, seed=1)
    ours, our_vjp = jax.vjp(gated, both)
    theirs, their_vjp = jax.vjp(formula, both)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(our_vjp(cotangent)[0], their_vjp(cotangent)[0], atol=1e-5)


def programs(value):
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v.jaxpr if hasattr(v, "jaxpr") else v for v in values if hasattr(v, "jaxpr") or hasattr(v, "eqns")]


def biggest_array(jaxpr):
    """Number of elements of the largest intermediate array of a program, programs inside it included."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [biggest_array(p) for eqn in jaxpr.eqns for value in eqn.params.values() for p in programs(value)]
    return max(sizes + inner, default=0)


def test_long_sequences_never_hold_all_logits():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 40), jnp.float32)
    loss = lambda q, k, v: jnp.sum(attention(q, k, v))
    for fn in (loss, jax.grad(loss, (0, 1, 2))):
        held = biggest_array(jax.make_jaxpr(fn)(x, x, x).jaxpr)
        assert held <= 2**22  # all logits are 8 * 4096 * 4096 = 2^27


def test_softmax_is_float32_under_bfloat16(qkv):
    low = [a.astype(jnp.bfloat16) for a in qkv]
    out = attention(*low)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), plain(*qkv), atol=0.03)
    large = attention(low[0] * 1e4, low[1] * 1e4, low[2])
    assert np.isfinite(np.float32(large)).all()


def test_widths_that_heads_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"multiple of the number of heads 3, got 8; change attention_head_dim"):
        Attention(3).init(jax.random.key(0), jnp.zeros((1, 4, 8)))


def test_both_projection_styles_are_one_function_of_the_weights(weights):
    x, context = draw(1, 2, 3, 8, seed=0), draw(1, 5, 6, seed=1)
    linear, convolutional = (Transformer2D(2, groups=4, linear_projection=choice) for choice in (True, False))
    params = weights(lambda key, cfg: linear.init(key, x, context)["params"], None)
    reshaped = params | {n: params[n] | {"kernel": params[n]["kernel"][None, None]} for n in ("proj_in", "proj_out")}
    ours, theirs = jax.jit(
        lambda params, reshaped: (
            linear.apply({"params": params}, x, context),
            convolutional.apply({"params": reshaped}, x, context),
        )
    )(params, reshaped)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.max(np.abs(ours - x)) > 0.1
