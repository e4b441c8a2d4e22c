import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmsec_jax.data.images import to_uint8
from dmsec_jax.metrics.extraction import Matches
from dmsec_jax.report import extraction as report
from dmsec_jax.report import result
from dmsec_jax.report.training import Course, Sheet

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;\u202e\x1b[2J"
ATTRIBUTES_THAT_LOAD = ("src", "href", "srcset", "poster", "data", "action", "background")


@pytest.fixture(scope="module")
def page(made):
    return report.page(made.extraction())


@pytest.fixture(scope="module")
def hostile(made):
    """A report in which every text from outside is hostile, as page."""
    names = tuple(f"{HOSTILE}{i}" for i in range(4))
    method = made.method(label=HOSTILE, description=HOSTILE)
    texts = dict.fromkeys(("prompt", "base", "tuned", "command", "similarity"), HOSTILE)
    mappings = {"config": {HOSTILE: HOSTILE}, "seeds": {HOSTILE: 1}, "seconds": {HOSTILE: 1.0}}
    inputs = {"inputs": {HOSTILE: "0" * 64}, "notes": (HOSTILE,)}
    extraction = made.extraction((method,), names=names, holdout_names=names, **texts, **mappings, **inputs)
    return report.page(extraction, report.result_of(extraction, {"set": HOSTILE}))


def test_hostile_texts_are_shown_and_never_run(made, hostile):
    seen = made.seen(hostile)
    assert len(seen.all("script")) == 1
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert not [a for a in seen.all("img") if not a["src"].startswith("data:image/png;base64,")]
    assert "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}&amp;" in seen.text


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_nothing_is_loaded_from_outside(made, which, request):
    text = request.getfixturevalue(which)
    seen = made.seen(text)
    links = [a[name] for _, a in seen.tags for name in ATTRIBUTES_THAT_LOAD if name in a]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in seen.tags}
    assert "http://" not in text
    assert "https://" not in text
    styles = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert "@import" not in styles
    assert not re.findall(r"url\((?!#)", styles)


def test_the_policy_forbids_every_load_and_names_the_script(made, page):
    (policy,) = [a["content"] for a in made.seen(page).all("meta") if "content-security" in str(a).lower()]
    assert "default-src 'none'" in policy
    assert "'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_the_page_is_complete(made, page):
    seen = made.seen(page)
    opened = [tag for tag, _ in seen.tags if tag in ("section", "table", "tr", "td", "figure", "details", "div", "p")]
    for tag in set(opened):
        assert page.count(f"</{tag}>") == opened.count(tag), tag
    assert page.startswith("<!DOCTYPE html>")
    assert 'lang="en"' in page[:100]
    words = seen.words
    for text in (
        "Picture by picture",
        "never saw",
        "What the numbers mean",
        "How it could be wrong",
        "How to reproduce",
    ):
        assert text in words
    assert "dmsec extract --seed 0" in words


def test_every_picture_has_its_row_its_score_and_an_alternative_text(made, page):
    seen = made.seen(page)
    alts = [a["alt"] for a in seen.all("img")]
    assert all(alts)
    for i, score in enumerate(("0.90", "0.80", "0.70", "0.20")):
        assert f"training picture train-{i}.png" in alts
        assert f"best extraction of train-{i}.png by Finextract, score {score}" in alts
        assert f"hold-out held-{i}.png" in alts
    assert seen.words.count("no match") == 1 + 3 + 4 + 4  # the main method, plain, and both for the hold-outs
    assert len(re.findall('class="match', page)) == 3 + 1


def test_rows_come_best_first(made):
    scores = (0.2, 0.9, 0.1, 0.6)
    alts = [a["alt"] for a in made.seen(report.page(made.extraction((made.method(scores=scores),)))).all("img")]
    order = [alt.removeprefix("training picture ") for alt in alts if alt.startswith("training picture")]
    assert order == ["train-1.png", "train-3.png", "train-0.png", "train-2.png"]


def test_holdouts_may_be_missing(made):
    extraction = made.without_holdouts()
    words = made.seen(report.page(extraction)).words
    assert "No hold-outs were given" in words
    assert "Hold-outs: pictures never trained on" not in words
    assert {row.case["pictures"] for row in report.rows(extraction, {})} == {"training"}
    assert "hold-outs" in report.summary(extraction)


def test_images_without_groups_are_not_called_broken(made):
    loose = dataclasses.replace(made.failed(), finite=40)
    words = made.seen(report.page(made.extraction((loose, made.failed("plain"))))).words
    assert words.count("Nothing: no group of look-alikes was found.") == 1
    assert words.count("Nothing: no image was finite.") == 1


