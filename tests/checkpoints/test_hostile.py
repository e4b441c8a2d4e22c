"""Every reader on hostile files: each option of each JSON file with each nasty value, and damaged files; `benchmarks.fuzz` tries more."""

import json
import random

import pytest

from benchmarks import fuzz
from benchmarks.mutation import VALUES, mutate
from benchmarks.readers import readers

READERS = readers()
JSON = [name for name, reader in READERS.items() if reader.header == 0 and "token" not in name]


@pytest.fixture
def attempt(tmp_path):
    """Gives files to a reader; returns what became of each."""

    def run(name, contents):
        for beside, content in READERS[name].beside.items():
            (tmp_path / beside).write_bytes(content)
        with fuzz.alarm():
            return [fuzz.attempt(READERS[name], tmp_path, content) for content in contents]

    return run


@pytest.mark.parametrize("name", READERS)
def test_honest_files_are_read(attempt, name):
    assert set(attempt(name, READERS[name].seeds)) == {"read"}


@pytest.mark.parametrize("name", JSON)
def test_every_option_with_every_nasty_value(attempt, name):
    honest = json.loads(READERS[name].seeds[0])
    files = [json.dumps(honest | {key: value}).encode() for key in honest for value in VALUES]
    found = attempt(name, files)
    assert not {"crash", "hang"} & set(found)
    assert len(set(found)) > 5, "the values make a difference"


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_our_words(attempt, name):
    reader, rng = READERS[name], random.Random(name)
    files = [mutate(rng, rng.choice(reader.seeds), rng.choice(reader.seeds), reader.header) for _ in range(80)]
    found = attempt(name, files)
    assert not {"crash", "hang"} & set(found)
    assert len(set(found) - {"read"}) > 3, "the files are damaged"


@pytest.mark.parametrize("content", [
    b"",
    b"\x00" * 8,
    b"\xff" * 8,
    (2**63).to_bytes(8, "little") + b"{}",
    b"[" * 10**6,
    b"{" + b'"a":{' * 10**5,
    b'{"a": ' + b"9" * 10**6 + b"}",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b'{"\\ud800": "\\udfff"}',
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"PK\x05\x06" + b"\x00" * 18,
    b"\x80\x04\x95" + b"\xff" * 8,
    b"cos\nsystem\n(S'true'\ntR.",
    b"&a [*a, *a]",
    b"a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]",
    b"!!python/object/apply:os.system ['true']",
    b"\n" * 10**5,
], ids=range(19))  # fmt: skip
@pytest.mark.parametrize("name", READERS)
def test_files_that_are_something_else(attempt, name, content):
    (found,) = attempt(name, [content])
    assert found not in ("crash", "hang")


def test_a_crash_and_a_hang_are_seen(tmp_path, monkeypatch):
    """The judge itself: what it must not let pass."""

    def reader(read):
        return READERS["safetensors"]._replace(read=read)

    def hang(folder):
        while True:
            pass

    def refuse(folder):
        raise ValueError("not in this project's form")

    monkeypatch.setattr(fuzz, "HANG", 0.2)
    with fuzz.alarm():
        assert fuzz.attempt(reader(hang), tmp_path, b"") == "hang"
    assert fuzz.attempt(reader(refuse), tmp_path, b"") == "crash"
    assert fuzz.attempt(reader(lambda folder: {}["x"]), tmp_path, b"") == "crash"
    assert fuzz.attempt(reader(lambda folder: None), tmp_path, b"") == "read"
