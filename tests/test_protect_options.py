"""What `dmsec protect` and its neighbours refuse before a model is read, and what an earlier run lends to a later one."""

import numpy as np
import pytest
from PIL import Image

from dmsec_jax import cli
from dmsec_jax.commands import protect

RNG = np.random.default_rng(0)


def pictures_in(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(RNG.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
    return folder


def refused(capsys, *options):
    """The error of a command that must end before a model is read."""
    assert cli.main(["protect", *map(str, options), "--model", "nowhere"]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("option", ["images", "mask", "target", "holdouts"])
def test_input_is_not_read_from_where_pictures_are_written(tmp_path, capsys, option):
    given = {"images": pictures_in(tmp_path / "mine", "a.png"), option: pictures_in(tmp_path / "art/pictures", "a.png")}
    paths = [part for name, path in given.items() for part in (f"--{name}", path)]
    assert f"{option} must be outside of what is written" in refused(capsys, *paths, "--out", tmp_path / "art")
    (tmp_path / "link").symlink_to(tmp_path / "art/pictures")
    paths = [tmp_path / "link" if part == given[option] else part for part in paths]
    assert f"{option} must be outside of what is written" in refused(capsys, *paths, "--out", tmp_path / "art")


def test_a_picture_that_is_a_link_to_its_own_output_is_refused(tmp_path, capsys):
    pictures_in(tmp_path / "art/pictures", "a.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").symlink_to(tmp_path / "art/pictures/a.png")
    paths = ["--images", tmp_path / "mine", "--out", tmp_path / "art"]
    assert "images must be outside of what is written" in refused(capsys, *paths)


@pytest.mark.parametrize("verb", ["extract", "authenticate", "demo"])
def test_other_verbs_do_not_read_what_they_replace(tmp_path, capsys, verb):
    images = pictures_in(tmp_path / "art/pictures", "a.png")
    options = ["--model", "nowhere", "--prompt", "a", "--images", str(images), "--out", str(tmp_path / "art")]
    assert cli.main([verb, *options]) == 1
    assert "images must be outside of what is written" in capsys.readouterr().err


def test_an_out_that_cannot_be_a_folder_is_refused_at_once(tmp_path, capsys):
    images = pictures_in(tmp_path / "mine", "a.png")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert "file must be a folder, got a file" in refused(capsys, "--images", images, "--out", out)


def test_a_folder_that_holds_the_output_may_be_read(tmp_path):
    protect.check(protect.Config(images=tmp_path, out=tmp_path))
