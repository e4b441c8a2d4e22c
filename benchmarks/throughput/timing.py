"""Times in alternating blocks, in an order that is shuffled anew in every round: the machine's moods hit all sides alike.

All sides live in one process. The thread pools of PyTorch and XLA spin for a while after their work before they sleep; a pause between blocks keeps
one from taking the other's cores, and the first call of a block is not timed where that is affordable (`WARM`). Two clocks are read: wall
time, and the processor time of all threads. On a machine that is busy with other things the second, with one thread, is the one to trust: OpenMP's
static shares wait for the slowest thread, XLA's do not, so that wall times on busy cores flatter us.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

PAUSE = 0.02
"""Seconds between blocks."""
WARM = 1.0
"""Calls that take longer than this many seconds are timed without an untimed one before them."""


class Times(NamedTuple):
    """Seconds per call and round, on both clocks."""

    wall: np.ndarray
    cpu: np.ndarray


class Ratio(NamedTuple):
    """A figure with its 95 % interval: of a median over rounds by bootstrap, of an exponent by Student."""

    value: float
    low: float
    high: float


def interleaved(
    sides: Mapping[str, Callable[[], Any]], *, rounds: int, block: float, budget: float, seed: int = 0
) -> dict[str, Times]:
    """Times of all sides, which must have run once already, and must not return before their work is done.

    Args:
        rounds: at most so many, fewer if `budget` seconds are spent, at least three.
        block: seconds of work in one block of one side, at least one call.
    """
    rng, names = np.random.default_rng(seed), list(sides)
    first = {name: max(_once(sides[name])[0], 1e-6) for name in names}
    calls = {name: max(1, int(block / first[name])) for name in names}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while len(taken[names[0]]) < rounds:
            done = len(taken[names[0]])
            if done >= 3 and time.perf_counter() - began > budget:
                break
            for name in rng.permutation(names):
                time.sleep(PAUSE)
                if first[name] < WARM:
                    sides[name]()
                taken[name].append(_once(sides[name], calls[name]))
    finally:
        gc.enable()
    return {name: Times(*(np.array(clock) for clock in zip(*found, strict=True))) for name, found in taken.items()}


def _once(run: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def median(values: np.ndarray) -> Ratio:
    """Median and its interval, from 2,000 draws of rounds with replacement."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(values, (2000, len(values))), axis=1)
    return Ratio(float(np.median(values)), *(float(q) for q in np.percentile(drawn, [2.5, 97.5])))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Ratio:
    """p of values ~ sizes^p by least squares on logarithms, with Student's 95 % interval; at least three points."""
    fit = stats.linregress(np.log(sizes), np.log(values))
    width = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Ratio(float(fit.slope), float(fit.slope - width), float(fit.slope + width))


def peak(run: Callable[[], Any], work: float, *, seconds: float = 1.0) -> dict[str, float]:
    """Best rate at which `work` was done on each clock, in units of 1e9 a second."""
    run()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        found.append(_once(run, 3))
    return {
        name: work / min(values) / 1e9 for name, values in zip(("wall", "cpu"), zip(*found, strict=True), strict=True)
    }
