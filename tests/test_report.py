"""Every figure in the README comes from the committed results, and stays so."""

import re
import shutil

import pytest

from benchmarks import claims, report
from benchmarks.figures import common

README = """# x
## Results
{prose}
<!-- pod: begin, written by python -m benchmarks.report -->
{block}
<!-- pod: end -->
## Other
64 pixels
"""


def test_the_readme_is_what_the_results_give():
    assert report.stale() == [], "run python -m benchmarks.report"


def test_no_figure_is_typed_into_the_readme():
    assert report.typed(common.README.read_text()) == []


@pytest.mark.parametrize(("prose", "wrong"), [
    ("Five seeds.", False),
    ("It leads by 0.10.", True),
    ("After 300 steps.", True),
    ("See `python -m benchmarks.pod --rows 8` and [it](a/1.svg), arXiv 2410.03039.", False),
    ("```\nrun 8\n```", False),
])  # fmt: skip
def test_digits_in_prose_are_found_where_a_block_is(prose, wrong):
    assert bool(report.typed(README.format(prose=prose, block="| 1 |"))) == wrong


def test_a_changed_figure_is_found_and_put_right(tmp_path, monkeypatch):
    copy = tmp_path / "README.md"
    shutil.copy(common.README, copy)
    text = copy.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| v5e-4 | UNet |"))
    figure = re.search(r"\d+\.\d\d ", row)[0]
    copy.write_text(text.replace(row, row.replace(figure, f"{float(figure) - 1:.2f} ")))
    only_pod = report.blocks(text)["pod"]
    monkeypatch.setattr(report, "blocks", lambda readme, of=report.blocks: {"pod": of(readme).get("pod", only_pod)})
    monkeypatch.setattr(common, "README", copy)
    monkeypatch.setitem(common._places, "root", tmp_path)
    assert report.stale() == ["pod"]
    report.draw()
    assert copy.read_text() == text


def difference(low, high, value=None, **case):
    value = (low + high) / 2 if value is None else value
    case = {
        "set": "a",
        "against": "cfg",
        "stage": "clustered",
        "pictures": "training",
        "clustering": "agglomerative",
    } | case
    return {"metric": "AS difference", "method": "finextract", "value": value, "low": low, "high": high, "case": case}


@pytest.mark.parametrize(("rows", "holds"), [
    ([], "not measured yet"),
    ([difference(0.1, 0.2), difference(0.1, 0.3), difference(-0.1, 0.2)], "yes"),
    ([difference(0.1, 0.2), difference(0.1, 0.3), difference(-0.3, -0.2)], "in part"),
    ([difference(0.1, 0.2), difference(-0.1, 0.3), difference(-0.1, 0.2)], "open"),  # one of three is chance
    ([difference(0.1, 0.2), difference(0.1, 0.3), *[difference(-0.1, 0.2)] * 3], "in part"),
    ([difference(-0.1, 0.2)], "open"),
    ([difference(0.1, 0.2), difference(-0.3, -0.2)], "mixed"),
    ([difference(0.0, 0.0)] * 3, "cannot be told"),
    ([difference(0.1, 0.2), difference(-0.3, -0.2), difference(-0.3, -0.1)], "no"),
    ([difference(0.1, 0.2, against="plain")], "not measured yet"),
])  # fmt: skip
def test_a_claim_is_judged_by_its_cases(rows, holds):
    claim = next(claim for claim in claims.CLAIMS if claim.says.startswith("Guidance away"))
    apart = [row | {"case": row["case"] | {"set": str(i)}} for i, row in enumerate(rows)]
    assert claims.verdict(claim, apart).holds == holds


def test_the_lengths_of_a_training_are_one_case():
    claim = next(claim for claim in claims.CLAIMS if claim.says.startswith("Guidance away"))
    rows = [difference(0.1, 0.3, steps=200), difference(-0.1, 0.2, steps=400), difference(-0.2, -0.1, set="b")]
    found = claims.verdict(claim, rows)
    assert (found.cases, found.favour, found.against) == (2, 0, 1), "the mean of the first two is [0.0, 0.25]"


def test_a_claim_of_less_is_judged_the_other_way_round():
    claim = next(claim for claim in claims.CLAIMS if claim.sign < 0 and claim.says.startswith("Samples keep"))
    row = difference(0.1, 0.2) | {"metric": "quality dip difference", "method": "bayes-norm"}
    found = claims.verdict(claim, [row])
    assert (found.favour, found.against, found.low) == (0, 1, pytest.approx(0.15))


def test_cgi_dm_is_judged_against_earlier_tests_alone():
    claim = next(claim for claim in claims.CLAIMS if claim.paper == "CGI-DM")
    gap = difference(0.1, 0.2, against="secmi") | {"metric": "AUC difference", "method": "cgi-dm"}
    public = gap | {"case": gap["case"] | {"against": "cgi-dm-faithful"}}
    other = gap | {"method": "loss-difference"}
    assert claims.verdict(claim, [gap, public, other]).cases == 1
