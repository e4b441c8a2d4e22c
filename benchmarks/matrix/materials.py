"""What models are made of and held against: pictures as drawn by the seed, as treated, those of the class, and what the base model says of them.

All of it is made once for a set, N0 and seed, and shared by every model of these.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from benchmarks.matrix import plan, store
from benchmarks.matrix.plan import Cell, Effort
from benchmarks.protected import Arm, Run
from benchmarks.trained import Training
from dmsec_jax import audit, authentication, pipeline, protection, tuning
from dmsec_jax.core import config
from dmsec_jax.data.images import ImageSet, from_uint8, reorder, to_uint8
from dmsec_jax.pipeline import Pipeline, Subject

CLASS = {"an openmoji icon of an animal": "an icon of an animal", "a picture in sks style": "a picture"}
"""Prompt of the training -> prompt of the class, for prior preservation."""
CLASS_SEED = 2**31 + 1
"""Class pictures belong to no training."""


class Material:
    """Everything that models of one set, N0 and seed share; kept in `work`, made when first asked for."""

    def __init__(self, base: Pipeline, data: Path, work: Path, effort: Effort, name: str, n0: int, seed: int):
        self.base, self.work, self.effort, self.seed = base, work, effort, seed
        place = name if name == "openmoji" else str(data / name)
        self.training = Training(base, place, "full", n0, seed, (tuning.DEFAULT.chunk_steps,))
        self.prompt, self.pictures = self.training.prompt, self.training.pictures
        count = min(effort.holdouts, len(self.training.holdout))
        self.holdout: ImageSet = reorder(self.training.holdout, range(count))
        self.asked = np.concatenate([self.pictures.images, self.holdout.images])
        """Originals, members first: [N, H, W, 3]. Models are asked about these, whatever they were trained on."""
        self.key_tune, self.key_audit = jax.random.split(jax.random.key(seed))

    @property
    def settings(self) -> dict:
        """What decides everything here, as JSON values."""
        return {
            "base": self.base.sha256,
            "prompt": self.prompt,
            "seed": self.seed,
            "pictures": self.pictures.sha256,
            "holdout": self.holdout.sha256,
            "effort": dataclasses.asdict(self.effort),
        }

    @property
    def _attacked(self) -> dict:
        """What decides how pictures are protected."""
        known = {name: self.settings[name] for name in ("base", "prompt", "seed", "pictures")}
        return {**known, "steps": self.effort.attack_steps}

    def views(self, treatment: str, budget: float) -> np.ndarray:
        """Training pictures as treated [N0, H, W, 3], in eight bits."""
        if treatment == "clean":
            return from_uint8(to_uint8(self.pictures.images))
        method, purifier = plan.TREATMENTS[treatment]
        own = {"method": method, "purifier": purifier, "budget": budget}
        name = plan.digest({**self._attacked, **own})
        compute = lambda: {"images": to_uint8(self._run.views(Arm(method, budget, purifier)))}
        return from_uint8(store.kept(store.path(self.work, "pictures", name), compute)["images"])

    def prior(self) -> tuple[np.ndarray, list[str]]:
        """Class pictures and their prompts: the same for all sets of a prompt."""
        prompt, count = CLASS[self.prompt], self.effort.class_pictures

        def compute() -> store.Arrays:
            drawn = pipeline.sample(jax.random.key(CLASS_SEED), self.base, prompt, count)
            return {"images": to_uint8(drawn)}

        name = plan.digest({"base": self.base.sha256, "prompt": prompt, "count": count})
        pictures = from_uint8(store.kept(store.path(self.work, "class", name), compute)["images"])
        return pictures, [prompt] * count

    @functools.cached_property
    def before(self) -> store.Arrays:
        """What the base model says: "samples" uint8 [K, H, W, 3] of the prompt and "losses" [N, draws] of `asked`.

        Of this seed's noise, so that seeds are independent; a fine-tuned model is compared on the same noise.
        """

        def compute() -> store.Arrays:
            subject = Subject(self.base, self.base.params, self.prompt)
            losses = authentication.losses(self.key_audit, subject, self.asked, ("base",), self.membership)["base"]
            return {"samples": to_uint8(self.drawn(subject, "plain")), "losses": losses}

        return store.kept(store.path(self.work, "base", plan.digest(self.settings)), compute)

    @functools.cached_property
    def judge(self) -> audit.Judge:
        """Decides whether two pictures are the same one, at a false-match rate of 1 %."""
        return audit.calibrated(self.pictures, self.holdout, from_uint8(self.before["samples"]), 0.01)

    @property
    def membership(self) -> authentication.Settings:
        """Batches that all set sizes share."""
        effort = self.effort
        batch_size = min(5, len(self.asked))
        return authentication.Settings(num_draws=effort.draws, num_steps=effort.cgi_steps, batch_size=batch_size)

    def drawn(self, subject: Subject, method: str) -> np.ndarray:
        """What an extraction method draws from a model [K, H, W, 3].

        Raises:
            ValueError: if a picture is not finite, since all models must have as many from the same noise.
        """
        effort = self.effort
        options = {"evaluations": effort.evaluations, "num_steps": effort.sampling_steps}
        found = audit.generate(self.key_audit, subject, method, **options)
        if found.broken:
            raise ValueError(f"samples of {method} must be finite, got {found.broken} that are not; lower the rate")
        return found.images

    @functools.cached_property
    def _run(self) -> Run:
        """Protects, and keeps what a purifier starts from."""
        model = protection.model_of(self.base, self.prompt)
        steps = dict.fromkeys(protection.METHODS, self.effort.attack_steps)
        return Run(lambda tuner: self.training, model, steps, self.work / "protected" / plan.digest(self._attacked))


def recipe(cell: Cell) -> tuning.Recipe:
    """How a cell's model is trained."""
    return tuning.read(None, cell.overrides())


def key_of(cell: Cell, material: Material) -> str:
    """Hash of all that decides the cell's result: settings, recipe, pictures, base model."""
    own = {"cell": dataclasses.asdict(cell), "recipe": config.to_dict(recipe(cell))}
    return plan.digest({**material.settings, **own})
