"""Damaged and hostile files for every reader: `python -m benchmarks.fuzz --minutes 10`.

Each reader gets the same share of the time, in a process of its own. A file that is refused in words not seen before joins the files from which
further ones are made, so the search goes where the readers go. Counted as a crash: anything but a `ValueError` in this project's form or a missing
file, and a process that dies. What crashed or hung is kept in `--out`.
"""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks import harness
from benchmarks.mutation import mutate
from benchmarks.readers import Reader, readers
from dmsec_jax.report.result import Row

HANG = 5.0
"""Seconds after which a reader hangs."""
CORPUS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Throw damaged files at every reader."""

    minutes: float = 1.0
    """Of all readers together."""
    readers: tuple[str, ...] = ()
    """Some of them by name; default: all."""
    out: Path = Path("out/fuzz")
    """Where files that crash or hang a reader are kept."""
    seed: int = 0


class Outcome(NamedTuple):
    inputs: int
    crashes: int
    hangs: int
    kinds: int
    """Different refusals seen."""
    peak_mib: float
    """By how much the process grew."""


class Hang(BaseException):
    """Not an `Exception`: no reader may swallow it."""


@contextlib.contextmanager
def alarm():
    """Inside, a reader that takes longer than `HANG` is stopped."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def attack(name: str, seconds: float, seed: int, out: Path) -> Outcome:
    """Throws files at one reader for so long."""
    reader, rng = readers()[name], random.Random(f"{seed} {name}")
    corpus, seen = list(reader.seeds), set()
    counts = {"inputs": 0, "crashes": 0, "hangs": 0}
    with alarm(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for beside, content in reader.beside.items():
            (folder / beside).write_bytes(content)
        for content in reader.seeds:  # warms up, and an honest file must be read
            assert attempt(reader, folder, content) == "read", f"{name} refuses an honest file"
        before, end = _peak(), time.monotonic() + seconds
        while time.monotonic() < end:
            content = mutate(rng, rng.choice(corpus), rng.choice(corpus), reader.header)
            verdict = attempt(reader, folder, content)
            counts["inputs"] += 1
            if verdict in ("crash", "hang"):
                counts["crashes" if verdict == "crash" else "hangs"] += 1
                out.mkdir(parents=True, exist_ok=True)
                kept = f"{name}-{verdict}-{hashlib.sha256(content).hexdigest()[:12]}".replace("/", "-").replace(
                    " ", "-"
                )
                (out / kept).write_bytes(content)
            elif verdict not in seen:
                seen.add(verdict)
                if len(corpus) < CORPUS and len(content) < 2**20:
                    corpus.append(content)
    return Outcome(**counts, kinds=len(seen), peak_mib=_peak() - before)


def attempt(reader: Reader, folder: Path, content: bytes) -> str:
    """What becomes of one file, inside `alarm`: "read", "crash", "hang", or the words of the refusal without its numbers and quotations."""
    path = folder / reader.name
    path.unlink(missing_ok=True)  # an earlier file may still be mapped
    path.write_bytes(content)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, HANG)
        try:
            reader.read(folder)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Hang:
        return "hang"
    except FileNotFoundError:
        return "not found"
    except ValueError as error:
        if " must be " not in str(error):
            traceback.print_exc(limit=-4)
            return "crash"
        return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+", "", str(error))[:300]
    except Exception:  # whatever else a reader raises is what is looked for
        traceback.print_exc(limit=-4)
        return "crash"
    return "hang" if time.monotonic() - began > HANG else "read"


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(cfg: Config) -> int:
    """Prints a table, writes the result file; 1 if anything crashed or hung."""
    names = list(cfg.readers or readers())
    seconds = {name: cfg.minutes * 60 / len(names) for name in names}
    outcomes: dict[str, Outcome] = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                outcomes[name] = pool.submit(attack, name, seconds[name], cfg.seed, cfg.out).result()
            except BrokenProcessPool:
                outcomes[name] = Outcome(0, 1, 0, 0, 0.0)
        print(name, outcomes[name], flush=True)
    header = ["reader", *Outcome._fields]
    print(harness.table(header, [[name, *(f"{value:.0f}" for value in found)] for name, found in outcomes.items()]))
    units = {"inputs": "files", "crashes": "files", "hangs": "files", "peak_mib": "MiB"}
    rows = [
        Row(
            bench="fuzz",
            metric=metric,
            value=float(getattr(found, metric)),
            n=found.inputs,
            unit=unit,
            method=name,
            case={},
        )
        for name, found in outcomes.items()
        for metric, unit in units.items()
    ]
    total = {
        metric: sum(getattr(found, metric) for found in outcomes.values()) for metric in ("inputs", "crashes", "hangs")
    }
    notes = ["{inputs:,} files, {crashes} crashes, {hangs} hangs".format(**total)]
    print(notes[0])
    harness.write("fuzz", rows, {"minutes": cfg.minutes, "seed": cfg.seed, "hang_seconds": HANG}, seconds, notes)
    return 1 if total["crashes"] or total["hangs"] else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
