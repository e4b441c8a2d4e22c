import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core.means import mean_over


def squares(item):
    return {"square": item["x"] ** 2, "sum": item["x"].sum()}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_is_the_mean_of_all_at_once(count):
    items = {"x": jax.random.normal(jax.random.key(count), (count, 3))}
    want = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(squares)(items))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.jit(mean_over, static_argnums=0)(squares, items),
        want,
    )


def test_one_item_is_the_function_itself():
    items = {"x": jnp.arange(3.0)[None]}
    assert "scan" not in str(jax.make_jaxpr(lambda items: mean_over(squares, items))(items))


@pytest.mark.parametrize("count", [1, 4])
def test_traces_once(count):
    traces = []

    def traced(item):
        traces.append(None)
        return squares(item)

    jax.jit(lambda items: mean_over(traced, items)).lower({"x": jnp.zeros((count, 3))})
    assert len(traces) == 1


@pytest.mark.parametrize("items", [{"x": jnp.zeros((0, 3))}, {"x": jnp.zeros((2, 3)), "y": jnp.zeros((3,))}])
def test_refuses_nothing_and_axes_that_differ(items):
    with pytest.raises(ValueError, match="items must be of one leading axis"):
        mean_over(squares, items)
