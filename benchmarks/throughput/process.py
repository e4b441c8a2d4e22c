"""A process whose sides have equally many cores, and memory in large pages."""

import os
import sys

from dmsec_jax.core.checks import require


def restarted(threads: int) -> None:
    """Starts the process anew, kept to `threads` cores (0: all it has) and with large allocations in large pages, unless it is so already.

    XLA has as many threads as the process has cores, OpenBLAS asks when it is loaded, and PyTorch is told a number: only in a process that was
    started on those cores do all agree. XLA takes the temporary memory of a program from the system anew in every call: in small pages their faults
    were a third of the time of the UNet's gradient at batch 32 (benchmarks/LOG.md); who has set GLIBC_TUNABLES keeps it.

    Raises:
        ValueError: if there are fewer cores.
    """
    if sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    kept = last(cores, threads)
    if kept == cores and "GLIBC_TUNABLES" in os.environ:
        return
    os.sched_setaffinity(0, kept)
    large_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    os.execve(sys.executable, sys.orig_argv, large_pages | dict(os.environ))


def last(cores: list[int], threads: int) -> list[int]:
    """The last `threads` of the cores, since the first has most of what else a machine does; 0: all.

    Raises:
        ValueError: if there are fewer.
    """
    require(
        0 <= threads <= len(cores), "--threads", f"at most {len(cores)}, the cores there are", threads, "ask for less"
    )
    return cores[len(cores) - threads :] if threads else cores
