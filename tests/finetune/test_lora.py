import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.core.trees import flatten
from dmsec_jax.finetune.adapters import count
from dmsec_jax.finetune.lora import ATTENTION, lora
from dmsec_jax.models import clip, presets, unet

KEY = jax.random.key(0)
ALL = (r"conv1/kernel", r"attn\d/.*/kernel")


def noisy(trainable):
    """A trained-looking tree: `up` is no longer zero."""
    keys = iter(jax.random.split(jax.random.key(9), 20))
    return jax.tree.map(lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape), trainable)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("init_style", ["peft", "diffusers-old"])
def test_starts_at_the_base_model_exactly(toy, init_style):
    adapter = lora(2, 8, ALL, init_style)
    trainable = adapter.init(KEY, toy.params)
    jax.tree.map(np.testing.assert_array_equal, adapter.merge(toy.params, trainable), toy.params)
    assert all(np.any(leaf != 0) for path, leaf in flatten(trainable).items() if path.endswith("down"))


def test_merged_equals_unmerged_dense_and_convolution(toy):
    adapter = lora(2, 6, ALL)
    trainable = noisy(adapter.init(KEY, toy.params))
    merged, base, low = flatten(adapter.merge(toy.params, trainable)), flatten(toy.params), flatten(trainable)
    x = jax.random.normal(KEY, (7, 4))
    layer = "block/attn1/to_out_0"
    side = 3.0 * (x @ low[f"{layer}/down"]) @ low[f"{layer}/up"]
    np.testing.assert_allclose(x @ merged[f"{layer}/kernel"], x @ base[f"{layer}/kernel"] + side, rtol=1e-5, atol=1e-5)
    z = jax.random.normal(KEY, (2, 5, 5, 3))
    layer = "block/conv1"
    side = 3.0 * conv(conv(z, low[f"{layer}/down"]), low[f"{layer}/up"][None, None])
    np.testing.assert_allclose(conv(z, merged[f"{layer}/kernel"]), conv(z, base[f"{layer}/kernel"]) + side, atol=1e-4)
    untouched = [path for path in base if not path.endswith("kernel")]
    assert all(merged[path] is base[path] for path in untouched)
    np.testing.assert_array_equal(base["block/norm/scale"], 1)  # merge leaves its arguments alone


