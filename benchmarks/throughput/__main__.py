"""Every method against PyTorch on the same weights, side by side: `python -m benchmarks.throughput --suite cpu`."""

import dataclasses
import gc
import os
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.throughput import limits, measuring, process, rows
from benchmarks.torch_baselines import networks as torch_networks
from dmsec_jax.core import config

CONSOLE = Console(stderr=True, width=200)


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
    """Of both sides, and cores of the process; 0: as many as there are cores."""
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


def main(cfg: Config) -> int:
    """Measures all rows; returns 1 if one failed."""
    began = time.monotonic()
    chosen = rows.chosen(cfg.rows, (1,) if cfg.quick else cfg.batches, quick=cfg.quick)
    if cfg.list:
        print("\n".join(chosen))
        return 0
    threads = cfg.threads or len(os.sched_getaffinity(0))
    torch_networks.use_threads(threads)
    jax.config.update("jax_num_cpu_devices", threads)  # one is used, or all: `cases.variants`
    peaks = limits.measured()
    found, failed, lines, path = measuring.of_machine(peaks, threads), [], [], None
    notes = [
        f"{threads} threads on both sides; on the {cfg.clock} clock matrix products reach {peaks.ours[cfg.clock]:.0f} GFLOP/s here and"
        f" {peaks.torch[cfg.clock]:.0f} in PyTorch, memory {peaks.memory[cfg.clock]:.0f} GB/s",
        "ratios are medians over rounds of baseline over the fastest of our ways of using the cores in the same round, with bootstrap intervals",
        "our ways: one device as XLA compiles it, with Eigen in place of YNNPACK for convolutions, or for all; a device of each core, which share the"
        " batch, in the first and the last form",
        *cfg.notes,
    ]

    def write(path: Path | None, *, done: bool) -> Path:
        seconds, told = {"all": time.monotonic() - began}, [*notes, *(f"failed: {line}" for line in failed)]
        return harness.write("throughput", found, config.to_dict(cfg), seconds, told, path=path, done=done)

    for name, build in chosen.items():
        try:
            with CONSOLE.status(name):
                part, line = measuring.measure(build(), cfg, peaks, threads)
        except Exception as error:  # one row must not take the others with it; it is reported, and fails the run
            failed.append(f"{name}: {type(error).__name__}: {error}"[:400])
            CONSOLE.print(failed[-1], highlight=False, markup=False)
            continue
        found, lines = found + part, [*lines, line]
        CONSOLE.print("  ".join(line), highlight=False)
        path = write(path, done=False)  # a row that needs more memory than there is takes the process with it
        gc.collect()
    print(harness.table(measuring.HEAD, lines))
    again = f"a row again: python -m benchmarks.throughput --threads {threads} --rows ROW"
    print("\n".join([*notes[:1], again, *failed]))
    write(path, done=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parsed = tyro.cli(Config, description=__doc__)
    process.restarted(parsed.threads)
    sys.exit(main(parsed))
