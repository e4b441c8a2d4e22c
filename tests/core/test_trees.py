import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsec_jax.core import trees

NAMES = st.text("abkz_-.019", min_size=1, max_size=3)
LEAVES = st.integers().map(np.asarray)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4), max_leaves=12).filter(
    lambda tree: isinstance(tree, dict)
)
TREE = {"unet": {"conv_in": {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8)}}, "scale": np.zeros(())}


@given(TREES)
def test_unflatten_inverts_flatten(tree):
    flat = trees.flatten(tree)
    assert trees.unflatten(flat) == tree
    assert trees.unflatten(dict(reversed(flat.items()))) == tree


@given(TREES)
def test_flatten_keeps_the_leaf_order_of_jax(tree):
    ours, theirs = list(trees.flatten(tree).values()), jax.tree.leaves(tree)
    assert len(ours) == len(theirs)
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


@given(TREES)
def test_map_paths_sees_each_leaf_once_with_its_path(tree):
    flat = trees.flatten(tree)
    named = trees.map_paths(lambda path, leaf: (path, leaf), tree)
    assert trees.flatten(named) == {path: (path, leaf) for path, leaf in flat.items()}


def test_flatten_joins_names_with_slashes():
    assert list(trees.flatten(TREE)) == ["scale", "unet/conv_in/bias", "unet/conv_in/kernel"]
    assert list(trees.flatten(TREE, "model/")) == [
        "model/scale",
        "model/unet/conv_in/bias",
        "model/unet/conv_in/kernel",
    ]


@pytest.mark.parametrize("name", ["a/b", ""])
def test_flatten_refuses_names_it_could_not_restore(name):
    with pytest.raises(ValueError, match="made of names"):
        trees.flatten({"outer": {name: np.zeros(1)}})


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c/d")])
def test_unflatten_refuses_a_leaf_that_is_a_branch(paths):
    with pytest.raises(ValueError, match="prefixes of one another"):
        trees.unflatten(dict.fromkeys(paths, 0))


def test_unflatten_refuses_nested_input():
    with pytest.raises(ValueError, match="flatten it first"):
        trees.unflatten({"a/b": {"c": 1}})


def test_count_multiplies_shapes_and_works_without_arrays():
    assert trees.count(TREE) == 3 * 3 * 4 * 8 + 8 + 1
    assert trees.count(jax.eval_shape(lambda: TREE)) == trees.count(TREE)
    assert trees.count({"huge": jax.ShapeDtypeStruct((2**20, 2**20, 2**20, 2**10), np.float32)}) == 2**70


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["kernel$"], ["b/kernel", "a/to_q/kernel"]),
        (["to_q", "b/"], ["b/kernel", "a/to_q/kernel", "a/to_q/bias"]),
        (["kernel", "to_q/kernel"], ["b/kernel", "a/to_q/kernel"]),
        ([], []),
    ],
)
def test_match_keeps_the_order_of_the_paths(patterns, chosen):
    assert trees.match(["b/kernel", "a/to_q/kernel", "a/to_q/bias"], patterns) == chosen
    assert trees.match(iter(["b/kernel", "a/to_q/kernel", "a/to_q/bias"]), iter(patterns)) == chosen


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["kernel", "to_query"], "'to_query'; paths look like"),
        (["(kernel"], "a regular expression, got '\\(kernel'"),
        ("kernel", r"write \['kernel'\]"),
    ],
)
def test_match_refuses_patterns_that_would_choose_nothing_or_everything(patterns, message):
    with pytest.raises(ValueError, match=message):
        trees.match(["a/kernel"], patterns)
