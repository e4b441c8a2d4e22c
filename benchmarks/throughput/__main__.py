"""Every method against PyTorch on the same weights, side by side: `python -m benchmarks.throughput --suite cpu`."""

import dataclasses
import fnmatch
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.throughput import cases, methods, networks, others, timing, training
from benchmarks.throughput.cases import COMPILED, PUBLIC, Case
from benchmarks.torch_baselines import networks as torch_networks
from dmsec_jax.core import config
from dmsec_jax.report.result import Row

CONSOLE = Console(stderr=True, width=200)
PEAK_SIDE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Throughput benchmark."""

    suite: Literal["cpu"] = "cpu"
    rows: tuple[str, ...] = ()
    """Patterns of `op/shape/batch`, for example `unet-*/embedded/*`; none: all but Stable Diffusion's, which take minutes."""
    batches: tuple[int, ...] = (1, 8, 32)
    peers: tuple[str, ...] = ()
    """Names of baselines; none: all."""
    threads: int = 0
    """Of both sides; 0: as many as there are cores. 1 keeps the process on one core."""
    quick: bool = False
    """Embedded model at batch 1, no `torch.compile`, few rounds."""
    rounds: int = 25
    block: float = 0.25
    """Seconds of work of one side before the other's turn."""
    budget: float = 60.0
    """Seconds of timing per row, after at least three rounds."""
    clock: Literal["wall", "cpu"] = "wall"
    """Which clock the printed ratio is of; the file has both. On busy cores take cpu, with one thread."""
    list: bool = False
    """Print the names of the rows and stop."""
    notes: tuple[str, ...] = ()
    """What else is to be said, for example that the machine was busy."""


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of every row."""
    for part in (networks, methods, training, others):
        yield from part.every(batches)


def chosen(cfg: Config) -> list[tuple[str, Callable[[], Case]]]:
    """The rows that are asked for."""
    found = []
    for op, shape, batch, build in every((1,) if cfg.quick else cfg.batches):
        name = f"{op}/{shape}/{batch}"
        asked = any(fnmatch.fnmatch(name, pattern) for pattern in cfg.rows)
        if asked or (not cfg.rows and shape != "sd15" and not (cfg.quick and shape == "middle")):
            found.append((name, build))
    return found


def main(cfg: Config) -> int:
    """Measures all rows; returns 1 if one failed."""
    began = time.monotonic()
    rows = chosen(cfg)
    if cfg.list:
        print("\n".join(name for name, _ in rows))
        return 0
    threads = cfg.threads or len(os.sched_getaffinity(0))
    torch_networks.use_threads(threads)
    peaks = _peaks()
    found, failed, lines = [], [], []
    for name, build in rows:
        try:
            with CONSOLE.status(name):
                part, line = measure(build(), cfg, peaks, threads)
        except Exception as error:  # one row must not take the others with it; it is reported, and fails the run
            failed.append(f"{name}: {type(error).__name__}: {error}"[:400])
            CONSOLE.print(failed[-1], highlight=False, markup=False)
            continue
        found, lines = found + part, [*lines, line]
        CONSOLE.print("  ".join(line), highlight=False)
        gc.collect()
    print(harness.table(HEAD, lines))
    notes = [
        f"{threads} threads on both sides; matrix products reach {peaks['ours'][cfg.clock]:.0f} GFLOP/s here and"
        f" {peaks['torch'][cfg.clock]:.0f} in PyTorch on the {cfg.clock} clock",
        "ratios are medians over rounds of baseline over ours in the same round, with bootstrap intervals",
        *cfg.notes,
        *(f"failed: {line}" for line in failed),
    ]
    print("\n".join(notes[:1] + failed))
    harness.write("throughput", found, config.to_dict(cfg), {"all": time.monotonic() - began}, notes)
    return 1 if failed else 0


HEAD = [
    "row",
    "ours",
    "best PyTorch",
    "ratio",
    "which",
    "public / ours",
    "GFLOP/s",
    "of peak",
    "compile",
    "differ by",
    "n",
]


def measure(case: Case, cfg: Config, peaks: dict, threads: int) -> tuple[list[Row], list[str]]:
    """Builds, compares and times one row."""
    ours = cases.build(case)
    named, error = case.named(ours.run()), 0.0
    sides: dict[str, Callable] = {"ours": ours.run}
    for name, build in case.peers.items():
        if (cfg.peers and name not in cfg.peers) or (cfg.quick and name == COMPILED):
            continue
        built = build()
        compared, timed = built if isinstance(built, tuple) else (built, built)
        error = max(error, *cases.differences(case, named, compared()).values())
        timed()
        sides[name] = timed
    times = timing.interleaved(sides, rounds=cfg.rounds, block=cfg.block, budget=cfg.budget)
    return _rows(case, ours, times, cfg, peaks, threads, error)


def _rows(case, ours, times, cfg, peaks, threads, error):
    found, shown = [], {}
    for clock in ("wall", "cpu"):
        names = {"op": case.op, "shape": case.shape, "batch": case.batch, "dtype": "float32"}
        names |= {"clock": clock, "threads": threads}
        seconds = {name: getattr(part, clock) / case.steps for name, part in times.items()}
        row = lambda metric, unit, method, ratio, n, names=names: Row(
            bench="throughput", metric=metric, unit=unit, method=method, case=names, n=n,
            value=ratio[0], low=ratio[1] if len(ratio) > 1 else None, high=ratio[2] if len(ratio) > 1 else None,
        )  # fmt: skip
        medians = {name: timing.median(values) for name, values in seconds.items()}
        ratios = {name: timing.median(values / seconds["ours"]) for name, values in seconds.items() if name != "ours"}
        strong = {name: ratio for name, ratio in ratios.items() if name != PUBLIC}
        best = min(strong, key=lambda name: strong[name].value) if strong else None
        if best is not None:
            ratios["torch-best"] = ratios[best]
        count = len(seconds["ours"])
        found += [row("seconds", "seconds a step", name, value, count) for name, value in medians.items()]
        found += [row("ratio", "baseline time over ours", name, value, count) for name, value in ratios.items()]
        rate = ours.flops / case.steps / medians["ours"].value / 1e9
        share = rate / peaks["ours"][clock]
        if ours.flops:
            found.append(row("gflops", "GFLOP/s", "ours", (rate,), count))
            found.append(row("peak_share", "share of the matrix-product peak", "ours", (share,), count))
        shown[clock] = (medians, ratios, best, rate, share, count)
    names = {"op": case.op, "shape": case.shape, "batch": case.batch, "dtype": "float32", "threads": threads}
    whole = {"flops": (ours.flops / case.steps, "a step"), "compile_seconds": (ours.compile_seconds, "seconds")}
    whole |= {"trace_seconds": (ours.trace_seconds, "seconds"), "temp_bytes": (ours.temp_bytes, "bytes")}
    for metric, (value, unit) in whole.items():
        found.append(
            Row(bench="throughput", metric=metric, value=float(value), n=1, unit=unit, method="ours", case=names)
        )
    medians, ratios, best, rate, share, count = shown[cfg.clock]
    interval = lambda ratio: f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    line = [
        case.name,
        f"{1e3 * medians['ours'].value:.3g} ms",
        f"{1e3 * medians[best].value:.3g} ms" if best else "-",
        interval(ratios[best]) if best else "-",
        (best or "-").removeprefix("torch-"),
        interval(ratios[PUBLIC]) if PUBLIC in ratios else "-",
        f"{rate:.0f}" if ours.flops else "-",
        f"{share:.0%}" if ours.flops else "-",
        f"{ours.compile_seconds:.1f} s",
        f"{error:.0e}",
        str(count),
    ]
    return found, line


def _peaks() -> dict[str, dict[str, float]]:
    """GFLOP/s of a matrix product on both sides."""
    a, flops = np.random.default_rng(0).standard_normal((PEAK_SIDE, PEAK_SIDE)).astype(np.float32), 2 * PEAK_SIDE**3
    ours, product = jnp.asarray(a), jax.jit(jnp.matmul)
    theirs = torch_networks.whole(a)
    return {
        "ours": timing.matrix_peak(lambda: jax.block_until_ready(product(ours, ours)), flops),
        "torch": timing.matrix_peak(lambda: theirs @ theirs, flops),
    }


def restarted(threads: int) -> None:
    """Starts the process anew with large allocations in large pages, for both sides, unless the caller has chosen otherwise, and with as many
    threads for NumPy as for the others.

    XLA takes the temporary memory of a program from the system anew in every call: in small pages their faults were a third of the time of the
    UNet's gradient at batch 32 (benchmarks/LOG.md).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        own = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | ({"OPENBLAS_NUM_THREADS": str(threads)} if threads else {})
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.throughput", *sys.argv[1:]], os.environ | own)


if __name__ == "__main__":
    parsed = tyro.cli(Config, description=__doc__)
    restarted(parsed.threads)
    if parsed.threads == 1:  # before the backend starts: XLA has as many threads as the process has cores
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    sys.exit(main(parsed))
