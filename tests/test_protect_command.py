"""`dmsec protect`: all kinds of files in one folder, budgets in what was saved, interruption, refusals."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmsec_jax import cli, imitation, protection
from dmsec_jax.commands import protect

pytestmark = pytest.mark.slow  # compiles the gradient through both networks

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rgb = RNG.integers(0, 256, (20, 24, 3), np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(rgb).save(folder / "colour.png")
    Image.fromarray(rgb[..., 0]).save(folder / "grey.tif")
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=tags)
    clear = Image.fromarray(rgb)
    clear.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255]]), 240, axis=0).reshape(20, 24)))
    clear.save(folder / "clear.png")
    (folder / "readme.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def options(tiny_folder):
    return {"model": tiny_folder, "prompt": "a red dog", "steps": 2, "batch_size": 1, "purifiers": ("jpeg",)}


@pytest.fixture(scope="module")
def whole(pictures, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert protect.run(protect.Config(images=pictures, out=out, **options)) == 0
    return out


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_mixed_folder_is_protected_within_the_budget(pictures, whole):
    made = sorted(path.name for path in (whole / "pictures").iterdir())
    assert made == ["clear.png", "colour.png", "grey.tif", "turned.png"]
    for name in ("colour.png", "grey.tif"):
        difference = np.abs(read(whole / "pictures" / name) - read(pictures / name))
        assert 1 <= difference.max() <= 8
    before, after = read(pictures / "clear.png"), read(whole / "pictures" / "clear.png")
    np.testing.assert_array_equal(after[..., 3], before[..., 3])
    assert (after[before[..., 3] == 0] == before[before[..., 3] == 0]).all()
    assert (after != before).any()
    assert Image.open(whole / "pictures" / "turned.png").size == (20, 24)


def test_the_result_says_what_was_measured(whole):
    result = json.loads((whole / "result.json").read_text())
    rise = [row for row in result["rows"] if row["metric"] == "loss_rise"]
    assert [row["case"]["purifier"] for row in rise] == ["none", "jpeg"]
    assert all(row["n"] == 4 and row["low"] <= row["value"] <= row["high"] for row in rise)
    assert set(result["details"]["losses"]["none"]) == {"clean", "protected", "noise"}
    assert any("turned upright" in note for note in result["notes"])
    page = (whole / "report.html").read_text()
    assert "grey.tif" in page
    assert "beyond noise" in page


def test_an_interrupted_run_goes_on_where_it_stopped(pictures, whole, options, tmp_path, monkeypatch):
    calls, real = [], protection.protect

    def interrupting(key, model, jobs, settings, **more):
        calls.append(settings.method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(key, model, jobs, settings, **more)

    cfg = protect.Config(images=pictures, out=tmp_path, **options)
    monkeypatch.setattr(protection, "protect", interrupting)
    with pytest.raises(KeyboardInterrupt):
        protect.run(cfg)
    assert len(json.loads((tmp_path / "progress.json").read_text())["pictures"]) == 2
    calls[:] = ["resumed"] * 10
    assert protect.run(cfg) == 0
    assert calls[10:].count("advdm") == 2
    for path in (whole / "pictures").iterdir():
        assert (tmp_path / "pictures" / path.name).read_bytes() == path.read_bytes()
    calls[:] = ["changed"] * 10
    assert protect.run(protect.Config(images=pictures, out=tmp_path, **{**options, "steps": 1})) == 0
    assert calls[10:].count("advdm") == 4  # other settings: nothing is kept


def test_masks_protect_only_there(pictures, options, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (one / "colour.png").write_bytes((pictures / "colour.png").read_bytes())
    mask = np.zeros((20, 24), np.uint8)
    mask[:, :10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cfg = protect.Config(images=one, out=tmp_path / "out", mask=tmp_path / "mask.png", **options)
    assert protect.run(cfg) == 0
    changed = read(tmp_path / "out" / "pictures" / "colour.png") != read(one / "colour.png")
    assert changed[:, :10].any()
    assert not changed[:, 10:].any()


def test_imitators_are_trained_once_and_compared(pictures, whole, options, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    more = {"imitation_steps": 25, "imitated_after": ("blur",), "holdouts": pictures}
    cfg = protect.Config(images=pictures, out=tmp_path / "out", **options, **more)
    assert protect.run(cfg) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    likeness = result["details"]["likeness"]
    assert list(likeness) == ["clean", "noise", "protected", "protected, then blur"]
    assert likeness["clean"] != likeness["protected"]
    assert {row["case"]["purifier"] for row in result["rows"] if row["metric"] == "imitation"} == {"none", "blur"}
    monkeypatch.setattr(imitation, "imitate", None)  # everything is there
    assert protect.run(cfg) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["details"]["likeness"] == likeness


@pytest.mark.parametrize("surrogate", ["fsmg", pytest.param("aspl", marks=pytest.mark.long)])
def test_a_model_that_learns_can_be_attacked_and_the_report_says_so(pictures, whole, options, tmp_path, surrogate):
    cfg = protect.Config(images=pictures, out=tmp_path, surrogate=surrogate, surrogate_steps=2, **options)
    assert protect.run(cfg) == 0
    before, plain, found = (
        read(folder / "colour.png") for folder in (pictures, whole / "pictures", tmp_path / "pictures")
    )
    assert 1 <= np.abs(found - before).max() <= 8
    assert (found != plain).any()
    assert any(surrogate in note for note in json.loads((tmp_path / "result.json").read_text())["notes"])


def test_bad_input_is_named_before_anything_is_written(tiny_folder, pictures, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    frames = [Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(2)]
    frames[0].save(bad / "moves.gif", save_all=True, append_images=frames[1:])
    start = ["protect", "--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--images"]
    assert cli.main([*start, str(bad)]) == 1
    assert "moves.gif' holds 2 pictures" in capsys.readouterr().err
    assert cli.main([*start, str(pictures), "--budget", "0"]) == 1
    assert "budget must be" in capsys.readouterr().err
    assert cli.main([*start, str(pictures), "--purifiers", "magic"]) == 1
    assert "'magic'" in capsys.readouterr().err
    assert cli.main([*start, str(pictures), "--imitation-steps", "30"]) == 1
    assert "imitation_steps must be a multiple of 25" in capsys.readouterr().err
    assert cli.main([*start, str(pictures), "--surrogate", "aspl", "--method", "noise"]) == 1
    assert "surrogate must be none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