def test_a_method_that_failed_is_shown_as_such(made):
    extraction = made.extraction((made.failed(), made.method("plain")))
    seen = made.seen(report.page(extraction))
    assert "Nothing could be sampled" in seen.words
    assert "40 broken" in seen.words
    assert "Expected from chance" not in seen.words
    assert "nan" not in seen.words.lower().replace("nan or inf", "").split()
    rows = [row for row in report.rows(extraction, {}) if row.method == "finextract"]
    assert rows
    assert all(row.value is None and row.n == 0 for row in rows)
    assert "40 images with NaN" in report.summary(extraction)
    assert "match" not in report.summary(extraction)


def test_scores_of_single_clusters_may_be_nan(made):
    nan = np.full(4, np.nan)
    method = made.method(tightness=nan, base_similarity=nan, sizes=np.ones(4, int))
    words = made.seen(report.page(made.extraction((method,)))).words
    assert words.count("single") >= 4
    assert " nan" not in words.replace("NaN or inf", "").lower()


def test_what_the_base_model_makes_is_marked(made):
    method = made.method(scores=(0.9, 0.8, 0.7, 0.2), base_similarity=np.full(4, 0.4))
    page = report.page(made.extraction((method,), base_scores=np.array([0.9, 0.6, 0.1, 0.9])))
    assert made.seen(page).words.count("base too") == 1  # the fourth picture has no match to begin with
    assert made.seen(page).words.count("base 0.40: no evidence") == 1


def test_base_scores_fit_the_pictures(made):
    with pytest.raises(ValueError, match="base scores must be one per picture"):
        made.extraction(base_scores=np.zeros(3))


def test_many_pictures_fold_away(made):
    count = report.SHOWN + 3
    names, scores = tuple(f"{i}.png" for i in range(count)), np.linspace(0, 1, count)
    extraction = made.extraction((made.method(scores=scores),), pictures=made.pictures(count), names=names)
    words = made.seen(report.page(extraction)).words
    assert words.count("The other 3") == 2  # rows and clusters


def test_the_course_of_training_is_a_section(made):
    course = Course(loss=np.array([0.5, np.nan, 0.2]), sheets=(Sheet(step=3, samples=made.pictures(2)),))
    words = made.seen(report.page(made.extraction(course=course))).words
    assert "How the model was fine-tuned" in words
    assert "after 3 steps" in words


def test_jax_arrays_do_as_well(made):
    fields = ("extracted", "sizes", "tightness", "base_similarity", "samples")
    method = made.method()
    method = made.method(**{name: jnp.asarray(getattr(method, name)) for name in fields})
    with_jax = made.extraction(
        (method,), pictures=jnp.asarray(made.pictures(4)), holdouts=jnp.asarray(made.pictures(4, 3))
    )
    assert report.page(with_jax) == report.page(made.extraction((made.method(),)))


def test_summary_fits_one_screen(made):
    long = "a very long label for a method of sampling" * 4
    methods = tuple(made.method(f"m{i}", label=long) for i in range(12))
    for extraction in (
        made.extraction(methods, prompt=HOSTILE * 9, tuned=long * 3),
        made.without_holdouts(),
        made.extraction((made.failed(), made.failed("plain"))),
    ):
        lines = report.summary(extraction).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "\x1b" not in "".join(lines)
    assert "and 5 more" in report.summary(made.extraction(methods))


def test_summary_says_what_the_page_says(made):
    plain = made.method("plain", (0.6, 0.2, 0.1, 0.1), nulls=(0.1, 0.2, 0.3, 0.2))
    lines = report.summary(made.extraction((made.method(), plain))).splitlines()
    assert "3 of 4 training pictures" in "".join(lines)
    (line,) = [line for line in lines if line.startswith("Plain")]
    assert line.split() == ["Plain", "2,000", "1/4", "0.25", "0.25", "0.25", "/", "0.20"]
    swept = made.method("finextract-w2-km0p02", label="FineXtract, w = 2, k = -0.02")
    assert "\nFineXtract, w=2, k=-0.02 " in report.summary(made.extraction((swept,)))


def test_rows_are_tidy_and_complete(made):
    rows = report.rows(made.extraction(), {"set": "toy", "tuner": "full", "steps": 600})
    assert len(rows) == 2 * 2 * 2 * 4
    assert {row.metric for row in rows} == {"AS", "A-ESR@0.6", "A-ESR@0.7", "A-ESR@cal"}
    case = {"set": "toy", "tuner": "full", "steps": 600, "n0": 4, "stage": "all", "pictures": "training"}
    (rate,) = [r for r in rows if r.metric == "A-ESR@cal" and r.method == "finextract" and r.case == case]
    assert (rate.bench, rate.value, rate.n, rate.unit) == ("extraction", 0.75, 4, "share")
    assert rate.low < 0.75 < rate.high


