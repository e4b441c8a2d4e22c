"""PyTorch files written by hand, honest and hostile: the first are read, the others cost an error and nothing else."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsec_jax.checkpoints import torch_archive

WEIGHT = np.arange(6, dtype="<f4").reshape(2, 3)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(key="0", count=6, kind="FloatStorage"):
    return group(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(size=(2, 3), stride=(3, 1), offset=0, **where):
    numbers = (group(*map(number, size)), group(*map(number, stride)))
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + group(storage(**where), number(offset), *numbers, b"\x89", hooks)
        + b"R"
    )


def module(**attributes):
    items = b"".join(text(key) + value for key, value in attributes.items())
    return name("__torch__.net", "Net") + b")\x81}(" + items + b"ub"


def program(body):
    return b"\x80\x02" + body + b"."


def archive(path, body, storages=None, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/data.pkl", program(body))
        for key, value in ({"0": WEIGHT} if storages is None else storages).items():
            file.writestr(f"net/data/{key}", value.tobytes(), compression)
        for key, value in entries.items():
            file.writestr(f"net/{key.replace('__', '/').replace('_', '.')}", value)
    return path


def legacy(path, body, storages=None):
    system = b"}(" + text("little_endian") + b"\x88u"
    storages = {"0": WEIGHT} if storages is None else storages
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    parts = [program(b) for b in (pickle.dumps(torch_archive.LEGACY_MAGIC, 2)[2:-1], number(1001), system, body, keys)]
    data = b"".join(len(v.ravel()).to_bytes(8, "little") + v.tobytes() for v in storages.values())
    path.write_bytes(b"".join(parts) + data)
    return path


@pytest.mark.parametrize("write", [archive, legacy])
def test_names_views_and_values(tmp_path, write):
    body = module(
        conv=module(weight=tensor(), turned=tensor((3, 2), (1, 3)), tail=tensor((2,), (1,), 4)), training=b"\x88"
    )
    found = torch_archive.read(write(tmp_path / "net.pt", body))
    assert found.keys() == {"conv.weight", "conv.turned", "conv.tail"}
    np.testing.assert_array_equal(found["conv.weight"], WEIGHT)
    np.testing.assert_array_equal(found["conv.turned"], WEIGHT.T)
    np.testing.assert_array_equal(found["conv.tail"], [4, 5])
    assert not found["conv.weight"].flags.writeable


@pytest.mark.parametrize(("kind", "dtype"), [(k, d) for k, d in torch_archive.STORAGES.items() if d.itemsize in (2, 4)])
def test_every_dtype_keeps_its_bits(tmp_path, kind, dtype):
    values = np.array([1, 0, 2, 3, 5, 7]).astype(dtype)
    found = torch_archive.read(archive(tmp_path / "net.pt", module(w=tensor(kind=kind)), {"0": values}))
    assert found["w"].dtype == dtype
    assert found["w"].tobytes() == values.tobytes()


def test_a_state_dict_and_constants(tmp_path):
    ordered = name("collections", "OrderedDict") + b")R(" + text("a.weight") + tensor() + b"u"
    constants = program(tensor((6,), (1,)) + b"\x85")
    entries = {"constants_pkl": constants, "constants__0": WEIGHT.tobytes(), "byteorder": b"little"}
    found = torch_archive.read(archive(tmp_path / "net.pt", ordered, **entries))
    assert found.keys() == {"a.weight", "constants.0"}
    np.testing.assert_array_equal(found["constants.0"], WEIGHT.ravel())


def notes():
    """What Lightning leaves in the files of Stable Diffusion 1.x: its classes as keys, NumPy's numbers, tensors of its own."""
    kind = name("numpy", "dtype") + text("f8") + b"\x89\x88\x87R(" + number(3) + text("<") + b"NNN" + number(-1) * 2
    value = name("_codecs", "encode") + text("abcdefgh") + text("latin1") + b"\x86R"
    score = name("numpy.core.multiarray", "scalar") + kind + number(0) + b"tb" + value + b"\x86R"
    callback = name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    held = name("pytorch_lightning.utilities.parsing", "AttributeDict") + b")\x81" + text("lr") + number(1) + b"s"
    inner = b"}(" + text("best") + score + text("kth_value") + tensor((), (), key="1", count=1) + b"u"
    return text("callbacks") + b"}" + callback + inner + b"s" + text("hyper_parameters") + held


@pytest.mark.parametrize("write", [archive, legacy])
def test_notes_of_lightning_are_passed_over(tmp_path, write):
    body = b"}(" + text("state_dict") + b"}" + text("a") + tensor() + b"s" + notes() + b"u"
    found = torch_archive.read(write(tmp_path / "net.ckpt", body, {"0": WEIGHT, "1": WEIGHT[:1, :1]}))
    assert found.keys() == {"state_dict.a"}
    np.testing.assert_array_equal(found["state_dict.a"], WEIGHT)


def test_a_long_list_of_entries_is_not_read(tmp_path, monkeypatch):
    path = archive(tmp_path / "net.pt", module(w=tensor()))
    monkeypatch.setattr(torch_archive, "MAX_DIRECTORY", 100)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ValueError, match="list of entries takes 100 bytes, got 1"):
        torch_archive.read(path)


