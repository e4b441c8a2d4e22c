import json
import os
import resource

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis.extra import numpy as npst

from dmsec_jax.checkpoints.io import read_metadata, read_tensors, write_tensors


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


kinds = st.sampled_from([np.dtype(k) for k in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", ml_dtypes.bfloat16)])
arrays = kinds.flatmap(
    lambda kind: npst.arrays(np.uint8, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)).map(
        lambda a: a.astype(kind)
    )
)


@given(tensors=st.dictionaries(st.text(max_size=8).filter(lambda s: s != "__metadata__"), arrays, max_size=4))
def test_round_trip_and_agreement_with_the_safetensors_library(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("io") / "x.safetensors"
    write_tensors(path, tensors, metadata={"a": "é"})
    theirs, ours = safetensors.numpy.load_file(path), read_tensors(path)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for got in (ours[name], theirs[name]):
            assert got.dtype == tensor.dtype
            np.testing.assert_array_equal(got, tensor, strict=True)
    assert read_metadata(path) == {"a": "é"}
    safetensors.numpy.save_file(tensors, path)
    assert {k: v.tolist() for k, v in read_tensors(path).items()} == {k: v.tolist() for k, v in tensors.items()}


@given(data=st.binary(max_size=200), cut=st.integers(0, 120), patch=st.binary(max_size=4))
def test_damaged_files_are_valueerrors_or_whole(tmp_path_factory, data, cut, patch):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_tensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16)})
    good = path.read_bytes()
    for bad in (data, good[:cut], good[:cut] + patch + good[cut + len(patch) :], good + data):
        path.write_bytes(bad)
        try:
            tensors = read_tensors(path)
        except ValueError as error:
            assert "must be" in str(error)  # noqa: PT017
        else:
            assert sum(t.nbytes for t in tensors.values()) <= len(bad)


def test_reading_maps_the_file_and_does_not_load_it(tmp_path):
    path = raw(tmp_path / "x.safetensors", {"big": entry([1 << 33], 0, 1 << 35)})
    os.truncate(path, path.stat().st_size + (1 << 35))  # sparse: 32 GiB that nobody has
    big = read_tensors(path)["big"]
    assert big.shape == (1 << 33,)
    assert big[-1] == 0
    assert not big.flags.writeable


HOSTILE = {
    "truncated": ({"a": entry([2, 3], 0, 24)}, b"\0" * 23, "24 bytes within the 23 bytes"),
    "shape lies": ({"a": entry([1 << 40], 0, 24)}, b"\0" * 24, "4398046511104 bytes within"),
    "overflowing shape": ({"a": entry([1 << 62, 1 << 62], 0, 0)}, b"", "bytes within"),
    "offsets beyond": ({"a": entry([6], 1 << 50, (1 << 50) + 24)}, b"\0" * 24, "within the 24 bytes"),
    "offsets reversed": ({"a": entry([6], 24, 0)}, b"\0" * 24, "bytes within"),
    "negative offset": ({"a": entry([6], -24, 0)}, b"\0" * 24, "natural"),
    "negative shape": ({"a": entry([-6], 0, 24)}, b"\0" * 24, "natural"),
    "boolean shape": ({"a": entry([True], 0, 4)}, b"\0" * 4, "natural"),
    "fractional shape": ({"a": entry([1.0], 0, 4)}, b"\0" * 4, "natural"),
    "too many axes": ({"a": entry([1] * 9, 0, 4)}, b"\0" * 4, "natural"),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 4, "gaps and overlaps"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, "gaps and overlaps"),
    "hidden tail": ({"a": entry([1], 0, 4)}, b"\0" * 9, "4 bytes of data long, got 9"),
    "unknown dtype": ({"a": entry([1], 0, 1, "F8_E4M3")}, b"\0", "dtype of tensor 'a'"),
    "dtype no string": ({"a": entry([1], 0, 4, ["F32"])}, b"\0" * 4, "dtype of tensor 'a'"),
    "entry no object": ({"a": 7}, b"", "described by"),
    "entry too long": ({"a": entry([], 0, 4) | {"x": 1}}, b"\0" * 4, "described by"),
    "no object": ([1], b"", "a JSON object, got list"),
    "no JSON": (b'{"a": ', b"", "JSON header"),
    "no UTF-8": (b'{"\xff": 1}', b"", "JSON header"),
    "nested": (b"[" * 100_000, b"", "JSON header"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "JSON header"),
    "given twice": (b'{"a": 1, "a": 1}', b"", "occurs twice"),
    "metadata no text": ({"__metadata__": {"a": 1}}, b"", "made of strings"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_header_that_lies_is_refused_by_name(tmp_path, case):
    header, data, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message):
        read_tensors(raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x08\0\0\0\0\0\0\0{}", "10 bytes that claims a header of 8"),
        (b"\xff" * 64, "claims a header of 18446744073709551615"),
        ((20 << 20).to_bytes(8, "little") + b" " * (21 << 20), "claims a header of 20971520"),
        (b"PK\x03\x04" + b"\0" * 60, "pickle under another name"),
        (b"\x80\x02}q\x00(X" + b"\0" * 60, "pickle under another name"),
        (b"version 1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pkl"])
def test_pickle_is_refused_unopened(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"a pickle .* can run code; ask its author for a \.safetensors"):
        read_tensors(tmp_path / f"not_even_there{suffix}")


def test_missing_file_folder_and_pipe(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(ValueError, match="must be a regular file"):
            read_tensors(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_writing_casts_floats_only(tmp_path, dtype):
    tensors = {"a": np.linspace(-3, 3, 6).reshape(2, 3), "ids": np.arange(3)}
    write_tensors(tmp_path / "x.safetensors", tensors, dtype=dtype)
    read = read_tensors(tmp_path / "x.safetensors")
    assert read["a"].dtype == np.dtype(dtype)
    assert read["ids"].dtype == np.int64
    np.testing.assert_array_equal(read["a"], tensors["a"].astype(dtype))


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path / "x.safetensors", {"t": array.T})
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.safetensors")["t"], array.T)


def test_overflow_of_float16_is_refused_and_leaves_nothing(tmp_path):
    tensors = {"a": np.ones(3, np.float32), "loud": np.float32([1, 7e4, np.inf])}
    with pytest.raises(ValueError, match=r"tensor loud .* got 7e\+04; .*bfloat16"):
        write_tensors(tmp_path / "x.safetensors", tensors, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    write_tensors(tmp_path / "x.safetensors", tensors, dtype="bfloat16")


def test_disk_that_fills_up_half_way_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*free some space"):
            write_tensors(tmp_path / "x", {"a": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_unsupported_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        write_tensors(tmp_path / "x", {"a": np.ones(2)}, dtype="int8")
    with pytest.raises(ValueError, match="tensor a must be one of"):
        write_tensors(tmp_path / "x", {"a": np.ones(2, complex)})
