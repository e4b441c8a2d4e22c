import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import presets, unet

TINY = presets.TINY.unet
TRACED = []  # configs, one entry per compilation


def counted(cfg, *args):
    TRACED.append(cfg)
    return unet.apply(cfg, *args)


apply = jax.jit(counted, static_argnums=0)


@pytest.fixture(scope="module")
def params(weights):
    return weights(unet.init, TINY)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(2, 4, 8, 4), jnp.array([3, 700]), draw(2, 5, 8)


@pytest.fixture(scope="module")
def output(params, batch):
    return apply(TINY, params, *batch)


def test_output_is_float32_of_the_latent_shape(output):
    assert (output.shape, output.dtype) == ((2, 4, 8, 4), jnp.float32)
    assert np.isfinite(output).all()


@pytest.mark.slow  # compiles for long
def test_bfloat16_stays_close_and_returns_float32(params, batch, output):
    low = apply(dataclasses.replace(TINY, dtype="bfloat16"), params, *batch)
    assert low.dtype == jnp.float32
    error = np.sqrt(np.mean((low - output) ** 2) / np.mean(output**2))
    assert 1e-4 < error < 0.05  # bfloat16 was used (2^-9 per rounding), in the products only


def test_every_input_matters_and_examples_do_not_mix(params, batch, output):
    z_t, t, context = batch
    for changed in ((z_t.at[0].add(0.1), t, context), (z_t, t.at[0].set(4), context), (z_t, t, context.at[0].add(0.1))):
        other = apply(TINY, params, *changed)
        assert np.max(np.abs(other[0] - output[0])) > 1e-4
        np.testing.assert_allclose(other[1], output[1], atol=1e-5)


def test_other_parameters_do_not_recompile(weights, params, batch, output):
    assert TRACED.count(TINY) == 1
    for tree in (weights(unet.init, TINY, 1), jax.tree.map(jnp.asarray, params)):
        other = apply(TINY, tree, *batch)
        assert TRACED.count(TINY) == 1
    np.testing.assert_array_equal(other, output)


def test_half_precision_stays_near_single(params, batch, output):
    half = apply(dataclasses.replace(TINY, dtype="bfloat16"), params, *batch)
    error = np.linalg.norm(np.asarray(half, np.float32) - output) / np.linalg.norm(output)
    assert 0 < error < 16 * 2**-9, (
        "roundings to 8 bits, of which a few dozen add up at random; 0.016 when this was written"
    )


def test_remat_covers_every_block_and_keeps_names(params, batch):
    cfg = dataclasses.replace(TINY, remat="block")
    shapes = jax.eval_shape(lambda key: unet.init(key, cfg), jax.random.key(0))
    assert trees.flatten(shapes).keys() == trees.flatten(params).keys()
    blocks = {match[0] for path in trees.flatten(params) if (match := re.match(r".*/(resnets|attentions)_\d+/", path))}
    for remat, expected in (("block", len(blocks)), ("none", 0)):
        program = jax.make_jaxpr(functools.partial(unet.apply, dataclasses.replace(TINY, remat=remat)))(params, *batch)
        names = [eqn.primitive.name for eqn in program.eqns]
        assert sum(name in ("checkpoint", "remat2") for name in names) == expected


@pytest.mark.slow  # compiles for long
def test_remat_changes_no_number(weights, batch):
    x, time, context = jnp.concatenate([batch[0]] * 2, -1), jnp.ones((2, 32)), batch[2]
    stored, recomputed = (
        unet.DownBlock(dataclasses.replace(TINY, remat=remat), 8, 2, 1, False) for remat in ("none", "block")
    )
    params = weights(lambda key, cfg: stored.init(key, x, time, context)["params"], None)

    @jax.jit
    def gradients(*args):
        loss = lambda block: lambda params, *args: jnp.sum(jnp.sin(block.apply({"params": params}, *args)[0]))
        return [jax.grad(loss(block), (0, 1, 2, 3))(*args) for block in (stored, recomputed)]

    first, second = gradients(params, x, time, context)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(first))


def test_levels_may_differ_in_heads_and_depth():
    cfg = dataclasses.replace(
        TINY,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(1, 4),
        transformer_layers_per_block=(1, 2),
    )
    paths = trees.flatten(jax.eval_shape(lambda key: unet.init(key, cfg), jax.random.key(0))).keys()
    deep = {path.split("/transformer_blocks_1/")[0] for path in paths if "/transformer_blocks_1/" in path}
    assert deep == {f"{block}/attentions_{i}" for block, n in COARSE.items() for i in range(n)}


COARSE = {"down_blocks_1": 1, "mid_block": 1, "up_blocks_0": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types must .* got 'AttnDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D", "DownBlock2D")}, "up_block_types must .* got 'DownBlock2D'"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types must be 2 long"),
        ({"attention_head_dim": (2, 2, 2)}, "attention_head_dim must be 2 long"),
        ({"attention_head_dim": 3}, "block_out_channels must be multiples of attention_head_dim=3, got 8"),
        ({"norm_num_groups": 16}, "block_out_channels must be multiples of norm_num_groups=16, got 8"),
        ({"dtype": "float16"}, "dtype must be .* got 'float16'"),
        ({"remat": "full"}, "remat must be .* got 'full'"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        unet.init(jax.random.key(0), dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize(
    ("z_t", "t", "context", "message"),
    [
        ((2, 8, 8), (2,), (2, 5, 8), r"z_t must be \[B, h, w, 4\]"),
        ((2, 4, 8, 8), (2,), (2, 5, 8), r"z_t must be \[B, h, w, 4\]"),
        ((2, 8, 7, 4), (2,), (2, 5, 8), r"z_t must be .* divisible by 2"),
        ((2, 8, 8, 4), (), (2, 5, 8), r"t must be \[B\] = \[2\]"),
        ((2, 8, 8, 4), (1,), (2, 5, 8), r"t must be \[B\] = \[2\]"),
        ((2, 8, 8, 4), (2,), (2, 5, 16), r"context must be \[2, L, 8\], got shape \(2, 5, 16\); use the text encoder"),
        ((2, 8, 8, 4), (2,), (1, 5, 8), r"context must be \[2, L, 8\]"),
        ((2, 8, 8, 4), (2,), (5, 8), r"context must be \[2, L, 8\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(z_t, t, context, message):
    with pytest.raises(ValueError, match=message):
        unet.check_inputs(TINY, z_t, t, context)


def test_apply_checks_its_inputs(params, batch):
    z_t, t, context = batch
    with pytest.raises(ValueError, match="z_t must be of height and width divisible by 2"):
        unet.apply(TINY, params, z_t[:, :3], t, context)
    with pytest.raises(ValueError, match="context must be"):
        unet.apply(TINY, params, z_t, t, context[..., :4])
    with pytest.raises(ValueError, match="remat must be"):
        unet.apply(dataclasses.replace(TINY, remat="all"), params, *batch)
