"""What fine-tunings were worth along the way, for `benchmarks.corruption`: each is trained once, and all that is asked of it is asked then.

Kept per training: samples, the model's response, losses for membership tests, pictures that FineXtract drew. Figures come from these.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import harness
from benchmarks.trained import TUNERS, Training
from dmsec_jax import audit, authentication, monitoring, pipeline, tuning
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.finetune.monitor import Measures, noise_levels
from dmsec_jax.metrics import evidence
from dmsec_jax.pipeline import Subject

CONSTANT = ("tune.ema_decay=null",)
ARMS = {
    "plain": ("tune.ema_decay=0.99",),  # the average is looked at apart, as "ema"
    "swa": ("tune.ema_decay=null", "tune.swa_start=25"),
    "bayes-norm": ("bayes.selection=norm", *CONSTANT),
    "bayes-linear": ("bayes.selection=linear", *CONSTANT),
    "bayes-lora-up": ("bayes.selection=lora-up", *CONSTANT),
    "bayes-oft": ("bayes.selection=oft", *CONSTANT),
    "fixed-norm": ("bayes.selection=norm", "bayes.sigma_rate=0", *CONSTANT),
    "fixed-linear": ("bayes.selection=linear", "bayes.sigma_rate=0", *CONSTANT),
    "dropout-linear": ("bayes.selection=linear", "bayes.noise=dropout", *CONSTANT),
}
"""Training -> overrides of the recipe."""
HOLDOUTS = 20
"""Asked about at most; with fewer than `FEWEST` nothing is asked of membership and extraction."""
FEWEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is asked of each model."""

    samples: int = 32
    defended: tuple[int, ...] = (50, 100, 200)
    """Steps at which the model is attacked."""
    evaluations: int = 64
    """Network evaluations per denoising step of an extraction."""
    draws: int = 16
    """Of (timestep, noise) per picture of a membership test."""


class Look(NamedTuple):
    """A model after some steps; of an attack None where there was none."""

    measures: Measures
    quality: np.ndarray
    """[K] 0 for a sample that is no noisier than the base model's from the same noise or than the training pictures, else the logarithm of the
    noisier of these two over it: texture that the pictures have is no corruption."""
    likeness: np.ndarray
    """[K] mean cosine of each sample and the training pictures."""
    extracted: dict[str, float] | None
    """AS and A-ESR at the calibrated threshold."""
    auc: float | None
    """Of the loss difference to the base model."""


