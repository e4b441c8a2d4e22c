import dataclasses

import numpy as np
import pytest

from dmsec_jax.metrics import evidence
from dmsec_jax.report import authentication as report
from dmsec_jax.report import result
from dmsec_jax.report.authentication_data import Authentication, Outcome, Recovered, scaled
from dmsec_jax.report.authentication_verdict import finding, verdict

SHA = "0123456789abcdef" * 4
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;\u202e\x1b[2J"


def a_test(name="loss-difference", scores=(5, 6, 7, 8.0), null=(1, 2, 3, 4.0), **changes):
    as_array = lambda values: None if values is None else np.asarray(values, float)
    fields = {"label": name.title(), "description": "what it asks", "evaluations": 128}
    return Outcome(name=name, scores=as_array(scores), null=as_array(null), **(fields | changes))


def found(made, tests=None, count=4, known=4, **changes):
    tests = tests or (a_test(),)
    pictures = made.pictures
    recovered = lambda n: Recovered(partial=pictures(n, 2), images=pictures(n, 3), error=np.linspace(0.2, 0.9, n))
    fields = {
        "prompt": "a painting",
        "base": "nano",
        "tuned": "tuned",
        "pictures": pictures(count),
        "names": tuple(f"mine-{i}.png" for i in range(count)),
        "non_members": pictures(known, 1) if known else None,
        "non_member_names": tuple(f"other-{i}.png" for i in range(known)),
        "tests": tests,
        "recovered": recovered(count),
        "non_members_recovered": recovered(known) if known else None,
        "command": "dmsec authenticate --seed 0",
        "config": {"seed": 0},
        "seeds": {"seed": 0},
        "seconds": {"statistics": 1.5},
        "inputs": {"model": SHA},
    }
    return Authentication(**(fields | changes))


def test_a_set_that_scores_higher_was_used(made):
    judged = verdict(found(made))
    assert judged.kind == "used"
    assert judged.headline == "There is some evidence that these 4 pictures were used to fine-tune this model."
    assert judged.finding.whole.p_value == pytest.approx(1 / 70)
    assert "about once in 70 audits" in judged.reasons[0]
    assert "100% of all pairs" in judged.reasons[1]
    assert "with 4 non-members no p-value is below 0.20" in judged.reasons[2]


def test_single_pictures_are_claimed_where_there_are_enough_non_members(made):
    rng = np.random.default_rng(0)
    tests = (a_test(scores=[9, 9, 9, 0.5], null=rng.uniform(0, 1, 100)),)
    judged = verdict(found(made, tests, known=100))
    assert judged.finding.single == 3
    assert "3 of 4 can be claimed" in judged.reasons[2]


def test_a_set_like_the_others_was_not(made):
    judged = verdict(found(made, (a_test(scores=(1.5, 2.5, 3.5, 0.5)),)))
    assert judged.kind == "none"
    assert "no proof that they were not" in judged.reasons[0]


def test_sets_that_the_base_model_tells_apart_prove_nothing(made):
    values = np.arange(6.0)
    apart = a_test("base-loss", values + 100, values)
    tests = (a_test(scores=values + 100, null=values),)
    for control in (apart, a_test("base-loss", apart.null, apart.scores)):
        judged = verdict(found(made, tests, 6, 6, control=control))
        assert judged.kind == "differs"
        assert judged.control.p_value == pytest.approx(2 / 924)
    same = a_test("base-loss", values, values + 0.5)
    assert verdict(found(made, tests, 6, 6, control=same)).kind == "used"


@pytest.mark.parametrize(("count", "known", "kind"), [(1, 18, "few"), (1, 19, "used"), (2, 4, "few"), (3, 3, "used")])
def test_too_few_pictures_are_said_to_be_too_few(made, count, known, kind):
    tests = (a_test(scores=np.arange(count) + 100, null=np.arange(known)),)
    assert verdict(found(made, tests, count, known)).kind == kind


def test_without_non_members_nothing_is_said(made):
    alone = found(made, (a_test(null=None),), known=0)
    assert verdict(alone).kind == "unknown"
    assert report.rows(alone, {}) == ()
    assert "Without non-members nothing can be concluded." in report.summary(alone)
    page = made.seen(report.page(alone)).words
    assert "no measure" in page
    assert "Test by test" not in page


def test_figures_are_those_of_the_metrics(made):
    rng = np.random.default_rng(1)
    own = finding(a_test(scores=rng.normal(size=7), null=rng.normal(size=9)), 0)
    rng = np.random.default_rng(1)
    scores, null = rng.normal(size=7), rng.normal(size=9)
    assert own.auc == evidence.auc(scores, null)
    np.testing.assert_array_equal(own.p_values, evidence.p_values(scores, null))
    assert own.single == (evidence.benjamini_hochberg(own.p_values) <= 0.05).sum()


def test_scaled_scores_are_in_deviations_of_the_null():
    scores, null = scaled(a_test(scores=[3.0], null=[0.0, 2.0]))
    np.testing.assert_allclose(null, [-(0.5**0.5), 0.5**0.5])
    np.testing.assert_allclose(scores, [2 * 0.5**0.5 * 1])
    assert np.isfinite(scaled(a_test(scores=[3.0], null=[1.0]))[0]).all()


def test_the_page_shows_everything_and_disarms_hostile_texts(made):
    texts = dict.fromkeys(("prompt", "base", "tuned", "command"), HOSTILE)
    names = {"names": tuple(f"{HOSTILE}{i}" for i in range(4)), "notes": (HOSTILE,), "inputs": {HOSTILE: SHA}}
    tests = (a_test(), a_test("cgi-dm", (1, 2, 3, 4), (1, 2, 3, 3.5), label=HOSTILE, description=HOSTILE))
    hostile = found(made, tests, control=a_test("base-loss", (1, 2, 3, 4), (1, 2, 3, 4)), **texts, **names)
    text = report.page(hostile, report.result_of(hostile, {}))
    seen = made.seen(text)
    assert len(seen.all("script")) == 1
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert "http://" not in text
    assert "https://" not in text
    for words in ("Picture by picture", "Test by test", "How it could be wrong", "Control", "How to reproduce"):
        assert words in seen.words, words
    assert len(seen.all("img")) == 2 * 4 * 3
    for tag in ("section", "table", "tr", "td", "figure", "details", "div", "p"):
        assert text.count(f"</{tag}>") == sum(name == tag for name, _ in seen.tags), tag


def test_written_files_come_back(made, tmp_path):
    written = report.write(tmp_path, found(made), {"set": "mine"})
    assert result.read(tmp_path / "result.json").details["verdict"]["kind"] == "used"
    assert {row.metric for row in written.rows} == {"AUC", "TPR@1%FPR", "p_value", "claimed"}
    assert all(row.case == {"set": "mine", "evaluations": 128} for row in written.rows)
    assert sorted(written.pictures) == ["pictures/non-members.png", "pictures/pictures.png"]
    assert (tmp_path / "report.html").is_file()


def test_pictures_of_an_earlier_report_go(made, tmp_path):
    report.write(tmp_path, found(made), {})
    report.write(tmp_path, found(made, recovered=None, non_members_recovered=None), {})
    assert list((tmp_path / "pictures").iterdir()) == []


def test_summary_fits_a_terminal(made):
    wide = found(made, tuple(a_test(f"{i}", label="x" * 100) for i in range(8)), tuned="y" * 200)
    lines = report.summary(wide).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("changes", "message"), [
    ({"names": ("a",)}, "named one by one"),
    ({"tests": (a_test(scores=(1, 2)),)}, "scores of loss-difference must be of"),
    ({"tests": (a_test(null=None),)}, "scores of loss-difference must be of"),
    ({"control": a_test("base-loss", null=(1, 2))}, "scores of base-loss must be of"),
    ({"non_members_recovered": None, "recovered": Recovered(partial=np.zeros((1, 8, 8, 3)), images=np.zeros((1, 8, 8, 3)), error=np.zeros(1))},
     "recovered must be of 4 pictures"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(made, changes, message):
    with pytest.raises(ValueError, match=message):
        found(made, **changes)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="scores of loss"):
        a_test(scores=(1, np.nan))
    assert dataclasses.replace(a_test(), null=None).null is None
