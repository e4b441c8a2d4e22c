"""Processes that work through one list of tasks in a shared folder, each task once, whichever of them is killed when."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from benchmarks.matrix import store

T = TypeVar("T")
MakeJob = Callable[[], Callable[[T], store.Arrays]]
"""Called once in each process; must be a function of a module, for `multiprocessing`."""


def missing(tasks: Mapping[str, T], folder: Path) -> dict[str, T]:
    """Name -> task of those without a result."""
    return {name: task for name, task in tasks.items() if not store.path(folder, "cells", name).is_file()}


def work(
    tasks: Mapping[str, T],
    folder: Path,
    make_job: MakeJob,
    part: tuple[int, int] = (0, 1),
    tell: Callable[[T, str], None] = lambda task, text: None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Does what is missing in this process: first a share, every `part[1]`-th task from `part[0]` on, then whatever others have left.

    A task that another process holds is waited for last, and done here if that process has died. Nothing is kept of a task that fails, and the
    others are done all the same: the next run tries it again.

    Args:
        tell: called with every task that ends here and how it ended.
        wanted: asked before every task whether to go on.
    """
    index, count = part
    left = list(missing(tasks, folder))
    order = sorted(range(len(left)), key=lambda place: (place - index) % count)
    job, failed = make_job() if left else None, set()
    for wait, place in ((wait, place) for wait in (False, True) for place in order):
        name, file = left[place], store.path(folder, "cells", left[place])
        if not wanted():
            return
        if name in failed or file.is_file():
            continue
        with store.claimed(file, wait=wait) as mine:
            if not mine or file.is_file():
                continue
            try:
                store.save(file, job(tasks[name]))
                tell(tasks[name], "done")
            except Exception as error:  # one model must not end the night's others
                failed.add(name)
                tell(tasks[name], f"{type(error).__name__}: {error}")


def together(tasks: Mapping[str, T], folder: Path, make_job: MakeJob, workers: int, tell=None) -> None:
    """As `work`, by so many processes of this machine, each on a core of its own; what a killed one held is done by the others, and if this
    process is killed they end with the task in hand.

    One process on two cores is slower than two processes on one core each: small matrices leave a second core idle.

    Args:
        tell: as of `work`, a function of a module.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    # for the children: threads of LAPACK that share a core wait for each other in loops, which made some trainings of OFT thirty times as long
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")  # a forked copy of a process that has used JAX hangs
    children = []
    for i in range(workers):
        own = cores[i % len(cores) :][:1] if cores else []
        args = (own, os.getpid(), tasks, folder, make_job, (i, workers), *([] if tell is None else [tell]))
        children.append(context.Process(target=_child, args=args))
    for child in children:
        child.start()
    for child in children:
        child.join()


def _child(cores: list[int], parent: int, *args) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
    work(*args, wanted=lambda: os.getppid() == parent)
