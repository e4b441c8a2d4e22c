"""The corpus of nasty files: each is refused in words that fit, at once, and in little memory."""

import re
import time
import tracemalloc

import pytest
from nasty import NASTY

from benchmarks.readers import readers

READERS = readers()
SECONDS, MEMORY = 4.0, 96 * 2**20


@pytest.mark.parametrize("case", NASTY)
def test_it_is_refused(tmp_path, case):
    which, files, message = NASTY[case]
    reader = READERS[which]
    files = files if isinstance(files, dict) else dict(reader.beside) | {reader.name: files}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(ValueError, match=" must be .+, got (?s:.+); ") as caught:
            reader.read(tmp_path)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 1500
    assert seconds < SECONDS
    assert peak < MEMORY


def test_there_are_fifty_of_them():
    assert len(NASTY) >= 50
    assert len({str(files) for _, files, _ in NASTY.values()}) == len(NASTY)
