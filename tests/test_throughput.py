"""The throughput bench without PyTorch: how it times, what it counts, what binds a row, and that no method's program grew unnoticed."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare
from benchmarks.figures import common
from benchmarks.figures import throughput as figures
from benchmarks.throughput import counters, limits, process, timing


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


def test_only_a_short_call_has_an_untimed_one_before_it(monkeypatch):
    called, seconds = [], {"short": timing.WARM / 2, "long": 2 * timing.WARM}

    def once(run, calls=1):
        for _ in range(calls):
            run()
        return seconds[called[-1]], 0.0

    monkeypatch.setattr(timing, "_once", once)
    sides = {name: lambda name=name: called.append(name) for name in seconds}
    timing.interleaved(sides, rounds=3, block=0.0, budget=10.0)
    assert (called.count("short"), called.count("long")) == (1 + 2 * 3, 1 + 3)


def test_a_process_is_kept_to_as_many_cores_as_it_has_threads():
    assert process.last([0, 1, 2, 5], 0) == [0, 1, 2, 5]
    assert process.last([0, 1, 2, 5], 2) == [2, 5]
    with pytest.raises(ValueError, match="at most 4"):
        process.last([0, 1, 2, 5], 5)


@pytest.mark.parametrize(
    ("products", "memory", "by"),
    [(0.6, 0.9, "products"), (0.4, 0.9, "memory"), (0.4, 1.5, "memory"), (0.4, 0.4, "overheads")],
)
def test_what_binds_a_row(products, memory, by):
    assert limits.bound(products, memory) == by


def test_an_exponent_is_the_slope_of_logarithms():
    found = timing.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0])
    assert found == pytest.approx((2.0, 2.0, 2.0))
    found = timing.exponent([1, 2, 4, 8], [3.0, 13.0, 45.0, 200.0])
    assert 1.7 < found.low < 2.0 < found.high < 2.3


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


def test_what_a_program_holds_at_most_leaves_out_what_was_given_to_it():
    held = lambda donated: counters.peak_bytes(
        jax.jit(lambda x, y: x + y, donate_argnums=(0,) if donated else ())
        .lower(jnp.ones(1000), jnp.ones(1000))
        .compile()
        .memory_analysis()
    )
    assert held(True) == 8000
    assert held(False) == 12000


def test_the_body_of_a_loop_is_counted_once_by_xla():
    """`limits` and `measuring` take XLA's count as that of one step."""
    count = lambda length: (
        jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=length)[0])
        .lower(jnp.ones((8, 8)))
        .compile()
        .cost_analysis()
    )
    assert count(5)["bytes accessed"] == count(50)["bytes accessed"] > 0
    assert count(50)["flops"] < 2 * 2 * 8**3


def test_growth_is_named_and_what_is_not_committed_too():
    known = {"m": {"flops": 100.0, "traces_again": 0}}
    assert compare.grown({"m": {"flops": 105.0, "traces_again": 0}}, known) == []
    assert compare.grown({"m": {"flops": 106.0}}, known) == ["m: flops grew from 100 to 106 by 6%"]
    assert compare.grown({"m": {"traces_again": 1}}, known) == ["m: traces_again grew from 0 to 1"]
    assert "not committed" in compare.grown({"n": {"flops": 1.0}}, known)[0]
    assert "not committed" in compare.grown({"m": {"temp_bytes": 1.0}}, known)[0]


def test_numbers_that_are_part_of_a_program_make_a_second_executable():
    fn = lambda x, cfg: x * cfg
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    one = compare.Program(fn, (x, 1.0), (x, 2.0), [])
    two = compare.Program(fn, (x, 1.0), (x, 2), [])
    assert [compare.count(program)["executables"] for program in (one, two)] == [1, 2]


SLOW = {"sds", "cgi-dm", "dreambooth", "lora", "oft", "bayes-norm", "bayes-linear", "bayes-lora"}  # much like others
METHODS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in compare.PROGRAMS]


@pytest.mark.parametrize("method", METHODS)
def test_no_program_grew(method):
    """If it did on purpose: `python -m benchmarks.compare --compiled --write`."""
    found = compare.count(compare.PROGRAMS[method]())
    assert compare.grown({method: found}, json.loads(compare.FILE.read_text())) == []


@pytest.mark.slow
@pytest.mark.shipped
@pytest.mark.parametrize("method", compare.PROGRAMS)
def test_no_program_needs_more_memory(method):
    """Compiled, so slow, and as the library ships, which the committed temporaries are of."""
    found = compare.count(compare.PROGRAMS[method](), compiled=True)
    assert compare.grown({method: found}, json.loads(compare.FILE.read_text())) == []


CONFIG = {"clock": "wall", "peers": [], "quick": False}
CASE = {"op": "unet-forward", "shape": "embedded", "batch": 8, "threads": 2}


def row(metric, value, method="ours", case=CASE, **more):
    return {"metric": metric, "method": method, "value": value, "low": value, "high": value, "case": case} | more


def written(folder, name, rows, processor=None, **config):
    path = folder / "cpu" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    device = {"processor": processor or f"CPU, family 1, model {name}"}
    path.write_text(json.dumps({"config": CONFIG | config, "device": device, "rows": rows}))


