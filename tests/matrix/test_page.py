"""The page says what the table says, in figures and in shade, and stands alone."""

import re

import numpy as np
import pytest
from matrix_world import table

from benchmarks.matrix import page, statistics, store
from benchmarks.matrix.page import ATTACKS, WORTH
from benchmarks.matrix.plan import Cell

COLUMNS = tuple(
    dict.fromkeys([*statistics.FAMILY, *ATTACKS, *WORTH, *(one.replace("AS_", "AS-holdout_") for one in ATTACKS)])
)


@pytest.fixture(scope="module")
def rows():
    found = table(COLUMNS)
    return [{name: 0.1 if "holdout" in name else value for name, value in row.items()} for row in found]


def test_shade_is_the_share_of_the_leak_that_is_left(rows):
    found = page.leaks(rows, "all")
    lines = dict(found.rows)
    assert list(lines) == ["none", "noise", "AdvDM", "Bayesian", "noise + Bayesian", "AdvDM + Bayesian"]
    assert all(field.shade == 1 for field in lines["none"])
    assert not any(field.note for field in lines["none"])
    extraction = lines["AdvDM"][0]  # 0.3 of 0.6 is left, and 0.1 is found where there is nothing
    assert extraction.shade == pytest.approx(0.4, abs=0.05)
    assert float(extraction.note) == pytest.approx(-0.3, abs=0.03)
    assert lines["AdvDM"][3].shade == 0, "an AUC below a half leaks nothing"


def test_the_page_is_whole_and_loads_nothing(tmp_path, rows):
    cell = Cell(set="one", seed=0, n0=2, steps=25, tuner="full", objective="plain", treatment="clean", rank=0, rate=1e-4,
                sigma0=0.0, prior_weight=0.0, budget=0.0)  # fmt: skip
    file = store.path(tmp_path, "cells", "ab")
    file.parent.mkdir()
    store.save(
        file, {f"pictures/{kind}": np.zeros((2, 8, 8, 3), np.uint8) for kind in ("training", "samples", "extracted")}
    )
    found = statistics.all_comparisons(rows)
    page.write(tmp_path / "page.html", tmp_path, {"ab": cell}, rows, found, None, ["incomplete <b>"])
    text = (tmp_path / "page.html").read_text()
    assert "What we could not reproduce" in text
    assert "incomplete &lt;b&gt;" in text
    assert text.count("data:image/png") == 6
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "advdm over clean" in text
