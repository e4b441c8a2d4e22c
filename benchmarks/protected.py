"""Pictures of one set and seed as the protection benchmark needs them: clean, noised, protected, purified, with their held-out losses."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import protection, robustness
from dmsec_jax.core.pgd import Budget
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.methods import advdm

SEEDS = {"attack": 0, "noise": 1, "loss": 2, "purify": 3, "detect": 4}
"""Folded into a seed's key: no two uses share random numbers."""


class Arm(NamedTuple):
    """Pictures of one kind: how they were changed, and what was done to them afterwards."""

    method: str
    budget: float = 0.0
    purifier: str = ""
    clean: int = 0
    """So many of them are left as they were."""

    @property
    def name(self) -> str:
        """For a file."""
        return "-".join(
            str(part) for part in (self.method, f"{self.budget:g}", self.purifier, self.clean or "") if part
        )

    @property
    def case(self) -> dict:
        return {"budget": self.budget, "purifier": self.purifier or "none"}


CLEAN = Arm("clean")


class Run:
    """One seed of one set: its pictures, and what was made of them, kept in `work`."""

    def __init__(
        self, training_fn: Callable[[str], Training], model: protection.Model, steps: dict[str, int], work: Path
    ):
        """`training_fn` gives a fresh training with a tuner; `steps` says how long each method attacks."""
        self.training_fn, self.model, self.steps = training_fn, model, steps
        training = training_fn("full")
        self.base, self.seed, self.prompt = training.base, training.seed, training.prompt
        self.clean, self.digests = training.pictures.images, training.pictures.sha256
        self.holdout, self.case = training.holdout.images, {"set": training.name, "n0": training.n0}
        self.folder = work / f"{training.name}_{training.n0}_seed{training.seed}"
        self.settings = [training.base.sha256, self.prompt, self.digests]

    def key(self, use: str) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), SEEDS[use])

    def changed(self, arm: Arm) -> dict[str, np.ndarray]:
        """ "images" uint8 [N, H, W, 3] as saved, and the "seconds" of processor time that they took."""
        pixels = list(to_uint8(self.clean))
        if arm.method == "clean":
            return {"images": np.stack(pixels), "seconds": np.float64(0)}
        steps = self.steps.get(arm.method)

        def compute() -> dict[str, np.ndarray]:
            settings = protection.Settings(method=arm.method, budget=Budget(arm.budget, "8bit"), num_steps=steps)
            jobs = [protection.job(one, one, None, self.base.pixels, settings) for one in pixels]
            began = time.process_time()
            key = self.key("noise" if arm.method == "noise" else "attack")
            found = protection.protect(key, self.model, jobs, settings, batch_size=len(jobs))
            return {"images": np.stack(found), "seconds": np.float64(time.process_time() - began)}

        return harness.kept(self.folder / f"{arm.name}.npz", json.dumps([*self.settings, steps]), compute)

    def views(self, arm: Arm) -> np.ndarray:
        """What an imitator has of an arm: purified, the first `arm.clean` pictures untouched."""
        views = from_uint8(self.changed(Arm(arm.method, arm.budget))["images"])
        if arm.purifier:
            views = robustness.PURIFIERS[arm.purifier].apply(self.key("purify"), views, self.base, self.prompt)
            views = np.clip(views, -1, 1)
        return np.concatenate([self.clean[: arm.clean], views[arm.clean :]])

    def suspicion(self, arm: Arm) -> dict[str, np.ndarray]:
        """Statistic -> how much each picture looks protected [N], to somebody who holds the attacked model."""

        def compute() -> dict[str, np.ndarray]:
            views = self.views(arm)
            return robustness.suspicion(self.key("detect"), self.base, self.prompt, views, batch_size=len(views))

        settings = json.dumps([*self.settings, self.steps.get(arm.method)])
        return harness.kept(self.folder / "suspicion" / f"{arm.name}.npz", settings, compute)

    def losses(self, arm: Arm) -> np.ndarray:
        """Held-out loss [N]; of the same draws for every arm."""

        def compute() -> dict[str, np.ndarray]:
            views = self.views(arm)
            size = len(views)
            return {"loss": robustness.held_out_loss(self.key("loss"), self.base, self.prompt, views, batch_size=size)}

        settings = json.dumps([*self.settings, self.steps.get(arm.method)])
        return harness.kept(self.folder / "loss" / f"{arm.name}.npz", settings, compute)["loss"]


def flops(model: protection.Model, name: str, count: int) -> float:
    """Floating-point operations of one step on `count` pictures, as XLA counts them in the program."""
    method = protection.METHODS[name]
    image = np.zeros((count, model.pixels, model.pixels, 3), np.float32)
    key, mask, index = jax.random.key(0), np.ones_like(image[..., :1]), np.arange(count)
    state = jax.eval_shape(advdm.init, key, image, mask, index, method.cfg)
    options = {"encode_fn": model.encode_fn, "eps_fn": model.eps_fn, "schedule": model.schedule, "num_steps": 1}
    run = jax.jit(functools.partial(advdm.advance, **options, objective_fn=method.objective_fn))
    lowered = run.lower(key, state, image, mask, model.target, model.params, method.cfg)
    return float(lowered.cost_analysis()["flops"])
