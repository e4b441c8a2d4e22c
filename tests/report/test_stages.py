"""The page on two fine-tunings: the monitor's stages and advice, and no comparison beyond them."""

import json
import re

import numpy as np
import pytest

from dmsec_jax.finetune.monitor import Measures
from dmsec_jax.report import plots, stages
from dmsec_jax.report.training_data import Course, Sheet

FIRST = Measures(0, (0.5, 0.4), 0.2, 0.0, 1.0, 0.1, 1.0, 0.6, 0.0)


def course(made, *noise_p, seed=0):
    measures = [FIRST._replace(step=100 * i, noise_p=p, fidelity=0.2 + 0.1 * i) for i, p in enumerate((1.0, *noise_p))]
    sheets = tuple(Sheet(step=one.step, samples=made.pictures(3, seed)) for one in measures)
    return Course(loss=np.linspace(1, 0.5, 200), sheets=sheets, measures=tuple(measures))


@pytest.fixture
def run(made):
    return stages.Stages(
        base="nano",
        prompt="<b>sks</b>",
        pictures=made.pictures(2),
        names=("a.png", "<i>.png"),
        courses={"plain": course(made, 1.0, 0.001), "bayes": course(made, 1.0, 1.0, seed=1)},
        labels={"plain": "Plain", "bayes": "With a posterior"},
        command="dmsec demo",
        config={},
        seeds={"seed": 0},
        seconds={},
        inputs={},
    )


def test_page_shows_both_courses_with_their_advice(made, run):
    seen = made.seen(stages.page(run))
    assert "Plain: Samples were corrupting at step 200: stop at step 100" in seen.words
    assert "With a posterior: No corruption and no copies were found in 200 steps." in seen.words
    assert "a difference between the two runs may be chance" in seen.words
    assert len(seen.all("svg")) == 2 * (1 + len(plots.TRENDS) - 2)
    assert len(seen.all("img")) == 2 + 2 * 3 * 3
    ids = re.findall(r' id="([^"]+)"', stages.page(run))
    assert len(ids) == len(set(ids)), "figures of the two courses must not share ids"


def test_files_carry_the_stages(run, tmp_path):
    written = stages.write(tmp_path, run, {"set": "toy", "n0": 2})
    found = json.loads((tmp_path / "result.json").read_text())
    assert [one["stage"] for one in found["details"]["stages"]["plain"]] == ["learning", "learning", "corrupting"]
    assert {one["stage"] for one in found["details"]["stages"]["bayes"]} == {"learning"}
    last = [row for row in written.rows if row.case["steps"] == 200 and row.metric == "stage"]
    assert [(row.method, row.case["stage"]) for row in last] == [("plain", "corrupting"), ("bayes", "learning")]
    assert {row.metric for row in written.rows} == {*stages.UNITS, "stage"}


def test_nothing_measured_is_no_report(made, run):
    with pytest.raises(ValueError, match="courses must be measured"):
        stages.Stages(**vars(run) | {"courses": {"plain": Course(loss=np.zeros(1))}})