def test_change_is_proportional_to_alpha_over_rank_and_to_scale(toy):
    trainable = noisy(lora(2, 2, ALL).init(KEY, toy.params))

    def change(adapter, **more):
        merged = adapter.merge(toy.params, trainable, **more)
        return merged["block"]["conv1"]["kernel"] - toy.params["block"]["conv1"]["kernel"]

    unit = change(lora(2, targets=ALL))  # alpha defaults to rank
    np.testing.assert_allclose(change(lora(2, 2, ALL)), unit)
    np.testing.assert_allclose(change(lora(2, 8, ALL)), 4 * unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(change(lora(2, 8, ALL), scale=0.5), 2 * unit, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(change(lora(2, 8, ALL), scale=0.0), 0 * unit)


def test_one_scale_per_row_equals_two_models(toy):
    adapter = lora(2, 2, ALL)
    trainable = noisy(adapter.init(KEY, toy.params))
    z, t, context = jax.random.normal(KEY, (2, 4, 4, 3)), jnp.array([3, 700]), jnp.ones((2, 2, 5))

    def row(scale, z, t, context):
        return toy.eps_fn(adapter.merge(toy.params, trainable, scale), z[None], t[None], context[None])[0]

    rows = jax.jit(jax.vmap(row))(jnp.array([0.0, 1.0]), z, t, context)
    base = toy.eps_fn(toy.params, z, t, context)[0]
    tuned = toy.eps_fn(adapter.merge(toy.params, trainable), z, t, context)[1]
    np.testing.assert_allclose(rows, jnp.stack([base, tuned]), atol=1e-5)


def test_initial_distributions():
    base = {"attn1": {"to_q": {"kernel": jnp.zeros((3, 3, 25, 500))}}}
    peft = lora(200, targets=["to_q"]).init(KEY, base)["attn1"]["to_q"]["down"]
    bound = 1 / np.sqrt(9 * 25)
    assert peft.shape == (3, 3, 25, 200)
    assert 0.999 * bound < np.abs(peft).max() <= bound
    np.testing.assert_allclose(peft.std(), bound / np.sqrt(3), rtol=0.02)  # of a uniform distribution
    old = lora(200, targets=["to_q"], init_style="diffusers-old").init(KEY, base)["attn1"]["to_q"]["down"]
    np.testing.assert_allclose(old.std(), 1 / 200, rtol=0.02)
    assert np.abs(old).max() > 3 / 200


def test_a_layer_starts_the_same_whatever_else_is_a_target_and_layers_differ():
    base = {f"attn{i}": {"to_q": {"kernel": jnp.zeros((8, 8))}} for i in range(3)}
    every = lora(2).init(KEY, base)
    one = lora(2, targets=["attn1/to_q/kernel"]).init(KEY, base)
    np.testing.assert_array_equal(every["attn1"]["to_q"]["down"], one["attn1"]["to_q"]["down"])
    assert not np.allclose(every["attn0"]["to_q"]["down"], every["attn1"]["to_q"]["down"])


def test_rank_of_the_change_is_the_rank():
    base = {"attn1": {"to_q": {"kernel": jnp.zeros((12, 9))}}}
    adapter = lora(3)
    merged = adapter.merge(base, noisy(adapter.init(KEY, base)))
    assert np.linalg.matrix_rank(np.asarray(merged["attn1"]["to_q"]["kernel"]), tol=1e-3) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(4, targets=["to_k/kernel", "to_out_0/kernel"]), "rank must be at most 3.*to_out_0"),
        (lambda: lora(2, targets=["to_out_0"]), r"targets must be kernels.*to_out_0/bias.*/kernel\$"),
        (lambda: lora(2, targets=["norm"]), "targets must be kernels.*norm/scale"),
        (lambda: lora(2, targets=["to_z"]), "pattern must be.*'to_z'"),
        (lambda: lora(2, targets="atention"), "targets must be one of attention"),
        (lambda: lora(2, targets=[]), "at least one pattern"),
        (lambda: lora(0), "rank must be at least 1"),
    ],
)
def test_mistakes_are_named(toy, make, message):
    with pytest.raises(ValueError, match=message):
        make().init(KEY, toy.params)


def test_merge_with_another_base_raises(toy):
    trainable = lora(2, targets=ALL).init(KEY, toy.params)
    with pytest.raises(ValueError, match="made of layers of the base tree"):
        lora(2, targets=ALL).merge({"block": {}}, trainable)


def test_stable_diffusion_attention_count_is_exact():
    shapes = jax.eval_shape(lambda: unet.init(KEY, presets.SD15.unet))
    # per block of width c: attn1 4 layers of 2c, attn2 2 of 2c and 2 of 768 + c, each times the rank
    expected = sum(4 * (8 * c + 4 * c + 2 * (768 + c)) for c in [320] * 5 + [640] * 5 + [1280] * 6)
    assert count(lora(4), shapes) == expected == 797_184


def test_named_targets_fit_the_embedded_model():
    shapes = jax.eval_shape(lambda: unet.init(KEY, presets.NANO.unet))
    small, large = (
        flatten(jax.eval_shape(lora(16, targets=name).init, KEY, shapes)) for name in ("attention", "attention+ff+conv")
    )
    layers = {path.rpartition("/")[0] for path in large}
    kernels = {path.removesuffix("/kernel") for path in flatten(shapes) if path.endswith("/kernel")}
    left = {path for path in kernels - layers if "time_emb" not in path}
    assert left == {"conv_in", "conv_out"}
    assert len(small) == 2 * len(trees.match(flatten(shapes), ATTENTION))
    assert all("attn" in path for path in small)
    text = jax.eval_shape(lambda: clip.init(KEY, presets.NANO.text))
    assert len(flatten(jax.eval_shape(lora(4, targets="text-attention").init, KEY, text))) == 2 * 4 * 2
