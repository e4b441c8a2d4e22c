import errno
import json
import math
import os

import numpy as np
import pytest

from dmsec_jax.metrics.extraction import Interval
from dmsec_jax.report import result
from dmsec_jax.report.result import Result, Row, row_over

NAMES = {"bench": "extraction", "metric": "AS", "unit": "cosine", "method": "plain"}
FIELDS = {
    "method": "finextract",
    "command": "dmsec extract",
    "config": {"w": 3.0, "steps": [1, 2]},
    "seeds": {"sampling": 7},
    "inputs": {"model": "0a" * 32},
    "seconds": {"sampling": 1.25},
    "rows": (Row(value=0.5, low=0.4, high=0.6, n=10, case={"set": "a", "n0": 10, "lora": None}, **NAMES),),
}


def made(**changes):
    return Result(**(FIELDS | changes))


def test_round_trip(tmp_path):
    there = made(pictures={"pictures/a.png": "a sheet"}, details={"scores": [0.1, None]}, notes=("a note",))
    result.write(tmp_path / "deep/result.json", there)
    assert result.read(tmp_path / "deep/result.json") == there


def test_a_row_has_exactly_the_tidy_keys():
    keys = ["bench", "metric", "value", "low", "high", "n", "unit", "method", "case"]
    (row,) = result.to_json(made())["rows"]
    assert sorted(row) == sorted(keys)


def test_machine_and_versions_are_recorded():
    written = result.to_json(made())
    assert set(written["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "numpy", "dmsec_jax"}
    assert written["device"]["platform"] == "cpu"
    assert written["device"]["count"] >= 1


def test_numbers_that_are_not_finite_become_null_with_a_note(tmp_path):
    rows = (Row(value=math.nan, n=0, **NAMES),)
    there = made(rows=rows, details={"scores": np.array([1.0, np.inf])}, config={"w": -math.inf}, notes=("first",))
    result.write(tmp_path / "result.json", there)
    text = (tmp_path / "result.json").read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert values["rows"][0]["value"] is None
    assert values["details"]["scores"] == [1.0, None]
    assert values["notes"] == [
        "first",
        "config.w was -inf, written as null",
        "rows[0].value was nan, written as null",
        "details.scores[1] was inf, written as null",
    ]
    assert result.read(tmp_path / "result.json").rows[0].value is None


def test_numpy_and_names_that_are_no_unicode_are_written(tmp_path):
    details = {"index": np.int64(3), "score": np.float32(0.5), "flags": np.array([True]), "name": "a\udc80.png"}
    result.write(tmp_path / "result.json", made(details=details))
    assert result.read(tmp_path / "result.json").details == {
        "index": 3,
        "score": 0.5,
        "flags": [True],
        "name": "a\udc80.png",
    }


def test_what_is_no_json_is_refused_by_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"details\.a\[0\] must be a JSON value, got complex"):
        result.write(tmp_path / "result.json", made(details={"a": [1j]}))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    result.write(path, made())
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        result.write(path, made(method="other"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bench": ""}, "named in full"),
        ({"n": -1}, "at least 0"),
        ({"low": 0.1}, "whole interval or none"),
        ({"low": 0.1, "high": math.nan}, "whole interval or none"),
        ({"low": 0.6, "high": 0.4}, "low <= high"),
        ({"value": True}, "made of numbers"),
        ({"case": {"a": [1]}}, "flat mapping of scalars"),
    ],
)
def test_rows_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Row(**({"value": 0.5, "n": 3, **NAMES} | change))


def test_row_over_an_interval():
    assert row_over(Interval(0.5, 0.4, 0.6, 9), **NAMES) == Row(value=0.5, low=0.4, high=0.6, n=9, **NAMES)
    assert row_over(Interval(0.5, -np.inf, np.inf, 1), **NAMES) == Row(value=0.5, n=1, **NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"model": "abc"}}, "SHA-256"),
        ({"seconds": {"sampling": -1}}, "at least 0"),
        ({"seconds": {"sampling": math.nan}}, "at least 0"),
        ({"seeds": {"sampling": 1.5}}, "an integer"),
        ({"pictures": {"../a.png": ""}}, "inside the folder"),
        ({"pictures": {"/a.png": ""}}, "inside the folder"),
    ],
)
def test_results_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        made(**change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(schema="other"), "of schema dmsec-result 1"),
        (lambda v: v.update(version=2), "of schema dmsec-result 1"),
        (lambda v: v.update(rowz=[]), "did you mean 'rows'"),
        (lambda v: v.pop("command"), "complete for Result"),
        (lambda v: v["rows"][0].update(value="high"), "of type float"),
        (lambda v: v["rows"][0].update(extra=1), "unknown key 'extra'"),
        (lambda v: v["rows"][0].update(value=math.nan), "free of NaN"),
    ],
)
def test_reading_is_strict(tmp_path, edit, message):
    values = result.to_json(made())
    edit(values)
    (tmp_path / "result.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        result.read(tmp_path / "result.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        result.read(tmp_path / "result.json")
