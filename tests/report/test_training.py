import dataclasses

import numpy as np
import pytest

from dmsec_jax.finetune.monitor import Measures
from dmsec_jax.report import plots, result, training
from dmsec_jax.report.training import Course, Sheet, Training


@pytest.fixture(scope="module")
def run(made):
    loss = np.concatenate([np.linspace(1, 0.5, 18), [0.25, np.nan]])
    sheets = (Sheet(step=10, samples=made.pictures(3)), Sheet(step=1200, samples=made.pictures(3, 1)))
    return Training(
        base="nano",
        tuner="LoRA of rank 4",
        prompt="<b>sks</b>",
        pictures=made.pictures(2),
        names=("a.png", "<i>.png"),
        course=Course(loss=loss, sheets=sheets),
        command="dmsec finetune",
        config={"steps": 20},
        seeds={"training": 0},
        seconds={"training": 61.0},
        inputs={"model": "0" * 64},
    )


def test_page_shows_pictures_curve_and_samples(made, run):
    page = training.page(run)
    seen = made.seen(page)
    assert "<b>sks</b>" in seen.text
    assert not seen.all("i")
    assert len(seen.all("svg")) == 1
    assert len(seen.all("img")) == 2 + 3 + 3
    assert "after 1,200 steps" in seen.words
    assert "1 min 1 s" in seen.words
    assert "http://" not in page
    assert "https://" not in page


def test_last_loss_leaves_out_what_is_not_finite(run):
    assert run.course.last_loss == 0.25
    assert np.isnan(Course(loss=np.full(3, np.nan)).last_loss)
    assert np.isnan(Course(loss=np.zeros(0)).last_loss)


def test_sheets_are_in_order(made):
    with pytest.raises(ValueError, match="order of their steps"):
        Course(loss=np.zeros(3), sheets=tuple(Sheet(step=s, samples=made.pictures(1)) for s in (2, 1)))


def test_files(run, tmp_path):
    training.write(tmp_path, run, "lora", {"set": "toy"})
    found = result.read(tmp_path / "result.json")
    assert set(found.pictures) == {"pictures/samples-000010.png", "pictures/samples-001200.png"}
    assert all((tmp_path / name).is_file() for name in found.pictures)
    assert (found.rows[0].metric, found.rows[0].value, found.rows[0].method) == ("loss", 0.25, "lora")
    assert found.details["loss"][-1] is None
    assert any("details.loss[19] was nan" in note for note in found.notes)
    assert (tmp_path / "report.html").is_file()
    training.write(tmp_path, dataclasses.replace(run, course=Course(loss=np.zeros(3))), "lora", {})
    assert list((tmp_path / "pictures").iterdir()) == []


def test_stages_are_plotted_and_written_with_their_advice(made, run, tmp_path):
    empty = Measures(10, (0.5, 0.4), 0.2, 0.0, 1.0, 0.1, 1.0, 0.6, 0.01)
    measures = (empty, empty._replace(step=1200, noise_p=0.001))
    stages = dataclasses.replace(run, course=dataclasses.replace(run.course, measures=measures))
    seen = made.seen(training.page(stages))
    assert len(seen.all("svg")) == 1 + len(plots.TRENDS) - 2  # without CLIP
    known = tuple(found._replace(quality=0.7, alignment=0.2) for found in measures)
    assert len(plots.trends(known)) == len(plots.TRENDS)
    advice = "Samples were corrupting at step 1,200: stop at step 10, the most faithful before it."
    assert advice in seen.words
    training.write(tmp_path, stages, "full", {})
    details = result.read(tmp_path / "result.json").details
    assert [found["stage"] for found in details["stages"]] == ["learning", "corrupting"]
    assert details["stages"][0]["widths"] == [0.5, 0.4]
    assert details["advice"] == advice


def test_a_run_without_steps_has_a_page(run):
    page = training.page(dataclasses.replace(run, course=Course(loss=np.zeros(0))))
    assert "<svg" not in page
