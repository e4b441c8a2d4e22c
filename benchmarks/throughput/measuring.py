"""One row: built, compared, timed, and held against the machine's limits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.throughput import cases, limits, timing
from benchmarks.throughput.cases import COMPILED, OURS, PUBLIC, Case, Ours
from benchmarks.throughput.limits import Peaks
from benchmarks.throughput.timing import Ratio, Times
from dmsec_jax.report.result import Row

CLOCKS = ("wall", "cpu")
BEST = "torch-best"
"""The fastest baseline but the public structure."""
OURS_BEST = "ours-best"
"""The fastest of our ways of using the cores."""
HEAD = [
    "row",
    "ours",
    "how",
    "best PyTorch",
    "ratio",
    "which",
    "public / ours",
    "GFLOP/s",
    "of peak",
    "MB",
    "FLOP/B",
    "bound by",
    "compile",
    "differ by",
    "n",
]


class Work(NamedTuple):
    """Of a step: what the traced program's products need, and what XLA counts."""

    flops: float
    counted_flops: float
    counted_bytes: float


class Timed(NamedTuple):
    """A row on one clock."""

    seconds: dict[str, Ratio]
    """Of a step of each side."""
    fastest: str
    """Of our ways of using the cores."""
    ratios: dict[str, Ratio]
    """Of each baseline to that."""
    best: str | None
    """The fastest baseline that is not the public structure."""
    rate: float
    """FLOP/s."""
    shares: tuple[float, float]
    """Of the time, that products and memory explain."""
    rounds: int


def measure(case: Case, cfg: Any, peaks: Peaks, threads: int) -> tuple[list[Row], list[str]]:
    """Builds, compares and times one row: what goes to the file, and a line to read.

    Raises:
        AssertionError: if both sides did not compute the same.
    """
    mine = cases.variants(case, threads)
    ours = mine[OURS]
    named, error = case.named(ours.run()), 0.0
    for own in [own for name, own in mine.items() if name != OURS]:
        outcome = case.named(own.run())
        cases.differences(case, named, {name: lambda array=array: array for name, array in outcome.items()})
    sides: dict[str, Callable] = {name: own.run for name, own in mine.items()}
    for name, build in case.peers.items():
        if (cfg.peers and name not in cfg.peers) or (cfg.quick and name == COMPILED):
            continue
        built = build()
        compared, timed = built if isinstance(built, tuple) else (built, built)
        error = max(error, *cases.differences(case, named, compared()).values())
        timed()
        sides[name] = timed
    times = timing.interleaved(sides, rounds=cfg.rounds, block=cfg.block, budget=cfg.budget)
    work = Work(ours.flops / case.steps, ours.counted_flops, ours.counted_bytes)
    clocks = {clock: _timed(times, clock, case.steps, work, peaks) for clock in CLOCKS}
    names = {"op": case.op, "shape": case.shape, "batch": case.batch, "dtype": "float32", "threads": threads}
    return _rows(names, ours, work, clocks), _line(case.name, ours, work, clocks[cfg.clock], error)


def of_machine(peaks: Peaks, threads: int) -> list[Row]:
    """The limits themselves."""
    found = []
    for clock in CLOCKS:
        row = lambda metric, unit, method, value, case: Row(
            bench="throughput", metric=metric, unit=unit, method=method, value=value, n=1, case=case
        )
        case = {"clock": clock, "threads": threads}
        found.append(row("matrix_peak", "GFLOP/s", "ours", peaks.ours[clock], case))
        found.append(row("matrix_peak", "GFLOP/s", "torch", peaks.torch[clock], case))
        found.append(row("bandwidth", "GB/s", "ours", peaks.memory[clock], case))
    return found


def _timed(times: Mapping[str, Times], clock: str, steps: int, work: Work, peaks: Peaks) -> Timed:
    seconds = {name: getattr(part, clock) / steps for name, part in times.items()}
    medians = {name: timing.median(values) for name, values in seconds.items()}
    mine = [name for name in seconds if name.startswith(OURS)]
    fastest = min(mine, key=lambda name: medians[name].value)
    medians[OURS_BEST] = medians[fastest]
    ratios = {name: timing.median(values / seconds[fastest]) for name, values in seconds.items() if name not in mine}
    strong = [name for name in ratios if name != PUBLIC]
    best = min(strong, key=lambda name: ratios[name].value) if strong else None
    if best is not None:
        ratios[BEST] = ratios[best]
    own = medians[OURS_BEST].value
    rate = work.flops / own
    shares = rate / peaks.products(clock) / 1e9, work.counted_bytes / own / peaks.memory[clock] / 1e9
    return Timed(medians, fastest, ratios, best, rate, shares, len(seconds[OURS]))


def _rows(names: dict, ours: Ours, work: Work, clocks: Mapping[str, Timed]) -> list[Row]:
    """Times and rates on both clocks, then what does not depend on a clock; what is not known is left out."""
    found = []

    def add(metric: str, unit: str, value: float | Ratio, n: int, method: str = "ours", **case) -> None:
        low, high = value[1:] if isinstance(value, Ratio) else (None, None)
        value = value.value if isinstance(value, Ratio) else float(value)
        row = {"bench": "throughput", "metric": metric, "unit": unit, "method": method, "n": n}
        found.append(Row(value=value, low=low, high=high, case=names | case, **row))

    for clock, timed in clocks.items():
        n = timed.rounds
        for name, value in timed.seconds.items():
            add("seconds", "seconds a step", value, n, name, clock=clock)
        for name, value in timed.ratios.items():
            add("ratio", "baseline time over our fastest", value, n, name, clock=clock)
        if work.flops:
            add("gflops", "GFLOP/s", timed.rate / 1e9, n, clock=clock)
            add("peak_share", "share of the time at the matrix-product peak", timed.shares[0], n, clock=clock)
        if work.counted_bytes:
            add("memory_share", "share of the time at the memory's bandwidth", timed.shares[1], n, clock=clock)
    add("flops", "a step", work.flops, 1)
    if work.counted_bytes:
        add("flops_xla", "a step", work.counted_flops, 1)
        add("bytes", "bytes a step", work.counted_bytes, 1)
        add("intensity", "FLOP a byte", work.flops / work.counted_bytes, 1)
        add("compile_seconds", "seconds", ours.compile_seconds, 1)
        add("trace_seconds", "seconds", ours.trace_seconds, 1)
        add("temp_bytes", "bytes", ours.temp_bytes, 1)
        add("peak_bytes", "bytes", ours.peak_bytes, 1)
    return found


def _line(name: str, ours: Ours, work: Work, timed: Timed, error: float) -> list[str]:
    interval = lambda ratio: f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    best = timed.best
    return [
        name,
        f"{1e3 * timed.seconds[OURS_BEST].value:.3g} ms",
        timed.fastest.removeprefix(OURS).lstrip("-") or "one device",
        f"{1e3 * timed.seconds[best].value:.3g} ms" if best else "-",
        interval(timed.ratios[best]) if best else "-",
        (best or "-").removeprefix("torch-"),
        interval(timed.ratios[PUBLIC]) if PUBLIC in timed.ratios else "-",
        f"{timed.rate / 1e9:.3g}" if work.flops else "-",
        f"{timed.shares[0]:.0%}" if work.flops else "-",
        f"{work.counted_bytes / 1e6:.3g}" if work.counted_bytes else "-",
        f"{work.flops / work.counted_bytes:.3g}" if work.counted_bytes else "-",
        limits.bound(*timed.shares),
        f"{ours.compile_seconds:.1f} s",
        f"{error:.0e}",
        str(timed.rounds),
    ]
