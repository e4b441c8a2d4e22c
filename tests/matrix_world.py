"""A matrix whose models are made up: cheap, deterministic, and able to kill the process that trains them."""

import itertools
import os
import signal
import time
import zlib

import numpy as np

from benchmarks.matrix import tables

SETS, SEEDS, TREATMENTS, TUNERS, OBJECTIVES = (
    ("one", "two", "three"),
    5,
    ("clean", "noise", "advdm"),
    ("full", "lora"),
    ("plain", "bayes"),
)
EFFECT = {"noise": -0.02, "advdm": -0.3}


def maker(marks, victim=None, kills_parent=False):
    """A job; the process that first does `victim` writes half a file and dies, or kills the one that started it."""
    return Job(marks, victim, kills_parent)


class Job:
    def __init__(self, marks, victim, kills_parent):
        self.marks, self.victim, self.kills_parent = marks, victim, kills_parent

    def __call__(self, task):
        with (self.marks / f"{task}-{os.getpid()}").open("w"):
            pass
        killed = self.marks / "killed"
        if task == self.victim and not killed.exists():
            killed.touch()
            prey = os.getppid() if self.kills_parent else os.getpid()
            os.kill(prey, signal.SIGKILL)
            while os.getppid() == prey:  # it takes its time to die
                time.sleep(0.01)
        if task == "refused":
            raise ValueError("task must be another, got this one; drop it")
        values = np.random.default_rng(zlib.crc32(task.encode())).normal(size=3)
        return {
            "figure/AS": values[0],
            "figure/hits": np.asarray(int(values[1] * 10)),
            "figure/stage": np.asarray("learning"),
            "cost/compilations": np.asarray(0),
            "digest/base_sha256": np.asarray("0123"),
        }


def table(outcomes, noise=0.05, seed=0):
    """Rows of a full grid: AdvDM lowers every outcome by 0.3 in all models, noise by 0.02, the rest does nothing."""
    rng, rows = np.random.default_rng(seed), []
    for name, b, treatment, tuner, objective in itertools.product(SETS, range(SEEDS), TREATMENTS, TUNERS, OBJECTIVES):
        identity = {"set": name, "seed": b, "n0": 5, "steps": 150}
        identity |= {"treatment": treatment, "tuner": tuner, "objective": objective}
        level = 0.6 + EFFECT.get(treatment, 0.0)
        figures = {f"figure/{outcome}": np.asarray(level + noise * rng.normal()) for outcome in outcomes}
        rows.append(tables.row(f"{len(rows):04d}", identity, figures))
    return rows
