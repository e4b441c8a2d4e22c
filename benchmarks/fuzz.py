"""Damaged and hostile files for every reader: `python -m benchmarks.fuzz --minutes 10`.

Each reader gets the same share of the time, in a process of its own. A file that is refused in words not seen before, or that reaches lines of
this package that none reached before (looked at for one file in `TRACED`), joins the files from which further ones are made: the search goes where
the readers go. Counted as a crash: anything but a `ValueError` in this project's form or a missing file, and a process that dies; as a hang: five
seconds of the processor's time, or a minute. What crashed or hung is kept in `--out`.
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

import dmsec_jax
from benchmarks import harness
from benchmarks.mutation import mutate
from benchmarks.readers import Reader, readers
from dmsec_jax.report.result import Row

HANG = 5.0
"""Seconds of the processor's time after which a reader hangs."""
BLOCKED = 60.0
"""Seconds after which it does, whatever the processor did."""
TRACED = 8
PACKAGE = str(Path(dmsec_jax.__file__).parent)
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
    lines: int
    """Lines of the package that were reached."""
    peak_mib: float
    """By how much the process grew."""


class Hang(BaseException):
    """Not an `Exception`: no reader may swallow it."""


@contextlib.contextmanager
def alarm():
    """Inside, a reader that takes longer than `HANG` is stopped."""

    def ring(*_):
        raise Hang

    before = {sign: signal.signal(sign, ring) for sign in (signal.SIGALRM, signal.SIGPROF)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


@contextlib.contextmanager
def tracing(reached: set[tuple[str, int]]):
    """Inside, lines of the package that run are added: (file, line)."""

    def line(frame, event, _):
        if event == "line":
            reached.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame, *_):
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def attack(name: str, seconds: float, seed: int, out: Path) -> Outcome:
    """Throws files at one reader for so long."""
    reader, rng = readers()[name], random.Random(f"{seed} {name}")
    corpus, seen, reached = list(reader.seeds), set(), set()
    counts = {"inputs": 0, "crashes": 0, "hangs": 0}
    with alarm(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for beside, content in reader.beside.items():
            (folder / beside).write_bytes(content)
        for content in reader.seeds:  # warms up, and an honest file must be read
            with tracing(reached):
                assert attempt(reader, folder, content) == "read", f"{name} refuses an honest file"
        before, end = _peak(), time.monotonic() + seconds
        while time.monotonic() < end:
            content = mutate(rng, rng.choice(corpus), rng.choice(corpus), reader.header)
            known = len(reached)
            with tracing(reached) if counts["inputs"] % TRACED == 0 else contextlib.nullcontext():
                verdict = attempt(reader, folder, content)
            counts["inputs"] += 1
            if verdict in ("crash", "hang"):
                counts["crashes" if verdict == "crash" else "hangs"] += 1
                out.mkdir(parents=True, exist_ok=True)
                kept = f"{name}-{verdict}-{hashlib.sha256(content).hexdigest()[:12]}".replace("/", "-").replace(
                    " ", "-"
                )
                (out / kept).write_bytes(content)
            elif verdict not in seen or len(reached) > known:
                seen.add(verdict)
                if len(corpus) < CORPUS and len(content) < 2**20:
                    corpus.append(content)
    return Outcome(**counts, kinds=len(seen), lines=len(reached), peak_mib=_peak() - before)


def attempt(reader: Reader, folder: Path, content: bytes) -> str:
    """What becomes of one file, inside `alarm`: "read", "crash", "hang", or the words of the refusal without its numbers and quotations."""
    path = folder / reader.name
    path.unlink(missing_ok=True)  # an earlier file may still be mapped
    path.write_bytes(reader.wrap(content))
    began = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, HANG)
        signal.setitimer(signal.ITIMER_REAL, BLOCKED)
        try:
            reader.read(folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
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
    return "hang" if time.process_time() - began > HANG else "read"


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(cfg: Config) -> int:
    """Prints a table, writes the result file; 1 if anything crashed or hung."""
    names = list(cfg.readers or readers())
    seconds = {name: cfg.minutes * 60 / len(names) for name in names}
    outcomes: dict[str, Outcome] = {}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["benchmarks.readers"]
    )  # imported once; nothing of it has run when a process starts
    for name in names:
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            try:
                outcomes[name] = pool.submit(attack, name, seconds[name], cfg.seed, cfg.out).result()
            except BrokenProcessPool:
                outcomes[name] = Outcome(0, 1, 0, 0, 0, 0.0)
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
