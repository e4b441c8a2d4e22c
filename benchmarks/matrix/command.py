"""`python -m benchmarks.matrix --preset small`: every attack against every defence and every fine-tuner.

Trains the models of a plan (`configs/matrix/<preset>.yaml`), asks each what it gives away, and writes one row per model (Parquet, CSV), paired
comparisons (JSON, CSV) and one page. Finished models are kept in `--work` by a hash of all that decides their result: the same command goes on
after any interruption, and a plan that shares models with an earlier one does not train them again.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks import harness
from benchmarks.matrix import causes, page, plan, statistics, store, tables, workers
from benchmarks.matrix.evaluators import Evaluator
from dmsec_jax import pipeline
from dmsec_jax.core import config
from dmsec_jax.core.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The matrix."""

    preset: str = "small"
    """Of `configs/matrix`: tiny, small, full, knobs."""
    data: Path = Path("data")
    """Where the folders of pictures are that the preset names: wikiart-van-gogh, wikiart-monet, dreambooth."""
    work: Path = Path("out/bench-matrix")
    """Models' results and what they share are kept here."""
    workers: int = 1
    """Processes, each on one core; two are faster than one process on two cores."""
    part: str = "0/1"
    """Which share this process begins with, where others with the same `--work` do the rest: --part $SLURM_PROCID/$SLURM_NTASKS. They are not
    joined into one JAX run: models have nothing to say to each other, and one process that dies would take the others along."""
    against: Path | None = None
    """Table of an earlier run (.csv or .parquet): says which models differ from it in a discrete column, and fails if one does; it may have more."""
    base: Path | None = None
    """Folder of another base model than the embedded one."""
    set: tuple[str, ...] = ()
    """Overrides of the preset, for example effort.evaluations=16."""


def evaluator(cfg: Config) -> Evaluator:
    """What asks the models of a plan; each process makes its own."""
    base = pipeline.load(*([] if cfg.base is None else [cfg.base]))
    return Evaluator(base, cfg.data, cfg.work, plan.read(cfg.preset, cfg.set).effort)


def main(cfg: Config) -> int:
    """Trains and asks what is missing, then writes the table, the comparisons and the page; 1 if a model is missing."""
    console = Console(stderr=True)
    began = time.monotonic()
    harness.revision()  # kept from here on: the checkout may move while this runs
    part = _part(cfg.part)
    require(cfg.workers == 1 or part == (0, 1), "workers", "1 with --part", cfg.workers, "give each process a part")
    chosen = plan.read(cfg.preset, cfg.set)
    ask = evaluator(cfg)
    tasks = {ask.key(cell): cell for cell in plan.cells(chosen)}
    left = workers.missing(tasks, cfg.work)
    console.print(f"{len(tasks)} models, {len(left)} to train", highlight=False)
    make_job = functools.partial(evaluator, cfg)
    if cfg.workers > 1:
        workers.together(tasks, cfg.work, make_job, cfg.workers, tell)
    else:
        workers.work(tasks, cfg.work, make_job, part, tell)
    left = workers.missing(tasks, cfg.work)
    finished = {name: cell for name, cell in tasks.items() if name not in left}
    changed = {}
    if part[0] == 0 and finished:
        _write(cfg, chosen, finished, time.monotonic() - began)
        if cfg.against is not None:
            changed = tables.differing(table(cfg.work, finished), tables.read(cfg.against))
            console.print(f"{len(changed)} of {len(finished)} models differ from {cfg.against.name}", markup=False)
            for name, what in changed.items():
                console.print(f"{name}: {what}", markup=False)
    console.print(f"{len(left)} models are missing" if left else "no model is missing", highlight=False)
    return int(bool(left or changed))


def _part(text: str) -> tuple[int, int]:
    """3/8 as (3, 8)."""
    index, slash, count = text.partition("/")
    good = bool(slash) and index.isdecimal() and count.isdecimal() and int(index) < int(count)
    require(good, "part", "i/n with i from 0 to n - 1", repr(text), "write for example 0/4")
    return int(index), int(count)


def tell(cell: plan.Cell, text: str) -> None:
    """One line about a model that ended."""
    names = (cell.set, cell.n0, cell.seed, cell.treatment, cell.tuner, cell.objective)
    print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, names))}: {text}", file=sys.stderr, flush=True)


def _write(cfg: Config, chosen: plan.Plan, finished: dict[str, plan.Cell], seconds: float) -> None:
    """Everything that a table of these models gives."""
    rows = table(cfg.work, finished)
    found = statistics.all_comparisons(rows)
    drawn = plan.drawn(chosen)
    at_random = [row for row, cell in zip(rows, finished.values(), strict=True) if cell in drawn]
    learnt = causes.learn(at_random) if at_random else None
    notes = [*statistics.NOTES, *(learnt.notes if learnt else ())]
    if len(finished) < len(plan.cells(chosen)):
        notes.append(f"incomplete: {len(finished)} of {len(plan.cells(chosen))} models")
    result_rows = [
        tables.cost_row(rows),
        *(statistics.means(rows) if chosen.grids else ()),
        *map(statistics.result_row, found),
    ]
    result_rows += causes.result_rows(learnt) if learnt else []
    settings = {"preset": cfg.preset, "set": list(cfg.set), "plan": config.to_dict(chosen)}
    path = harness.write("matrix", result_rows, settings, {"all": seconds}, notes)
    page.write(cfg.work / f"{cfg.preset}.html", cfg.work, finished, rows, found, learnt, notes)
    tables.write(path.with_name(f"{path.stem}_{cfg.preset}"), rows)
    print(statistics.printed(found))


def table(work: Path, finished: dict[str, plan.Cell]) -> list[tables.Row]:
    """The rows of these models, in the order of the plan."""
    read = lambda name: store.load(store.path(work, "cells", name))
    return [tables.row(name, dataclasses.asdict(cell), read(name)) for name, cell in finished.items()]
