"""What `dmsec protect` and its neighbours refuse before a model is read, and what an earlier run lends to a later one."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dmsec_jax import cli, protection
from dmsec_jax.commands import masks, protect
from dmsec_jax.core import spread
from dmsec_jax.core.files import sha256
from dmsec_jax.data import originals

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
    paths += ["--method", "mist", "--imitation-steps", "25"]
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


@pytest.mark.parametrize(("options", "message"), [
    (["--target", "a.png"], "method must be of sdst, mist, textural, ace with a target, got advdm"),
    (["--holdouts", "."], "holdouts must be left out where nobody imitates"),
    (["--imitated-after", "jpeg"], "imitated_after must be left out where nobody imitates"),
    (["--imitation-recipe", "a.yaml"], "imitation_recipe must be left out where nobody imitates"),
    (["--budget", "0.9"], "budget must be at least 1 level of the largest change, got 0.9"),
    (["--budget", "0", "--norm", "l2"], "budget must be more than 0"),
    (["--imitation-steps", "25", "--imitation-recipe", "zero.yaml"], "chunk_steps must be at least 1, got 0"),
    (["--imitation-steps", "25", "--holdouts", "bad"], "text.png' is no picture"),
])  # fmt: skip
def test_options_that_would_do_nothing_or_fail_late_are_refused_at_once(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.yaml").write_text("chunk_steps: 0\n")
    pictures_in(tmp_path / "bad")
    (tmp_path / "bad" / "text.png").write_text("no picture")
    assert message in refused(capsys, "--images", pictures_in(tmp_path / "mine", "a.png"), *options)


def test_the_imitators_recipe_is_checked_against_the_model_before_anything_is_protected(tiny_pipeline, tmp_path):
    (tmp_path / "wide.yaml").write_text("lora: {rank: 1000}\n")
    images = pictures_in(tmp_path / "mine", "a.png")
    cfg = protect.Config(images=images, imitation_steps=25, imitation_recipe=tmp_path / "wide.yaml")
    with pytest.raises(ValueError, match="rank must be at most"):
        protect.protect(cfg, {images / "a.png": (20, 24, 3)}, tiny_pipeline, Console())


@pytest.fixture
def made(tiny_pipeline, monkeypatch):
    """Protects by a change that tells the number of steps; returns the names of what an earlier run had not left."""

    def run(cfg):
        done = []

        def attack(key, model, jobs, settings, **options):
            done.extend(jobs)
            return [job.pixels ^ np.uint8(settings.steps) for job in jobs]

        monkeypatch.setattr(protection, "protect", attack)
        files = protect._files(cfg.images)
        sizes = {path: masks.shape_of(path) for path in files}
        model = SimpleNamespace(pixels=tiny_pipeline.pixels)
        protect._protect_all(cfg, files, sizes, tiny_pipeline, model, protect.settings_of(cfg), Console(quiet=True))
        return len(done)

    return run


def test_what_was_cut_short_under_other_settings_does_not_pass_for_made(made, tmp_path, monkeypatch):
    cfg = protect.Config(images=pictures_in(tmp_path / "mine", "a.png", "b.png"), out=tmp_path / "out", steps=2)
    assert [made(cfg), made(cfg)] == [2, 0]
    save = originals.save

    def interrupting(path, *args):
        if path.name == "b.png":
            raise KeyboardInterrupt
        save(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(originals, "save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            made(dataclasses.replace(cfg, steps=1))
    assert made(cfg) == 2
    for name in ("a.png", "b.png"):
        before, after = (np.asarray(Image.open(folder / name)) for folder in (cfg.images, cfg.out / "pictures"))
        np.testing.assert_array_equal(after, before ^ 2)


def test_names_are_no_patterns(made, tmp_path):
    names = ("photo[1].png", "a.png", "a.b.png")
    cfg = protect.Config(images=pictures_in(tmp_path / "mine", *names), out=tmp_path / "out", steps=2)
    assert [made(cfg), made(cfg)] == [3, 0]
    (cfg.out / "pictures" / "a.png").unlink()
    assert made(cfg) == 1
    drawn = pictures_in(tmp_path / "masks", *names)
    (drawn / "a.txt").write_text("how they were drawn")
    for name in names:
        assert masks.shape_of(cfg.images / name, drawn) == (20, 24, 3)


def test_a_model_that_learns_the_pictures_binds_each_to_all(tiny_pipeline, tmp_path):
    images = pictures_in(tmp_path / "mine", "a.png", "b.png")

    def origins(surrogate):
        cfg = protect.Config(images=images, surrogate=surrogate)
        return [protect._origin(cfg, tiny_pipeline, sorted(images.iterdir())[:count]) for count in (1, 2)]

    assert origins("none")[0] == origins("none")[1]
    for surrogate in ("fsmg", "aspl"):
        assert origins(surrogate)[0] != origins(surrogate)[1]


def test_processes_meet_between_writing_and_reading(tiny_pipeline, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def judged(*args):
        raise Stop

    order = []
    monkeypatch.setattr(protection, "model_of", lambda *args: None)
    monkeypatch.setattr(protect, "_protect_all", lambda *args: order.append("written"))
    monkeypatch.setattr(spread, "meet", lambda: order.append("met"))
    monkeypatch.setattr(protect, "_judged", judged)
    with pytest.raises(Stop):
        protect.protect(protect.Config(images=tmp_path), {tmp_path / "a.png": (20, 24, 3)}, tiny_pipeline, Console())
    assert order == ["written", "met"]


def test_the_inputs_of_a_result_are_all_that_it_rests_on(tmp_path):
    images, others = (pictures_in(tmp_path / name, "a.png") for name in ("mine", "others"))
    given = {"mask": images / "a.png", "target": others / "a.png", "holdouts": others}
    found = protect._inputs(protect.Config(images=images, **given), [images / "a.png"])
    mine, other = sha256(images / "a.png"), sha256(others / "a.png")
    assert found == {"mask": mine, "target": other, "picture a.png": mine, "hold-out a.png": other}