def test_files_are_written_and_agree(made, tmp_path):
    extraction = made.extraction()
    report.write(tmp_path, extraction, {"set": "toy"})
    found = result.read(tmp_path / "result.json")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"result.json", "report.html", *found.pictures}
    assert found.rows == report.rows(extraction, {"set": "toy"})
    assert found.details["verdict"]["training"] == [3, 4]
    assert found.details["methods"]["plain"]["training"][0] == {"picture": "train-0.png", "extracted": 0, "score": 0.6}
    first = np.asarray(Image.open(tmp_path / "pictures/finextract/001.png"))
    np.testing.assert_array_equal(first, to_uint8(extraction.main.extracted[0]))
    sheet = np.asarray(Image.open(tmp_path / "pictures/training.png"))
    np.testing.assert_array_equal(sheet[:8, :8], to_uint8(extraction.pictures[0]))
    np.testing.assert_array_equal(sheet[10:18, :8], to_uint8(extraction.main.extracted[0]))
    assert found.device["kind"] in (tmp_path / "report.html").read_text()


def test_a_failed_run_is_written_too(made, tmp_path):
    report.write(tmp_path, made.extraction((made.failed(),)), {})
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["details"]["verdict"]["kind"] == "failed"


def test_pictures_of_an_earlier_run_go_and_nothing_else(made, tmp_path):
    report.write(tmp_path, made.extraction((made.method("cfg"), made.method("plain"))), {})
    own = [tmp_path / "pictures" / "mine.png", tmp_path / "pictures" / "cfg" / "005.png", tmp_path / "model" / "a.png"]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    report.write(tmp_path, made.extraction((made.method(), made.method("plain"))), {})
    assert all(path.read_bytes() == b"mine" for path in own)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(tmp_path).as_posix() for path in own}
    assert written - kept == {"result.json", "report.html", *result.read(tmp_path / "result.json").pictures}


def test_a_forged_list_of_pictures_removes_nothing_else(made, tmp_path):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    report.write(folder, made.extraction(), {})
    outside.mkdir()
    (folder / "pictures" / "linked").symlink_to(outside)
    (folder / "pictures" / "link.png").symlink_to(outside / "a.png")
    (folder / "pictures" / "folder.png").mkdir()
    kept = [outside / "a.png", folder / "notes.png", folder / "model" / "a.png", folder / "pictures" / "notes.txt"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    values = json.loads((folder / "result.json").read_text())
    inside = ["notes.png", "model/a.png", "pictures/notes.txt", "pictures/linked/a.png", "pictures/link.png"]
    for names in (inside, ["pictures/folder.png", "pictures/\0.png", ".", ""], ["../outside/a.png"], [str(kept[0])]):
        (folder / "result.json").write_text(json.dumps(values | {"pictures": dict.fromkeys(names, "")}))
        report.write(folder, made.extraction(), {})
    assert all(path.read_bytes() == b"mine" for path in kept)
    assert (folder / "pictures" / "link.png").is_symlink()
    assert (folder / "pictures" / "folder.png").is_dir()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": "other", "pictures": {"pictures/training.png": ""}}'])
def test_a_result_of_something_else_is_no_list_of_pictures(made, tmp_path, content):
    (tmp_path / "pictures" / "cfg").mkdir(parents=True)
    (tmp_path / "pictures" / "cfg" / "001.png").write_bytes(b"mine")
    (tmp_path / "result.json").write_bytes(content)
    report.write(tmp_path, made.extraction(), {})
    assert (tmp_path / "pictures" / "cfg" / "001.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a",) * 3}, "named one by one"),
        ({"pictures": np.full((4, 8, 8, 3), 2, np.float32)}, r"in \[-1, 1\]"),
        ({"holdout_names": ()}, "named one by one"),
        ({"thresholds": (0.6, 0.8)}, r"none at \[0.8\]"),
    ],
)
def test_extractions_are_checked(made, change, message):
    with pytest.raises(ValueError, match=message):
        made.extraction(**change)


def test_methods_are_checked(made):
    with pytest.raises(ValueError, match="of different names"):
        made.extraction((made.method(), made.method()))
    with pytest.raises(ValueError, match="lower-case"):
        made.method("../evil")
    with pytest.raises(ValueError, match="at most generated"):
        made.method(finite=41)
    with pytest.raises(ValueError, match="indices of extracted"):
        made.method(matches=Matches(np.array([0, 1, 2, 9]), np.ones(4)))
    with pytest.raises(ValueError, match=r"matches of finextract must be \[4\]"):
        made.extraction((made.method(scores=(0.1, 0.2)),))