def test_empty_and_scalar_tensors(tmp_path):
    found = torch_archive.read(archive(tmp_path / "net.pt", module(none=tensor((0, 3), (3, 1)), one=tensor((), (), 2))))
    assert found["none"].shape == (0, 3)
    assert found["one"] == 2


BOMB = b"]" + b"q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(30))
TUPLES = b"N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
HOSTILE = {
    "code": (name("posix", "system") + text("true") + b"\x85R", "a call of posix.system"),
    "builtins": (name("builtins", "eval") + text("1") + b"\x85R", "a call of builtins.eval"),
    "numpy": (name("numpy", "load") + text("x") + b"\x85R", "a call of numpy.load"),
    "keys of one hash": (b"}(\x8a\x09" + (2**64).to_bytes(9, "little") + b"Nu", "text or numbers as keys"),
    "one storage many times": (
        module(w=b"](" + tensor() + b"q\xfa" + b"h\xfa" * 2000 + b"e"),
        "together take at most 4 times the file, got 48024 bytes",
    ),
    "key of numpy": (b"}" + name("numpy", "dtype") + b")R" + b"Ns", "text or numbers as keys"),
    "a class that is changed": (name("pytorch_lightning.core", "Net") + b"}b", "TypeError"),
    "a number that is called": (name("numpy", "dtype") + b")R)R", "TypeError"),
    "torch": (name("torch", "load") + text("x") + b"\x85R", "a call of torch.load"),
    "call of a module": (name("__torch__", "Net") + b"}\x85R", "TypeError"),
    "shared nesting": (BOMB, "objects"),
    "nested key": (b"}" + TUPLES + b"Ns", "text or numbers as keys"),
    "nested storage": (TUPLES + b"Q", "unpack|type, key and size"),
    "claimed bytes": (b"\x96" + struct.pack("<Q", 2**40), "KeyError"),
    "far memo": (b"Nr" + struct.pack("<I", 2**32 - 1) + b"0", "KeyError"),
    "deep": (b"]" * 100 + b"a" * 99, "deep"),
    "outside": (module(w=tensor(offset=1)), "inside their storages"),
    "huge stride": (module(w=tensor(stride=(2**30, 1))), "inside their storages"),
    "repeated": (module(w=tensor((1000, 1000), (0, 0))), "inside their storages"),
    "negative": (module(w=tensor(stride=(-3, 1))), "offset, size and strides"),
    "not a storage": (
        name("torch._utils", "_rebuild_tensor_v2") + group(b"N", *[number(0)] * 5) + b"R",
        "offset, size",
    ),
    "rank": (module(w=tensor((1,) * 9, (1,) * 9)), "offset, size and strides"),
    "other count": (module(w=tensor(count=5, size=(5,), stride=(1,))), "20 bytes in storage 0|another one of 6"),
    "absent": (module(w=tensor(key="7")), "KeyError|storages that it lists"),
    "two of a name": (
        b"}(" + text("a.b") + tensor() + text("a") + b"}(" + text("b") + tensor() + b"uu",
        "one name each",
    ),
    "no object": (b"", "IndexError|pop"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("write", [archive, legacy])
def test_hostile_descriptions_cost_an_error(tmp_path, write, case):
    body, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message) as caught:
        torch_archive.read(write(tmp_path / "net.pt", body))
    assert "net.pt must be" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_storages_cannot_exceed_the_file(tmp_path):
    path = archive(tmp_path / "net.pt", module(a=tensor(), b=tensor(key="1")), {"0": WEIGHT, "1": WEIGHT})
    with zipfile.ZipFile(path) as file:  # as if entries overlapped, which newer Pythons refuse by themselves
        assert torch_archive._read_zip(file, 48).keys() == {"a", "b"}
        with pytest.raises(torch_archive._Refused, match="smaller file"):
            torch_archive._read_zip(file, 47)


@pytest.mark.parametrize(("change", "message"), [
    ({"compression": zipfile.ZIP_DEFLATED}, "compression 8"),
    ({"byteorder": b"big"}, "little-endian"),
    ({"sub__data_pkl": b"N."}, None),
])  # fmt: skip
def test_unusual_archives(tmp_path, change, message):
    path = archive(tmp_path / "net.pt", module(w=tensor()), **change)
    if message is None:
        assert torch_archive.read(path).keys() == {"w"}
    else:
        with pytest.raises(ValueError, match=message):
            torch_archive.read(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps([1, 2]), b"\x00" * 1000])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.pt must be"):
        torch_archive.read(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_archive.read(tmp_path / "absent.pt")


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    body = module(conv=module(weight=tensor()))
    return [write(folder / write.__name__, body).read_bytes() for write in (archive, legacy)], folder / "damaged.pt"


@given(st.data())
def test_damaged_files_give_tensors_or_a_value_error(honest, data):
    contents, path = honest
    content = bytearray(data.draw(st.sampled_from(contents)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = torch_archive.read(path)
    except ValueError as error:
        assert "damaged.pt must be" in str(error)  # noqa: PT017
    else:
        assert all(isinstance(value, np.ndarray) for value in found.values())
