import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.models import clip, presets

CFG = presets.TINY.text
IDS = np.array([[598, 5, 7, 599, 599], [598, 9, 2, 3, 599]], np.int32)
apply = jax.jit(clip.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params(weights):
    return weights(clip.init, CFG)


@pytest.fixture(scope="module")
def output(params):
    return apply(CFG, params, IDS)


def test_shapes_and_dtypes(output):
    assert [leaf.shape for leaf in output] == [(2, 5, 8), (2, 5, 8), (2, 8)]
    assert {leaf.dtype for leaf in output} == {np.dtype("float32")}


def test_a_token_sees_itself_and_those_before_it(params, output):
    changed = IDS.copy()
    changed[0, 2] = 11
    other = apply(CFG, params, changed)
    np.testing.assert_allclose(other.last_hidden[0, :2], output.last_hidden[0, :2], atol=1e-6)
    assert np.all(np.max(np.abs(other.last_hidden[0, 2:] - output.last_hidden[0, 2:]), axis=-1) > 1e-3)
    np.testing.assert_allclose(other.last_hidden[1], output.last_hidden[1], atol=1e-6)


def test_position_matters(params):
    hidden = apply(CFG, params, np.full((1, 5), 7, np.int32)).last_hidden[0]
    assert np.max(np.abs(hidden[1] - hidden[0])) > 1e-3


def test_pooled_is_the_first_end_token(output):
    np.testing.assert_array_equal(output.pooled[0], output.last_hidden[0, 3])
    np.testing.assert_array_equal(output.pooled[1], output.last_hidden[1, 4])


def test_legacy_end_token_means_the_largest_id(params):
    legacy = dataclasses.replace(CFG, eos_token_id=2)
    out = apply(legacy, params, IDS)  # the second row holds a 2, at position 2
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden[0, 3])
    np.testing.assert_array_equal(out.pooled[1], out.last_hidden[1, 4])


def test_an_end_token_that_is_not_the_largest_id_is_found(params):
    out = apply(dataclasses.replace(CFG, eos_token_id=7), params, IDS[:1])
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden[0, 2])


def test_penultimate_is_what_the_last_layer_reads(params, output):
    layers = {name: tree for name, tree in params["encoder"].items() if name != "layers_1"}
    shorter = apply(dataclasses.replace(CFG, num_hidden_layers=1), params | {"encoder": layers}, IDS)
    x, norm = output.penultimate, params["final_layer_norm"]
    normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(shorter.last_hidden, normal * norm["scale"] + norm["bias"], atol=1e-5)


def test_bfloat16_stays_close_and_returns_float32(params, output):
    low = apply(dataclasses.replace(CFG, dtype="bfloat16"), params, IDS)
    assert low.last_hidden.dtype == jnp.float32
    error = np.sqrt(np.mean((low.last_hidden - output.last_hidden) ** 2) / np.mean(output.last_hidden**2))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(("name", "at_one"), [("quick_gelu", 0.845796), ("gelu", 0.841345)])
def test_activations_by_value(name, at_one):
    assert clip.ACTIVATIONS[name](jnp.float32(1)) == pytest.approx(at_one, abs=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"ids must be \[B, L\], got shape \(5,\)"),
        (IDS.astype(np.float32), "ids must be integers"),
        (np.zeros((1, 17), np.int32), "ids must be at most 16 tokens long, got 17 tokens"),
        (np.array([[598, 600]]), r"ids must be in \[0, 600\), got \[598, 600\]"),
        (np.array([[-1, 3]]), r"ids must be in \[0, 600\)"),
    ],
)
def test_bad_ids_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        clip.check_ids(CFG, ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads=3, got 8"),
        ({"hidden_act": "relu"}, "hidden_act must be one of .* got 'relu'"),
        ({"dtype": "float16"}, "dtype must be .* got 'float16'"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        clip.init(jax.random.key(0), dataclasses.replace(CFG, **changes))
