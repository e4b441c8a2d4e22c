import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from dmsec_jax.checkpoints import mapping
from dmsec_jax.checkpoints.mapping import Rules, key_of, path_of, to_state, to_tree
from dmsec_jax.core.trees import flatten, unflatten

SHAPES = {
    "conv_in/kernel": (3, 3, 4, 8),
    "conv_in/bias": (8,),
    "down_blocks_0/attentions_1/proj_in/kernel": (1, 1, 8, 8),
    "down_blocks_0/attentions_1/transformer_blocks_0/ff/net_0/proj/kernel": (8, 64),
    "down_blocks_0/attentions_1/transformer_blocks_0/attn1/to_out_0/kernel": (8, 8),
    "norm1/scale": (8,),
    "norm1/bias": (8,),
    "time_embedding/linear_1/kernel": (8, 32),
    "token_embedding/embedding": (50, 8),
}
KEYS = [
    "conv_in.weight",
    "conv_in.bias",
    "down_blocks.0.attentions.1.proj_in.weight",
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight",
    "norm1.weight",
    "norm1.bias",
    "time_embedding.linear_1.weight",
    "token_embedding.weight",
]


def tree(shapes=SHAPES, seed=0):
    draw = np.random.default_rng(seed)
    return unflatten({path: draw.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})


def target(shapes=SHAPES):
    return unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


def assert_equal(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], strict=True)


def test_names_follow_the_state_dict():
    assert to_state(tree(), Rules()).keys() == set(KEYS)


def test_layouts_follow_pytorch():
    params = tree()
    state = to_state(params, Rules())
    assert state["conv_in.weight"][5, 2, 0, 1] == params["conv_in"]["kernel"][0, 1, 2, 5]
    linear = params["time_embedding"]["linear_1"]["kernel"]
    assert state["time_embedding.linear_1.weight"][30, 7] == linear[7, 30]
    square = flatten(params)["down_blocks_0/attentions_1/transformer_blocks_0/attn1/to_out_0/kernel"]
    np.testing.assert_array_equal(state[KEYS[4]], square.T)  # no shape would tell
    np.testing.assert_array_equal(state["token_embedding.weight"], params["token_embedding"]["embedding"])


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
def test_round_trip_in_float32_copies(dtype):
    state = {key: value.astype(dtype) for key, value in to_state(tree(), Rules()).items()}
    read = to_tree(state, Rules(), target())
    for path, leaf in flatten(read).items():
        assert leaf.dtype == np.float32
        assert leaf.flags.c_contiguous
        assert leaf.flags.writeable
        assert leaf.base is None, path
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), tree())
    assert_equal(read, expected)


names = st.from_regex(r"[a-z]{1,5}[0-9]?", fullmatch=True)
segment = st.one_of(names, st.tuples(names, st.lists(st.integers(0, 12), min_size=1, max_size=2)))


@given(st.lists(segment, min_size=1, max_size=5), st.sampled_from(["weight", "bias", "class_embedding"]))
def test_names_are_one_to_one(segments, leaf):
    key = ".".join([s if isinstance(s, str) else ".".join([s[0], *map(str, s[1])]) for s in segments] + [leaf])
    path = path_of(key).removesuffix("weight") + ("kernel" if leaf == "weight" else "")
    assert key_of(path, Rules()) == key


def test_one_error_lists_everything_that_is_wrong():
    state = dict(to_state(tree(), Rules()))
    del state["conv_in.bias"], state["time_embedding.linear_1.weight"]
    state["conv_in.weight"] = np.zeros((8, 9, 3, 3), np.float32)
    state["norm1.bias"] = np.zeros(8, np.int8)
    state["lora.weight"] = np.zeros((2, 3), np.float32)
    state["norm1.weight.more"] = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="unet must be exactly the tensors") as caught:
        to_tree(state, Rules(), target(), "unet")
    message = str(caught.value)
    assert "1 mis-shaped, 2 missing, 1 not floating point, 2 unused" in message
    assert message.split("\n")[1:] == [
        "  mis-shaped: conv_in.weight [8, 9, 3, 3], expected [8, 4, 3, 3]",
        "  missing: conv_in.bias [8]",
        "  missing: time_embedding.linear_1.weight [32, 8]",
        "  not floating point: norm1.bias int8",
        "  unused: lora.weight [2, 3]",
        "  unused: norm1.weight.more [8]",
    ]


