"""`python -m benchmarks.throughput.growth`: how time and memory of our side grow, and how long compiling takes.

Each series is one of the benchmark's rows at growing sizes. An exponent is the slope of a line through the logarithms by least squares over all
points, with Student's interval; what every call costs beside its work flattens the small end. Memory is what the compiled program holds at most.
"""

import dataclasses
import fnmatch
import functools
import gc
import os
import sys
import time
from collections.abc import Callable

import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.throughput import cases, compiling, discovery, methods, networks, others, process, timing, training
from benchmarks.throughput.cases import Case
from dmsec_jax.core import config
from dmsec_jax.report.result import Row

CONSOLE = Console(stderr=True, width=200)
PIXELS_OF_A_LATENT = 8
BATCHES = (1, 2, 4, 8, 16, 32)
VARIABLES = (10, 20, 40, 80, 160)


@dataclasses.dataclass(frozen=True)
class Series:
    """One row at growing sizes."""

    op: str
    along: str
    sizes: tuple[int, ...]
    build: Callable[[int], Case]

    @property
    def name(self) -> str:
        return f"{self.op}/{self.along}"


SERIES = (
    Series("unet-forward", "batch", BATCHES, functools.partial(networks.unet_forward, "embedded")),
    Series("unet-input-gradient", "batch", BATCHES, functools.partial(networks.unet_input_gradient, "embedded")),
    Series("advdm-step", "batch", BATCHES, functools.partial(methods.protect, "advdm")),
    Series("cgi-dm-step", "batch", BATCHES, methods.contrast),
    Series("dreambooth-step", "batch", BATCHES, functools.partial(training.tuner, "dreambooth")),
    Series(
        "unet-forward",
        "resolution",
        (64, 128, 256, 512),
        lambda pixels: networks.unet_forward("embedded", 1, pixels // PIXELS_OF_A_LATENT),
    ),
    Series("advdm-step", "draws", (1, 2, 4, 8, 16), functools.partial(methods.protect, "advdm", 1)),
    Series("similarities-and-groups", "images", (64, 128, 256, 512, 1024), others.similarities),
    Series("spot-posterior", "variables", VARIABLES, lambda size: discovery.posterior(size, 1)),
    Series("spot-objective", "variables", VARIABLES, lambda size: discovery.lagrangian(size, 1)),
    Series("spot-step", "variables", VARIABLES, lambda size: discovery.steps(size, 1)),
)
COMPILED = (
    "unet-forward/embedded/8",
    "unet-input-gradient/embedded/8",
    "finextract-sampling/embedded/8",
    "advdm-step/embedded/8",
    "cgi-dm-step/embedded/8",
    "dreambooth-step/embedded/8",
    "spot-step/50-variables/4",
)
"""Rows whose compile time is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Growth."""

    series: tuple[str, ...] = ()
    """Patterns of `op/along`, for example `*/batch`; none: all."""
    sizes: int = 0
    """Only so many sizes of each series, the smallest first; 0: all."""
    threads: int = 0
    """Cores of the process; 0: as many as there are."""
    rounds: int = 9
    block: float = 0.1
    budget: float = 20.0
    """Seconds of timing per point, after at least three rounds."""
    repeats: int = 3
    """Of each compilation, each in a process of its own; 0: none."""
    notes: tuple[str, ...] = ()


def main(cfg: Config) -> int:
    """Measures all series, then compilations."""
    began = time.monotonic()
    threads = cfg.threads or len(os.sched_getaffinity(0))
    asked = [one for one in SERIES if not cfg.series or any(fnmatch.fnmatch(one.name, part) for part in cfg.series)]
    jobs = {one.name: functools.partial(measure, one, cfg, threads) for one in asked}
    if cfg.repeats:
        jobs |= {
            f"compiling {name}": functools.partial(compiling.measure, name, cfg.repeats, threads) for name in COMPILED
        }
    found, lines, failed = [], [], []
    for name, job in jobs.items():
        try:
            with CONSOLE.status(name):
                part = job()
        except Exception as error:  # one must not take the others with it; it is reported, and fails the run
            failed.append(f"{name}: {type(error).__name__}: {error}"[:400])
            continue
        found += part
        shown = [row for row in part if row.metric.endswith(("_exponent", "compile_seconds"))]
        lines += [[name, row.metric, row.case.get("cache", ""), harness.figure(row)] for row in shown]
        CONSOLE.print(name, highlight=False, markup=False)
    print(harness.table(["series", "of", "cache", "[95 %]"], lines))
    for line in failed:
        print(f"failed: {line}")
    notes = ["exponents: least squares on logarithms over all sizes, Student's interval"]
    notes += [*cfg.notes, *(f"failed: {line}" for line in failed)]
    harness.write("growth", found, config.to_dict(cfg), {"all": time.monotonic() - began}, notes)
    return 1 if failed else 0


def measure(series: Series, cfg: Config, threads: int) -> list[Row]:
    """Seconds a step and peak memory at each size, and the exponents of both; memory only where all is one compiled program."""
    names = {"op": series.op, "along": series.along, "threads": threads}
    sizes = series.sizes[: cfg.sizes or None]
    points: dict[str, list[float]] = {"seconds": [], "peak_bytes": []}
    rows = []
    for size in sizes:
        case = series.build(size)
        ours = cases.build(case)
        ours.run()
        times = timing.interleaved({"ours": ours.run}, rounds=cfg.rounds, block=cfg.block, budget=cfg.budget)["ours"]
        taken = timing.median(times.wall / case.steps)
        points["seconds"].append(taken.value)
        rows.append(_row("seconds", "seconds a step", *taken, n=len(times.wall), case=names | {"size": size}))
        if ours.peak_bytes:
            points["peak_bytes"].append(ours.peak_bytes)
            rows.append(_row("peak_bytes", "bytes", float(ours.peak_bytes), n=1, case=names | {"size": size}))
        gc.collect()
    for metric, values in points.items():
        if len(values) == len(sizes) >= 3:
            slope = timing.exponent(sizes, values)
            rows.append(_row(f"{metric}_exponent", "power of the size", *slope, n=len(values), case=names))
    return rows


def _row(metric: str, unit: str, value: float, low: float | None = None, high: float | None = None, **more) -> Row:
    return Row(bench="growth", metric=metric, unit=unit, method="ours", value=value, low=low, high=high, **more)


if __name__ == "__main__":
    parsed = tyro.cli(Config, description=__doc__)
    process.restarted(parsed.threads)
    sys.exit(main(parsed))
