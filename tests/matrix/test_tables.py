"""The table keeps every value and kind, in both files."""

import numpy as np
import pytest

from benchmarks.matrix import tables

ROWS = [
    {"cell": "ab12", "seed": 0, "rate": 0.1 + 0.2, "stage": "copying", "copied": 3, "seconds_training": 1.5},
    {"cell": "cd34", "seed": 1, "rate": 1e-05, "stage": "learning", "copied": 0, "seconds_training": 2.0},
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_is_read_is_what_was_written(tmp_path, suffix):
    tables.write(tmp_path / "table", ROWS)
    found = tables.read(tmp_path / f"table{suffix}")
    assert found == ROWS
    assert [type(value) for value in found[0].values()] == [type(value) for value in ROWS[0].values()]


def test_the_same_rows_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        tables.write(tmp_path / name, ROWS)
    for suffix in (".csv", ".parquet"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_row_is_its_settings_digests_figures_and_cost():
    arrays = {
        "figure/AS": np.float64(0.5),
        "figure/copied": np.int64(2),
        "digest/base_sha256": np.asarray("ff"),
        "cost/compilations": np.int64(1),
    }
    arrays["pictures/samples"] = np.zeros((2, 4, 4, 3), np.uint8)
    row = tables.row("ab", {"set": "x"}, arrays)
    assert row == {"cell": "ab", "set": "x", "base_sha256": "ff", "AS": 0.5, "copied": 2, "compilations": 1}


def test_tables_that_differ_in_floats_and_cost_alone_are_the_same():
    other = [ROWS[0] | {"rate": 0.3, "seconds_training": 9.0}, ROWS[1] | {"copied": 1}]
    assert tables.differing(ROWS, other) == {"cd34": "copied 0, was 1"}
    assert tables.differing(ROWS, ROWS[:1]) == {"cd34": "is not there"}
    assert not tables.differing(ROWS[:1], ROWS)


def test_discrete_columns_are_text_and_integers_without_cost():
    assert tables.discrete(ROWS)[0] == {"cell": "ab12", "seed": 0, "stage": "copying", "copied": 3}
