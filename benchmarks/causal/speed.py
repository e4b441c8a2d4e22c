"""How long it takes: warm, compilation apart, medians, on the wall clock and on that of the processor (all threads), which other work slows less.

posterior     of 100 variables, 1,000 rows, beside FCI and GFCI of other programs in alternating turns
batch         of 256 data sets of 30 variables in one call
gradient      ABIC's objective with its gradient at 100 variables, beside the published form with automatic differentiation in PyTorch
whole-100     `SPOT().fit` on 100 variables, 1,000 rows
wide          the posterior of 1,000 variables, with the peak of memory of its process
whole-500     `SPOT().fit` on 500 variables, compilation included
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks import harness
from benchmarks.causal import methods, peers
from benchmarks.throughput import timing
from benchmarks.throughput.cases import PUBLIC, build
from dmsec_jax import discovery
from dmsec_jax.causal import rows, sem, skeleton
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core.checks import require
from dmsec_jax.report.result import Row

ROWS, BATCH, BUDGET = 1000, 256, 60.0


def main(names: tuple[str, ...], posterior: Posterior, settings: dict) -> None:
    """One result file for each of the measurements (default: all)."""
    unknown = {*names} - {*MEASURED}
    require(not unknown, "parts", f"of {', '.join(MEASURED)}", ", ".join(unknown), "correct them")
    for name in names or tuple(MEASURED):
        began = time.monotonic()
        found = list(MEASURED[name](posterior))
        lines = [[row.method, *map(str, row.case.values()), row.metric, harness.figure(row), row.n] for row in found]
        for line in lines:
            print("  ".join(map(str, line)))
        notes = ["`ratio` is the baseline's time over ours in the same round; intervals by bootstrap over rounds"]
        harness.write("spot", found, settings | {"parts": [name]}, {"all": time.monotonic() - began}, notes)


def _data(size: int) -> np.ndarray:
    draw = jax.jit(lambda key: rows.simulate(key, size, ROWS, sem.SPOT).data)
    return np.asarray(draw(jax.random.key(1)), np.float64)


def _posterior(posterior: Posterior) -> Iterator[Row]:
    data = _data(100)
    ours = lambda: methods.probabilities(posterior, data)
    sides = {"posterior": ours} | {name: lambda peer=peer: peer(data) for name, peer in peers.PEERS.items()}
    yield from _compared(sides, "posterior", {"op": "posterior", "variables": 100, "rows": ROWS})


def _gradient(posterior: Posterior) -> Iterator[Row]:
    from benchmarks.throughput import discovery as rows_of_spot  # PyTorch with it, which nothing else here needs
    from benchmarks.torch_baselines import networks

    networks.use_threads(1)
    case = rows_of_spot.lagrangian(100, 1)
    sides = {"spot": build(case).run, PUBLIC: case.peers[PUBLIC]()}
    yield from _compared(sides, "spot", {"op": "value and gradient", "variables": 100, "rows": ROWS})


def _compared(sides: dict[str, Callable], own: str, case: dict) -> Iterator[Row]:
    for run in sides.values():
        run()
    times = timing.interleaved(sides, rounds=7, block=0.5, budget=BUDGET)
    for clock in ("wall", "cpu"):
        seconds = {name: getattr(taken, clock) for name, taken in times.items()}
        for name, values in seconds.items():
            yield _row("seconds", name, values, case | {"clock": clock})
            if name != own:
                yield _row("ratio", name, values / seconds[own], case | {"clock": clock})


def _batch(posterior: Posterior) -> Iterator[Row]:
    keys = jax.random.split(jax.random.key(2), BATCH)
    corr = jax.jit(jax.vmap(lambda key: rows.simulate(key, 30, ROWS, sem.SPOT).data))(keys)
    corr = np.stack([np.corrcoef(one, rowvar=False) for one in np.asarray(corr)]).astype(np.float32)

    @jax.jit
    def all_at_once(corr):
        one = lambda own: skeleton.edge_probabilities(posterior.params, posterior.net, own, float(ROWS))
        return jax.lax.map(one, corr, batch_size=16)

    run = lambda: jax.block_until_ready(all_at_once(corr))
    run()
    times = timing.interleaved({"ours": run}, rounds=5, block=0.5, budget=BUDGET)["ours"]
    for clock in ("wall", "cpu"):
        case = {"op": "posterior, one call", "variables": 30, "rows": ROWS, "data_sets": BATCH, "clock": clock}
        yield _row("seconds", "posterior", getattr(times, clock), case)


def _whole(size: int, warm: bool, posterior: Posterior) -> Iterator[Row]:
    data = _data(size)
    if warm:
        discovery.SPOT().fit(data)
    wall, cpu = time.perf_counter(), time.process_time()
    model = discovery.SPOT().fit(data)
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    case = {"op": "end to end", "variables": size, "rows": ROWS, "starts": model.restarts, "compilation": not warm}
    for clock, seconds in taken.items():
        yield _row("seconds", "spot+local", np.array([seconds]), case | {"clock": clock})


def _wide(posterior: Posterior) -> Iterator[Row]:
    """In a process of its own, whose peak is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        first, second, cpu, peak = pool.apply(_wide_alone, (posterior,))
    case = {"op": "posterior", "variables": 1000, "rows": ROWS}
    yield _row("seconds", "posterior", np.array([first]), case | {"clock": "wall", "compilation": True})
    yield _row("seconds", "posterior", np.array([second]), case | {"clock": "wall", "compilation": False})
    yield _row("seconds", "posterior", np.array([cpu]), case | {"clock": "cpu", "compilation": False})
    yield Row(bench="spot", metric="peak_gib", value=peak, n=1, unit="GiB", method="posterior", case=case)


def _wide_alone(posterior: Posterior) -> tuple[float, float, float, float]:
    """(seconds with compilation, without, of the processor without, peak of memory in GiB)."""
    data = np.random.default_rng(0).normal(size=(ROWS + 1000, 1000))
    data[:, 1:] += 0.7 * data[:, :-1]
    taken = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        methods.probabilities(posterior, data[:ROWS])
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken[0][0], taken[1][0], taken[1][1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _row(metric: str, method: str, values: np.ndarray, case: dict) -> Row:
    names = {"bench": "spot", "metric": metric, "method": method, "case": case, "n": len(values)}
    unit = "seconds" if metric == "seconds" else "times ours"
    if len(values) == 1:
        return Row(value=float(values[0]), unit=unit, **names)
    found = timing.median(values)
    return Row(value=found.value, low=found.low, high=found.high, unit=unit, **names)


MEASURED: dict[str, Callable[[Posterior], Iterator[Row]]] = {
    "posterior": _posterior,
    "batch": _batch,
    "gradient": _gradient,
    "whole-100": lambda posterior: _whole(100, True, posterior),
    "wide": _wide,
    "whole-500": lambda posterior: _whole(500, False, posterior),
}