class Courses:
    """The trainings of one choice of pictures, all from the same base model, batches and noise; `cpu`: processor seconds spent on what."""

    def __init__(self, work: Path, effort: Effort, training: Training, overrides: tuple[str, ...]):
        self.effort, self.training, self.overrides = effort, training, overrides
        self.folder = work / training.folder
        self.key, self.key_watch = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), 1))
        self.attacked = len(training.holdout) >= FEWEST
        self.cpu: dict[str, float] = {}
        self.asked = np.concatenate([training.pictures.images, training.holdout.images[:HOLDOUTS]])
        self.before = self._kept("base", (), lambda: self._ask("base", training.base.params, attacked=self.attacked))
        samples = from_uint8(self.before["base/samples"])
        self.watched = monitoring.watch(
            self.key_watch, training.base, training.pictures.images, training.prompt, samples
        )
        self.judge = None
        if self.attacked:
            drawn = from_uint8(self.before["base/extracted"])
            self.judge = audit.calibrated(training.pictures, training.holdout, drawn, 0.01)

    def of(self, arm: str) -> dict[str, list[Look]]:
        """Method -> looks, the base model's first, after 0 steps; "plain" brings "ema" along."""
        found = self._kept(arm, self._overrides(arm), lambda: self._train(arm))
        methods, began = (arm, "ema") if arm == "plain" else (arm,), time.process_time()
        first = self._look(0, {name.removeprefix("base/"): leaf for name, leaf in self.before.items()})
        looks = {}
        for method in methods:
            looks[method] = [first._replace(extracted=None, auc=None)]
            for step in self.training.steps:
                start = f"{method}/{step}/"
                part = {name.removeprefix(start): leaf for name, leaf in found.items() if name.startswith(start)}
                looks[method].append(self._look(step, part))
        self._spent("figures", began)
        return looks

    def _kept(self, name: str, overrides: tuple[str, ...], compute) -> dict[str, np.ndarray]:
        training = self.training
        asked = training.identity(HOLDOUTS)
        settings = [asked, list(training.steps), overrides, dataclasses.asdict(self.effort)]
        return harness.kept(self.folder / f"{name}.npz", json.dumps(settings), compute)

    def _train(self, arm: str) -> dict[str, np.ndarray]:
        """Trains, and asks the model at each of the steps."""
        one, found = self.training, {}
        recipe = tuning.read(None, self._overrides(arm))

        def on_chunk(done, info, state):
            if done not in one.steps:
                return
            tuned = tuning.method_of(recipe).tuned(state)
            trees = {arm: tuning.mean(recipe, state) if arm == "swa" else tuned.trainable}
            if arm == "plain":
                trees["ema"] = tuned.ema
            for method, tree in trees.items():
                params = tuning.merged(one.base, recipe, tree)
                found.update(self._ask(f"{method}/{done}", params, attacked=self._attacked(done)))

        prompts = [one.prompt] * len(one.pictures)
        key = jax.random.key(one.seed)
        before, asked = time.process_time(), sum(self.cpu.values())
        if not tuning.tune(key, one.base, one.pictures.images, prompts, recipe, on_chunk=on_chunk).finished:
            raise KeyboardInterrupt  # some looks are missing, so nothing may be concluded
        self._spent("training", before, sum(self.cpu.values()) - asked)
        return found

    def _spent(self, kind: str, since: float, elsewhere: float = 0.0) -> None:
        self.cpu[kind] = self.cpu.get(kind, 0.0) + time.process_time() - since - elsewhere

    def _overrides(self, arm: str) -> tuple[str, ...]:
        """All of a recipe; settings of posteriors only where there is one."""
        posterior = any(one.startswith("bayes.") for one in ARMS[arm])
        own = tuple(one for one in self.overrides if posterior or not one.startswith("bayes."))
        one = self.training
        return (*TUNERS[one.tuner], f"tune.num_steps={max(one.steps)}", *ARMS[arm], *own)

    def _attacked(self, step: int) -> bool:
        return self.attacked and step in self.effort.defended

    def _ask(self, name: str, params: dict, *, attacked: bool) -> dict[str, np.ndarray]:
        """All that costs network evaluations."""
        one, effort, began = self.training, self.effort, time.process_time()
        found = {"samples": to_uint8(pipeline.sample(self.key, one.base, one.prompt, effort.samples, params=params))}
        if name != "base":  # the monitor is made of the base model's samples
            found["widths"], found["drift"] = map(np.asarray, monitoring.respond(self.watched, params))
        self._spent("samples and response", began)
        began = time.process_time()
        if attacked:
            subject = Subject(one.base, params, one.prompt)
            settings = authentication.Settings(num_draws=effort.draws)
            found |= {"losses": authentication.losses(self.key, subject, self.asked, ("tuned",), settings)["tuned"]}
            method = "plain" if name == "base" else "finextract"
            evaluations = effort.evaluations // 2 if name == "base" else effort.evaluations
            found["extracted"] = to_uint8(audit.generate(self.key, subject, method, evaluations=evaluations).images)
            self._spent("attacks", began)
        return {f"{name}/{kind}": np.asarray(leaf) for kind, leaf in found.items()}

    def _look(self, step: int, part: dict[str, np.ndarray]) -> Look:
        """Figures of what `_ask` found."""
        samples = from_uint8(part["samples"])
        if step == 0:
            part = part | dict(zip(("widths", "drift"), self._response_of_base, strict=True))
        measures = monitoring.judge(self.watched, step, samples, list(map(float, part["widths"])), float(part["drift"]))
        features = self.watched.sight.seen.embed(samples)
        known = self.watched.known
        likeness = features @ known.features.mean(0)
        allowed = np.maximum(known.base_noise, known.training_noise)
        quality = np.minimum(0.0, np.log(allowed / noise_levels(samples)))
        if "losses" not in part or step == 0:
            return Look(measures, quality, likeness, None, None)
        drawn = audit.Generated(from_uint8(part["extracted"]), len(part["extracted"]), 0)
        n0 = self.training.n0
        found = audit.judge("finextract", drawn, self.judge, count=n0, clustering="agglomerative")
        scores = np.zeros(n0) if found.matches is None else found.matches.score
        extracted = {"AS": float(scores.mean()), "A-ESR@cal": float((scores >= self.judge.threshold.value).mean())}
        gap = (self.before["base/losses"] - part["losses"]).mean(axis=1)
        return Look(measures, quality, likeness, extracted, evidence.auc(gap[:n0], gap[n0:]).value)

    @property
    def _response_of_base(self) -> tuple[np.ndarray, np.ndarray]:
        """Computed once, then kept."""

        def compute():
            widths, drift = monitoring.respond(self.watched, self.training.base.params)
            return {"widths": np.asarray(widths), "drift": np.asarray(drift)}

        found = self._kept("base-response", (), compute)
        return found["widths"], found["drift"]