def ratio_rows(ratio):
    wall, cpu = CASE | {"clock": "wall"}, CASE | {"clock": "cpu"}
    ours = {"seconds": 0.01, "gflops": 90.0, "peak_share": 0.6, "memory_share": 0.7}
    return [
        row("matrix_peak", 150.0, case={"clock": "wall", "threads": 2}),
        row("matrix_peak", 100.0, "torch", {"clock": "wall", "threads": 2}),
        row("bandwidth", 20.0, case={"clock": "wall", "threads": 2}),
        *(row(metric, value, case=wall) for metric, value in ours.items()),
        *(row("seconds", value, f"ours-{way}", wall) for way, value in {"shared-rows": 0.008, "best": 0.008}.items()),
        row("ratio", ratio, "torch-best", wall),
        row("ratio", 9.0, "torch-best", cpu),
        row("ratio", 4.0, "public-structure", wall),
        row("bytes", 2e6),
        row("intensity", 30.0),
    ]


@pytest.mark.parametrize("config", [{"clock": "cpu"}, {"peers": ["torch-eager"]}, {"quick": True}])
def test_incomplete_results_are_not_shown(tmp_path, config):
    written(tmp_path, "1", ratio_rows(1.5), **config)
    assert figures.measured(tmp_path) == {}
    assert figures.block({}, []) == "Not measured yet."


def test_results_on_other_threads_are_not_shown(tmp_path):
    written(tmp_path, "1", [part | {"case": part["case"] | {"threads": 1}} for part in ratio_rows(1.5)])
    assert figures.measured(tmp_path) == {}


def test_the_newest_complete_row_is_shown_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(common._places, "root", tmp_path)
    written(tmp_path, "1", ratio_rows(1.5), "CPU, family 1")
    written(tmp_path, "2", ratio_rows(0.9), "CPU, family 1")
    text = figures.block(figures.measured(tmp_path), [])
    assert (
        "| unet-forward/embedded/8 | 8 ms | a device of each core | 0.90 [0.90, 0.90] | 4.00 [4.00, 4.00] | 90 | 60% of 150 | 2 | 30 | products |"
        in text
    )
    assert "`python -m benchmarks.throughput --rows unet-forward/embedded/8`" in text
    assert "faster in 0 of 1 rows" in text
    assert "Behind: unet-forward/embedded/8 0.90, bound by products." in text
    assert (
        "1 rows on CPU, family 1, 2 threads: matrix products reach 150 GFLOP/s here and 100 in PyTorch, memory 20 GB/s"
        in text
    )
    assert "1.50" not in text, "measured anew since"
    assert (tmp_path / "benchmarks/results/throughput/ratios.svg").is_file()


def test_kinds_of_processors_have_rows_of_their_own_and_runs_their_own_limits(tmp_path, monkeypatch):
    monkeypatch.setitem(common._places, "root", tmp_path)
    written(tmp_path, "1", ratio_rows(1.5), "x86_64")
    for name, peak, batch in (("2", 300.0, 8), ("3", 310.0, 32)):
        machine, rest = ratio_rows(0.9)[:3], ratio_rows(0.9)[3:]
        rest = [part | {"case": part["case"] | {"batch": batch}} for part in rest]
        written(tmp_path, name, [machine[0] | {"value": peak}, *machine[1:], *rest], "CPU, family 1")
    text = figures.block(figures.measured(tmp_path), [])
    assert all(f"60% of {peak} " in text for peak in (150, 300, 310))
    newer, older = text.index("2 rows on CPU, family 1, 2"), text.index("1 rows on x86_64 of a kind that is not on")
    for part, *said in (
        (text[newer:older], "matrix products reach 300 to 310 GFLOP/s here", "in 0 of 2 rows"),
        (text[older:], "matrix products reach 150 GFLOP/s here", "in 1 of 1 rows"),
        (text, "| 0.90 [0.90, 0.90]", "| 1.50 [1.50, 1.50]"),
    ):
        assert all(words in part for words in said)


def test_growth_is_shown_with_its_exponents(tmp_path, monkeypatch):
    monkeypatch.setitem(common._places, "root", tmp_path)
    names = {"op": "spot-step", "along": "variables", "threads": 2}
    points = [row("seconds", 0.001 * size**2, case=names | {"size": size}) for size in (10, 20, 40)]
    memory = [row("peak_bytes", 1e6, case=names | {"size": 40})]
    slope = [row("seconds_exponent", 2.0, case=names)]
    loads = [
        row("compile_seconds", value, case=CASE | {"cache": cache})
        for cache, value in {"empty": 9.0, "filled": 1.0}.items()
    ]
    written(tmp_path, "1", [*points, *memory, *slope, *loads])
    text = figures.block({}, figures.grown(tmp_path))
    assert "| spot-step | variables | 10 to 40 | 2.00 [2.00, 2.00] | - | 1.6 | 1 |" in text
    assert "| unet-forward/embedded/8 | - | 9.00 [9.00, 9.00] | 1.00 [1.00, 1.00] |" in text
    assert (tmp_path / "benchmarks/results/growth/growth.svg").is_file()
