"""A whole model of the tiny preset, trained and asked: the same every time, and compiled once for all models of its kind."""

import dataclasses

import numpy as np
import pytest

from benchmarks.matrix import materials, plan, tables
from benchmarks.matrix.evaluators import EXTRACTIONS, TESTS, Evaluator
from benchmarks.matrix.statistics import OUTCOMES
from benchmarks.trained import Training

EFFORT = plan.Effort(
    evaluations=4,
    sampling_steps=2,
    draws=2,
    cgi_steps=2,
    holdouts=2,
    early=10,
    attack_steps=2,
    class_pictures=2,
    shown=2,
)
FIXED = {"rank": 2, "sigma0": 0.01, "prior_weight": 1.0, "budget": 8.0, "n0": 2, "steps": 20}


def cell(seed=0, tuner="lora", objective="plain", treatment="clean"):
    return plan.cell(set="", seed=seed, tuner=tuner, objective=objective, treatment=treatment, **FIXED)


class Short(Training):
    """With a prompt that the tiny tokenizer takes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prompt = "a red dog"


@pytest.fixture
def evaluator(tiny_pipeline, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(materials, "Training", Short)
    monkeypatch.setitem(materials.CLASS, "a red dog", "a blue cat")
    return lambda name="work": Evaluator(tiny_pipeline, pictures, tmp_path / name, EFFORT)


def test_a_key_depends_on_all_that_decides_the_result(evaluator, pictures):
    ask = evaluator()
    first = ask.key(cell())
    assert first == evaluator("elsewhere").key(cell())
    others = [cell(seed=1), cell(tuner="oft"), cell(objective="bayes"), cell(treatment="advdm")]
    others += [dataclasses.replace(cell(), **{name: 1e-4}) for name in ("rate", "sigma0", "prior_weight", "budget")]
    keys = {ask.key(one) for one in others}
    assert len(keys) == len(others)
    assert first not in keys
    stronger = Evaluator(ask.base, pictures, ask.work, dataclasses.replace(EFFORT, draws=3))
    assert stronger.key(cell()) != first


@pytest.mark.slow
@pytest.mark.parametrize(("tuner", "objective"), [
    ("lora", "bayes+prior"),
    pytest.param("full", "bayes", marks=pytest.mark.long),
    pytest.param("lora", "plain", marks=pytest.mark.long),
    pytest.param("oft", "prior", marks=pytest.mark.long),
])  # fmt: skip
def test_a_model_is_asked_everything_gives_the_same_again_and_compiles_for_all_of_its_kind(evaluator, tuner, objective):
    ask = lambda seed, name: tables.row("x", {}, evaluator(name)(cell(seed, tuner, objective, "purified")))
    found = ask(0, "work")
    columns = {f"AS_{name}" for name in EXTRACTIONS} | {f"AUC_{test}_early" for test in TESTS} | set(OUTCOMES)
    assert columns <= found.keys()
    assert all(np.isfinite(found[name]) for name in columns)
    assert {"stage", "copied", "extracted@cal_finextract"} <= tables.discrete([found])[0].keys()
    again, another = ask(0, "other"), ask(1, "other")
    assert tables.discrete([again]) == tables.discrete([found])
    assert found["compilations"] > 0
    assert another["compilations"] == 0
