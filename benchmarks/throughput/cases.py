"""What a row is: our compiled program, its peers, and what both must have in common before they are timed."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.throughput import counters
from dmsec_jax import parallel
from dmsec_jax.core import trees

Arrays = dict[str, np.ndarray]
Peer = Callable[[], Callable[[], Mapping[str, Callable[[], Any]]]]
"""Builds a baseline: a function that runs it and returns named arrays, made when asked for."""

PUBLIC, PLAIN, LAYOUT, COMPILED = "public-structure", "torch-eager", "torch-channels-last", "torch-compile"
HOW = {PLAIN: "plain", LAYOUT: "channels-last", COMPILED: "compiled"}
"""The best that PyTorch can do is the fastest of these."""
OURS, SHARED_CONV, NO_YNNPACK = "ours", "ours-shared-convolutions", "ours-no-ynnpack"
"""One device, as XLA compiles it; with YNNPACK for matrix products alone, so that the cores share convolutions; without it."""
SHARED_ROWS, SHARED_NO_YNNPACK = "ours-shared-rows", "ours-shared-rows-no-ynnpack"
"""A device of each core, with its share of the batch, in the first and the last form. The best that we can do is the fastest of all."""
_TYPES = "xla_cpu_experimental_ynn_fusion_type"
OPTIONS = {
    SHARED_CONV: {_TYPES: "LIBRARY_FUSION_TYPE_DOT"},
    NO_YNNPACK: {_TYPES: ""},
    SHARED_NO_YNNPACK: {_TYPES: ""},
}
"""Of XLA's compiler. Whether YNNPACK or Eigen, which takes what is left, is faster depends on the processor."""
TOLERANCE = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row before it is measured.

    Attributes:
        op, shape, batch: its name.
        steps: in one call; times are given per step.
        fn, args: our program, jitted here.
        rows: positions of arguments whose leading axis is the batch, for a device of each core; none: the program shares its rows by itself; None: it
            stays on one device.
        named: its result -> the arrays to compare.
        peers: by name.
        loose: name of an array -> its own tolerance.
        host: where our side is not one compiled program: what is called instead.
        flops: of one call, if the program does not show them.
    """

    op: str
    shape: str
    batch: int
    steps: int = 1
    fn: Callable | None = None
    args: tuple = ()
    rows: tuple[int, ...] | None = None
    named: Callable[[Any], Arrays]
    peers: Mapping[str, Peer]
    loose: Mapping[str, float] = dataclasses.field(default_factory=dict)
    host: Callable[[], Any] | None = None
    flops: float | None = None

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape}/{self.batch}"


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our side, ready."""

    run: Callable[[], Any]
    compile_seconds: float
    trace_seconds: float
    flops: float
    """Of matrix products and convolutions, per call."""
    counted_flops: float = 0.0
    """Of everything, by XLA, which counts the body of a loop once: `limits` says what that means."""
    counted_bytes: float = 0.0
    temp_bytes: int = 0
    peak_bytes: int = 0
    """Arguments, results and temporaries together."""


def variants(case: Case, threads: int) -> dict[str, Ours]:
    """All ways in which our side can use the cores; the first is on one device, as XLA compiles it."""
    found = {OURS: build(case)}
    if case.host is None and threads > 1:
        found |= {form: build(case, OPTIONS[form]) for form in (SHARED_CONV, NO_YNNPACK)}
        devices = jax.local_device_count()
        if case.rows is not None and devices > 1 and case.batch % devices == 0:
            found |= {form: _shared(case, devices, OPTIONS.get(form)) for form in (SHARED_ROWS, SHARED_NO_YNNPACK)}
    return found


def _shared(case: Case, devices: int, options: Mapping[str, str] | None) -> Ours:
    mesh = parallel.make_mesh(f"data={devices}")
    arrays = lambda leaf: isinstance(leaf, jax.Array)  # numbers of a config stay as they are
    put = lambda tree: jax.tree.map(lambda leaf: parallel.replicate(leaf, mesh) if arrays(leaf) else leaf, tree)
    share = lambda i, arg: parallel.shard_rows(arg, mesh) if i in case.rows else put(arg)
    shared = dataclasses.replace(case, args=tuple(share(i, arg) for i, arg in enumerate(case.args)))
    with jax.set_mesh(mesh):
        return build(shared, options)


def build(case: Case, options: Mapping[str, str] | None = None) -> Ours:
    """Traces and compiles our side, on the devices of its arguments, with options of XLA's compiler."""
    if case.host is not None:
        return Ours(case.host, 0.0, 0.0, case.flops or 0.0)
    began = time.perf_counter()
    traced = jax.jit(case.fn).trace(*case.args)
    flops = counters.flops(traced.jaxpr) if case.flops is None else case.flops
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=options and dict(options))
    done = time.perf_counter()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Ours(
        run=lambda: jax.block_until_ready(compiled(*case.args)),
        compile_seconds=done - middle,
        trace_seconds=middle - began,
        flops=flops,
        counted_flops=cost["flops"],
        counted_bytes=cost["bytes accessed"],
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=counters.peak_bytes(memory),
    )


def differences(case: Case, ours: Arrays, theirs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Relative error of every array that both have, in the Euclidean norm.

    Raises:
        AssertionError: if there is none, or one is larger than allowed.
    """
    found = {}
    for name in ours.keys() & theirs.keys():
        one, other = _flat(ours[name]), _flat(theirs[name]())
        assert one.shape == other.shape, f"{case.name}, {name}: shapes {one.shape} and {other.shape}"
        found[name] = float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))
        limit = case.loose.get(name, TOLERANCE)
        assert found[name] <= limit, f"{case.name}: {name} differs by {found[name]:.2g}, allowed {limit:.2g}"
    assert found, f"{case.name}: nothing to compare"
    return found


def _flat(value: Any) -> np.ndarray:
    if isinstance(value, Mapping):
        leaves = trees.flatten(value)
        return np.concatenate([np.asarray(leaves[path], np.float64).ravel() for path in sorted(leaves)])
    return np.asarray(value, np.float64)
