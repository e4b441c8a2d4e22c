"""What is asked of a fine-tuned model: does it give its pictures away, does it tell whose they were, what are its samples worth?

All questions are about the originals, whatever was trained on: an artist wants to know whether his pictures leak, not their protected versions,
and a test that compared protected members with untouched hold-outs would find the protection. The model's plain samples serve imitation,
fidelity, quality and diversity.
"""

import functools
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.imitation import figures
from benchmarks.matrix import materials, plan, store
from benchmarks.matrix.materials import Material
from benchmarks.matrix.plan import Cell, Effort
from dmsec_jax import audit, authentication, embedding, imitation, pipeline, tuning
from dmsec_jax.core.types import Params
from dmsec_jax.data.images import from_uint8, to_uint8
from dmsec_jax.finetune import monitor
from dmsec_jax.finetune.monitor import Scores
from dmsec_jax.metrics import evidence, perception, similarity
from dmsec_jax.pipeline import Subject
from dmsec_jax.report.extraction_data import PAPER_THRESHOLDS

EXTRACTIONS = ("finextract", "cfg", "plain")
CHEAP = ("pia", "pfami", "secmi")
TESTS = ("loss-difference", "loss", *CHEAP, "cgi-dm")


class Compilations:
    """Counts what is compiled, or taken from the persistent cache, in this process."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **more) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Evaluator:
    """Trains the model of a cell and asks it; shares materials between cells, and compiled programs between all cells of a kind."""

    def __init__(self, base: pipeline.Pipeline, data: Path, work: Path, effort: Effort):
        self.base, self.data, self.work, self.effort = base, data, work, effort
        self.compilations = Compilations()

    @functools.lru_cache(maxsize=8)  # noqa: B019 as long-lived as the process
    def material(self, name: str, n0: int, seed: int) -> Material:
        return Material(self.base, self.data, self.work, self.effort, name, n0, seed)

    def key(self, cell: Cell) -> str:
        return materials.key_of(cell, self.material(cell.set, cell.n0, cell.seed))

    def __call__(self, cell: Cell) -> store.Arrays:
        """Figures of a cell as arrays without dimensions, pictures for the page as "pictures/<kind>" uint8, "digest/<input>", and its cost."""
        material = self.material(cell.set, cell.n0, cell.seed)
        began, compiled = time.process_time(), self.compilations.count
        views = material.views(cell.treatment, cell.budget)
        prepared = time.process_time()
        models = self._train(cell, material, views)
        trained = time.process_time()
        early, subject = (Subject(self.base, models[step], material.prompt) for step in (self.effort.early, cell.steps))
        found = membership(material, subject)
        found |= {f"{name}_early": value for name, value in membership(material, early).items()}
        extracted, pictures = extraction(material, subject)
        found |= extracted | samples(material, pictures["plain"])
        shown = {
            "training": views,
            "samples": pictures["plain"][: self.effort.shown],
            "extracted": pictures["extracted"],
        }
        cost = {
            "compilations": self.compilations.count - compiled,
            "seconds_preparing": prepared - began,
            "seconds_training": trained - prepared,
            "seconds_asking": time.process_time() - trained,
        }
        pictures_digest = plan.digest({"pictures": material.pictures.sha256, "holdout": material.holdout.sha256})
        digests = {"base_sha256": self.base.sha256, "pictures_digest": pictures_digest}
        arrays = {f"figure/{name}": value for name, value in found.items()}
        arrays |= {f"cost/{name}": value for name, value in cost.items()}
        arrays |= {f"digest/{name}": value for name, value in digests.items()}
        arrays |= {f"pictures/{name}": to_uint8(value) for name, value in shown.items()}
        return {name: np.asarray(value) for name, value in arrays.items()}

    def _train(self, cell: Cell, material: Material, views: np.ndarray) -> dict[int, dict[str, Params]]:
        """Steps -> parameters: after `effort.early` steps and at the end."""
        chosen, kept = materials.recipe(cell), {}

        def keep(done, info, state):
            if done in (self.effort.early, cell.steps):
                kept[done] = jax.device_get(tuning.merged(self.base, chosen, tuning.mean(chosen, state)))

        prior = material.prior() if "prior" in plan.OBJECTIVES[cell.objective] else None
        prompts = [material.prompt] * len(views)
        tuned = tuning.tune(material.key_tune, self.base, views, prompts, chosen, prior=prior, on_chunk=keep)
        if not tuned.finished:
            raise KeyboardInterrupt
        return kept


def membership(material: Material, subject: Subject) -> dict[str, float]:
    """AUC of each test, pictures against hold-outs; and how far apart they are by the loss difference, in deviations of the hold-outs: an AUC that
    does not end at 1."""
    n0, settings, key = len(material.pictures), material.membership, material.key_audit
    tuned = authentication.losses(key, subject, material.asked, ("tuned",), settings)["tuned"].mean(axis=1)
    scores = {"loss-difference": material.before["losses"].mean(axis=1) - tuned, "loss": -tuned}
    scores |= authentication.statistics(key, subject, material.asked, CHEAP, settings)
    scores["cgi-dm"] = -authentication.recover(key, subject, material.asked, settings).error
    found = {f"AUC_{test}": evidence.auc(scores[test][:n0], scores[test][n0:]).value for test in TESTS}
    gap = scores["loss-difference"]
    return found | {"separation": float((gap[:n0].mean() - gap[n0:].mean()) / gap[n0:].std(ddof=1))}


def extraction(material: Material, subject: Subject) -> tuple[dict[str, float | int], dict[str, np.ndarray]]:
    """Average similarity and the number of training pictures extracted, at the calibrated and the paper's thresholds, by method, after average
    linkage; and the plain samples and what FineXtract extracted."""
    judge, n0 = material.judge, len(material.pictures)
    found, pictures = {}, {}
    for name in EXTRACTIONS:
        drawn = from_uint8(to_uint8(material.drawn(subject, name)))
        result = audit.judge(name, audit.Generated(drawn, len(drawn), 0), judge, count=n0, clustering="agglomerative")
        scores = np.zeros(n0) if result.matches is None else result.matches.score
        nulls = np.zeros(1) if result.holdout_matches is None else result.holdout_matches.score
        found |= {f"AS_{name}": float(scores.mean()), f"AS-holdout_{name}": float(nulls.mean())}
        found[f"AS-all_{name}"] = float((judge.members @ judge.embed(drawn).T).max(axis=1).mean())
        for label, threshold in (("cal", judge.threshold.value), *((f"{tau:g}", tau) for tau in PAPER_THRESHOLDS)):
            found[f"extracted@{label}_{name}"] = int((scores >= threshold).sum())
        if name == "plain":
            pictures["plain"] = drawn
        if name == "finextract":
            pictures["extracted"] = result.extracted
    return found, pictures


def samples(material: Material, drawn: np.ndarray) -> dict[str, float | int | str]:
    """Imitation of the artist's other pictures, and the monitor's measures, of plain samples."""
    before = from_uint8(material.before["samples"])
    known = monitor.reference(material.pictures.images, before, similarity.embed)
    scores = Scores(diversity=perception.diversity(embedding.perceptual_distances(drawn)))
    found = monitor.measure(0, drawn, (), np.nan, known, similarity.embed, scores)
    allowed = np.maximum(known.base_noise, known.training_noise)
    features = [imitation.embed(part) for part in (drawn, material.holdout.images, before)]
    return {
        **figures(*features),
        "fidelity": found.fidelity,
        "diversity": found.diversity,
        "quality": float(np.minimum(0, np.log(allowed / monitor.noise_levels(drawn))).mean()),
        "noise": found.noise,
        "copied": round(found.copied * len(drawn)),
        "stage": found.stage,
    }
