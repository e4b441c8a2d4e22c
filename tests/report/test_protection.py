"""The report of a protection: it claims what was measured, in the words of the measurement, and no more."""

import dataclasses

import numpy as np
import pytest

from dmsec_jax.metrics.protection import Change
from dmsec_jax.report import protection as report
from dmsec_jax.report import result
from dmsec_jax.report.protection import Imitation, Protected, Protection

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;\u202e\x1b[2J"
CLEAN = np.array([0.20, 0.30, 0.25, 0.40, 0.35, 0.22])
WOBBLE = np.array([0.01, -0.01, 0.02, 0.0, -0.02, 0.01])

MAYBE = {"clean": np.ones(3), "protected": np.array([1.4, 1.6, 1.3]), "noise": np.full(3, 1.02)}


def losses(protected, noise=0.02):
    """Losses whose relative rises are as given, up to a wobble from picture to picture."""
    return {"clean": CLEAN, "protected": CLEAN * (1 + protected + WOBBLE), "noise": CLEAN * (1 + noise)}


def run(made, measured=None, count=6, **changes):
    measured = measured or {"": losses(0.5), "jpeg": losses(0.3), "blur": losses(0.02)}
    part = {name: {kind: values[:count] for kind, values in kinds.items()} for name, kinds in measured.items()}
    change = Change(largest=8, psnr=34.5, ssim=0.9, lpips=np.nan)
    pictures = tuple(
        Protected(name=f"mine-{i}.jpg", size=(64, 48, 3), file=f"mine-{i}.png", change=change) for i in range(count)
    )
    fields = {
        "method": "advdm",
        "budget": 8.0,
        "norm": "linf",
        "scale": "model",
        "model": "nano",
        "prompt": "a painting",
        "pictures": pictures,
        "clean": made.pictures(count),
        "protected": made.pictures(count, 1),
        "losses": part,
        "command": "dmsec protect --seed 0",
    }
    return Protection(**(fields | changes))


def test_effects_are_rises_relative_to_the_clean_pictures_after_the_same_purifier(made):
    first, jpeg, blur = report.effects(run(made))
    assert first.protected == pytest.approx(0.5 + WOBBLE.mean())
    assert first.noise == pytest.approx(0.02)
    assert first.beyond.value == pytest.approx(0.48 + WOBBLE.mean())
    assert [first.real, jpeg.real, blur.real] == [True, True, False]


@pytest.mark.parametrize(
    ("measured", "count", "said"),
    [
        ({"": losses(0.5), "jpeg": losses(0.3), "blur": losses(0.02)}, 6, "the best of 2 purifiers leaves 0% beyond"),
        ({"": losses(0.5), "jpeg": losses(0.3), "blur": losses(0.02)}, 6, "after 1 of them it is not told from noise"),
        ({"": losses(0.5)}, 6, "no purifier was tried"),
        ({"": losses(0.02)}, 6, "(p = "),
        (
            {"": MAYBE},
            3,
            "More pictures are needed to tell: the model's loss rises by 43%, with random noise of the same size by 2% (p = 0.02",
        ),
        ({"": losses(-0.2)}, 6, "No protection was measured"),
        ({"": losses(0.5)}, 1, "cannot tell protection from chance"),
    ],
)
def test_the_headline_promises_nothing_that_was_not_measured(made, measured, count, said):
    assert said in report.headline(run(made, measured, count))


def test_page_and_summary_caution_and_show_every_effect(made):
    chosen = run(made)
    words = made.seen(report.page(chosen)).words
    for text in (report.headline(chosen), report.CAUTION, "nothing: as saved", "jpeg", "blur", "mine-5.jpg"):
        assert text in words
    assert words.count("an effect remains") == 2
    assert words.count("not told from noise") == 2  # in the headline and in the table
    assert made.seen(report.page(run(made, count=1))).words.count("one picture: cannot be told") == 3
    summary = report.summary(chosen)
    assert "as saved" in summary
    assert f"{100 * report.effects(chosen)[1].beyond.value:+.1f} %" in summary


def imitations(made, protected, **more):
    """Likenesses of twelve samples: 0.8 with clean pictures, 0.75 with noised ones, and as given."""
    means = {"clean": 0.8, "noise": 0.75, "protected": protected} | more
    return {
        name: Imitation(made.pictures(12), mean + np.resize(WOBBLE, 12) * (1 + i))
        for i, (name, mean) in enumerate(means.items())
    }


@pytest.mark.parametrize(
    ("protected", "said"),
    [
        (0.5, "imitates them less well: "),
        (0.8, "No difference in imitation to clean pictures was measured"),
        (0.775, "less well than one on clean pictures, better than one on noised ones"),
        (0.9, "better, not worse"),
    ],
)
def test_imitation_is_told_against_clean_and_against_noise(made, protected, said):
    chosen = run(made, imitations=imitations(made, protected), likened="others")
    assert said in report.imitation_headline(chosen)
    assert said in report.summary(chosen).replace("\n", " ")


def test_imitation_is_shown_and_in_the_rows(made):
    kinds = imitations(made, 0.5, **{"protected, then jpeg": 0.7})
    chosen = run(made, imitations=kinds, likened="others")
    words = made.seen(report.page(chosen)).words
    assert "protected, then jpeg" in words
    found = report.rows(chosen, {})
    own = {(row.method, row.case["purifier"]): row.value for row in found if row.metric == "imitation"}
    assert own[("advdm", "jpeg")] == pytest.approx(0.7 + WOBBLE.mean() * 4)
    gaps = [row for row in found if row.metric == "imitation difference"]
    assert [(row.method, row.case["against"]) for row in gaps] == [
        ("noise", "clean"),
        *[("advdm", one) for one in ("clean", "noise")] * 2,
    ]
    assert "was not tried" in report.imitation_headline(run(made))


def test_rows_name_purifier_and_budget_and_leave_out_what_could_not_be_measured(made):
    found = report.rows(run(made), {"set": "mine"})
    rise = [row for row in found if row.metric == "loss_rise"]
    assert [row.case["purifier"] for row in rise] == ["none", "jpeg", "blur"]
    assert all(row.low < row.value < row.high and row.n == 6 and row.case["budget"] == 8 for row in rise)
    (lpips,) = [row for row in found if row.metric == "lpips"]
    assert (lpips.value, lpips.n) == (None, 0)


def test_hostile_texts_are_shown_and_never_run(made):
    names = dict.fromkeys(("method", "model", "prompt", "command"), HOSTILE)
    chosen = run(made, {"": losses(0.5), HOSTILE: losses(0.1)}, notes=(HOSTILE,), **names)
    pictures = tuple(dataclasses.replace(picture, name=HOSTILE) for picture in chosen.pictures)
    page = made.seen(report.page(dataclasses.replace(chosen, pictures=pictures)))
    assert len(page.all("script")) <= 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not [a for a in page.all("img") if not a["src"].startswith("data:image/png;base64,")]


def test_what_is_written_reads_back(made, tmp_path):
    written = report.write(tmp_path, run(made))
    again = result.read(tmp_path / "result.json")
    assert again.rows == written.rows
    assert again.details["losses"]["none"]["clean"] == pytest.approx(list(CLEAN))
    assert "beyond noise" in (tmp_path / "report.html").read_text()