@pytest.mark.parametrize("shape", [(), (8,), (8, 4), (8, 4, 3), (4, 8, 3, 3), (8, 4, 1, 1), (8, 4, 3, 3, 1)])
def test_any_other_shape_of_a_kernel_is_refused(shape):
    state = dict(to_state(tree(), Rules()))
    state["conv_in.weight"] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match="1 mis-shaped"):
        to_tree(state, Rules(), target())


def test_swapped_linear_layer_is_mis_shaped():
    state = dict(to_state(tree(), Rules()))
    state[KEYS[3]] = state[KEYS[3]].T
    with pytest.raises(ValueError, match=r"\[8, 64\], expected \[64, 8\]"):
        to_tree(state, Rules(), target())


def test_linear_layers_and_pointwise_convolutions_stand_in_for_each_other():
    state = dict(to_state(tree(), Rules()))
    assert state[KEYS[2]].shape == (8, 8, 1, 1)
    state[KEYS[2]] = state[KEYS[2]][:, :, 0, 0]
    state[KEYS[4]] = state[KEYS[4]][:, :, None, None]
    assert_equal(to_tree(state, Rules(), target()), tree())


def test_same_parameter_under_two_names_is_refused():
    state = to_state({"final_layer_norm": {"bias": np.ones(4, np.float32)}}, mapping.TEXT_ENCODER)
    both = state | {"final_layer_norm.bias": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=r"given twice: final_layer_norm\.bias \[4\] and text_model\.final_layer_norm"):
        to_tree(both, mapping.TEXT_ENCODER, target({"final_layer_norm/bias": (4,)}))


def test_text_encoder_prefix_is_optional_and_position_ids_hold_nothing():
    params = tree({"embeddings/token_embedding/embedding": (9, 4), "encoder/layers_0/mlp/fc1/kernel": (4, 16)})
    shapes = jax.eval_shape(lambda: params)
    state = to_state(params, mapping.TEXT_ENCODER)
    assert set(state) == {
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    }
    ids = np.arange(77)[None]
    for prefix in ("text_model.", ""):
        named = {prefix + key.removeprefix("text_model."): value for key, value in state.items()}
        named[prefix + "embeddings.position_ids"] = ids
        assert_equal(to_tree(named, mapping.TEXT_ENCODER, shapes), params)


@pytest.mark.parametrize("pointwise", [False, True])
def test_old_names_of_the_autoencoder_attention(pointwise):
    where = "encoder/mid_block/attentions_0"
    params = tree(
        {f"{where}/{name}/{leaf}": (6, 6) if leaf == "kernel" else (6,)
         for name in ("to_q", "to_k", "to_v", "to_out_0") for leaf in ("kernel", "bias")}
    )  # fmt: skip
    state = {}
    for key, value in to_state(params, mapping.VAE).items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value[:, :, None, None] if pointwise and value.ndim == 2 else value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    assert_equal(to_tree(state, mapping.VAE, jax.eval_shape(lambda: params)), params)


def test_two_paths_with_one_key_are_refused():
    with pytest.raises(ValueError, match=r"a\.weight twice"):
        to_state({"a": {"kernel": np.ones((2, 2)), "scale": np.ones(2)}}, Rules())


def test_kernel_of_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"kernel a/kernel must be \[I, O\]"):
        to_state({"a": {"kernel": np.ones((2, 2, 2))}}, Rules())
