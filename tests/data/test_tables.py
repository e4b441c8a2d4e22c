"""Tables from files and frames: names are kept, and what cannot be used is named."""

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dmsec_jax.data import tables

RNG = np.random.default_rng(0)
GOOD = tables.Table(("a", "b", "c"), RNG.normal(size=(20, 3)))


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_text_is_read_with_its_names(tmp_path, separator):
    lines = [("height", "weight, net", "p44/42"), ("1", "2.5", "-3e-1"), ("4", "", "NA")]
    rows = [separator.join(f'"{cell}"' if separator in cell else cell for cell in line) for line in lines]
    found = tables.read(written(tmp_path / "data.csv", "\ufeff" + "\n".join(rows) + "\n"))
    assert found.names == lines[0]
    np.testing.assert_array_equal(found.values, [[1, 2.5, -0.3], [4, np.nan, np.nan]])
    np.testing.assert_array_equal(tables.without_missing(found).values, [[1, 2.5, -0.3]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b,c\n1,2,x\n3,red,4\n", "text in b ('red'), c ('x')"),
        ("a,b,c\n1,2,3\n1,2\n", "2 on line 3"),
        ("\na,b,c\n\n1,2,3\n\n1,2\n", "2 on line 6"),
        ("\n\n\n", "a header and rows, got 0 lines"),
        ('a,b,c\n1,"2,3\n' + "1,2,3\n" * 40_000, "a quote that is not closed"),
        ("a,b,a\n1,2,3\n", "twice a"),
        ("1,2,3\n4,5,6\n", "add a line of names"),
        ("a,b,c\n", "a header and rows"),
    ],
)
def test_bad_text_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match="must be") as error:
        tables.read(written(tmp_path / "data.csv", text))
    assert said in str(error.value)


def test_arrays_are_read_and_pickles_are_not(tmp_path):
    np.save(tmp_path / "data.npy", GOOD.values)
    found = tables.read(tmp_path / "data.npy")
    assert found.names == ("x0", "x1", "x2")
    np.testing.assert_array_equal(found.values, GOOD.values)
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="array of numbers"):
        tables.read(tmp_path / "objects.npy")
    header = (tmp_path / "data.npy").read_bytes().replace(b"(20, 3), }          ", b"(20, 494780232499), }")
    for name, content in {"large": header, "zip": b"PK\x03\x04 not a zip"}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(ValueError, match="array of numbers"):
            tables.read(tmp_path / f"{name}.npy")
    with pytest.raises(ValueError, match="one of .csv"):
        tables.read(written(tmp_path / "data.xls", ""))


def test_parquet_keeps_names_and_gaps(tmp_path):
    parquet.write_table(pyarrow.table({"a": [1.0, None], "b": [3, 4]}), tmp_path / "data.parquet")
    found = tables.read(tmp_path / "data.parquet")
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.values, [[1, 3], [np.nan, 4]])


class Frame(dict):
    """As much of a data frame as is asked of one."""

    @property
    def columns(self):
        return list(self)


def test_frames_keep_their_names():
    frame = Frame(a=np.arange(3), b=np.array([True, False, True]))
    found = tables.of(frame)
    assert found.names == ("a", "b")
    np.testing.assert_array_equal(found.values, [[0, 1], [1, 0], [2, 1]])
    with pytest.raises(ValueError, match="text in c"):
        tables.of(Frame(frame, c=np.array(["x", "y", "z"])))


def spoilt(change):
    values = GOOD.values.copy()
    change(values)
    return GOOD._replace(values=values)


def put(where, value):
    return lambda values: values.__setitem__(where, value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (spoilt(put((slice(4), 1), np.nan)), "missing values in b (4 of 20)"),
        (spoilt(put((0, 2), np.inf)), "infinity in c"),
        (spoilt(put((slice(None), 0), 7.0)), "no variation in a"),
        (spoilt(lambda values: put((slice(None), 2), 1 - 3 * values[:, 0])(values)), "duplicates: a and c"),
        (GOOD._replace(values=GOOD.values[:9]), "at least 10 rows, got 9"),
        (tables.Table(("a", "b"), GOOD.values[:, :2]), "at least 3 columns, got 2"),
    ],
)
def test_what_no_graph_can_be_learnt_from_is_named(table, said):
    tables.check(GOOD)
    with pytest.raises(ValueError, match="data must be") as error:
        tables.check(table)
    assert said in str(error.value)
