"""The throughput bench without PyTorch: how it times, what it counts, and that no method's program grew unnoticed."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare
from benchmarks.throughput import counters, timing


def test_sides_take_turns_as_often_and_a_ratio_has_an_interval():
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(sides, rounds=4, block=0.0, budget=10.0)
    assert all(len(clock) == 4 and (clock >= 0).all() for part in times.values() for clock in part)
    turns = [name for name, _ in itertools.groupby(order)]
    assert order.count("a") == order.count("b")
    assert len(turns) >= 5
    found = timing.median(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert found.value == 3.0
    assert found.low < 3.0 < found.high


def test_products_are_counted_through_loops_and_branches_and_without_what_is_not_needed():
    a = jnp.ones((3, 4))

    def fn(a, x, kernel):
        unused = a @ a.T
        carry, _ = jax.lax.scan(lambda c, _: (c @ jnp.ones((4, 4)), unused[0, 0] * 0), a, None, length=5)
        conv = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.platform_dependent(
            carry, cpu=lambda c: c @ jnp.ones((4, 8)) @ jnp.ones((8, 4)), default=lambda c: c @ c.T @ c
        ), conv

    traced = jax.jit(fn).trace(a, jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5)))
    loop, branch, conv = 5 * 2 * 3 * 4 * 4, 2 * 2 * 3 * 3 * 4, 2 * 2 * 36 * 9 * 3 * 5
    assert counters.flops(traced.jaxpr) == loop + branch + conv


def test_growth_is_named_and_what_is_not_committed_too():
    known = {"m": {"flops": 100.0, "traces_again": 0}}
    assert compare.grown({"m": {"flops": 105.0, "traces_again": 0}}, known) == []
    assert compare.grown({"m": {"flops": 106.0}}, known) == ["m: flops grew from 100 to 106 by 6%"]
    assert compare.grown({"m": {"traces_again": 1}}, known) == ["m: traces_again grew from 0 to 1"]
    assert "not committed" in compare.grown({"n": {"flops": 1.0}}, known)[0]


SLOW = {"sds", "cgi-dm", "dreambooth", "lora", "bayes-norm"}  # much like one of the others
METHODS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in compare.PROGRAMS]


@pytest.mark.parametrize("method", METHODS)
def test_no_program_grew(method):
    """If it did on purpose: `python -m benchmarks.compare --write`."""
    found = compare.count(compare.PROGRAMS[method]())
    assert compare.grown({method: found}, json.loads(compare.FILE.read_text())) == []
