"""`dmsec authenticate` on a tiny model: files, errors, resuming."""

import json
import shutil

import numpy as np
import pytest

from dmsec_jax import authentication, cli
from dmsec_jax.checkpoints.unfinished import Store
from dmsec_jax.data.images import save_png

SMALL = ["--settings.num-draws", "4", "--settings.num-steps", "50", "--settings.tile", "2", "--settings.chunk", "2"]
SMALL += ["--settings.cgi-draws", "1"]
SMALL += ["--settings.batch-size", "2", "--settings.secmi-timestep", "20", "--settings.pfami-timesteps", "100"]
SMALL += ["--settings.gradient-timesteps", "100", "200"]


def folder_of(folder, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        save_png(folder / f"{i}.png", rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    place = tmp_path_factory.mktemp("sets")
    return {"images": folder_of(place / "mine", 3, 0), "non-members": folder_of(place / "others", 3, 1)}


def command(tiny_folder, sets, out, *options):
    models = ["--base", str(tiny_folder), "--model", str(tiny_folder), "--prompt", "a red dog", "--out", str(out)]
    folders = [part for name, folder in sets.items() for part in (f"--{name}", str(folder))]
    return ["authenticate", *models, *folders, *SMALL, *options]


@pytest.mark.slow  # compiles CGI-DM
def test_result_page_and_pictures_are_written(tiny_folder, sets, tmp_path, capsys):
    assert cli.main(command(tiny_folder, sets, tmp_path)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    metrics = {(row["method"], row["metric"]) for row in result["rows"]}
    assert {("loss-difference", "AUC"), ("cgi-dm", "AUC"), ("cgi-dm", "TPR@1%FPR")} <= metrics
    tests = result["details"]["tests"]
    assert list(tests) == ["loss-difference", "cgi-dm", "base-loss"]
    assert [one["score"] for one in tests["loss-difference"]["pictures"]] == [0, 0, 0]  # the models are equal
    assert result["details"]["verdict"]["kind"] in ("none", "differs")
    assert result["notes"] == ["The two models are the same: nothing was learnt, so nothing can be found."]
    assert sorted(result["pictures"]) == ["pictures/non-members.png", "pictures/pictures.png"]
    assert all((tmp_path / name).is_file() for name in result["pictures"])
    assert "<html" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*unfinished*"))
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines() if "report.html" not in line)


def test_without_non_members_nothing_is_concluded(tiny_folder, sets, tmp_path):
    alone = {"images": sets["images"]}
    assert cli.main(command(tiny_folder, alone, tmp_path, "--methods", "loss-difference")) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["details"]["verdict"]["kind"] == "unknown"
    assert "<html" in (tmp_path / "report.html").read_text()
    assert result["rows"] == []
    assert result["details"]["tests"]["loss-difference"]["pictures"][0]["p_value"] is None


@pytest.mark.slow  # compiles CGI-DM once more
def test_a_stopped_recovery_goes_on(tiny_folder, sets, tmp_path, monkeypatch):
    recover, starts = authentication.recover, []

    def spied(*args, resume, on_chunk, **options):
        starts.append(None if resume is None else resume.done.tolist())

        def stopping(state):
            on_chunk(state)
            if len(starts) == 1 and state.done.sum() > 150:
                raise KeyboardInterrupt

        return recover(*args, resume=resume, on_chunk=stopping, **options)

    monkeypatch.setattr(authentication, "recover", spied)
    monkeypatch.setattr("atexit.register", lambda leave: None)
    out = {name: tmp_path / name for name in ("stopped", "whole")}
    only = ["--methods", "cgi-dm"]
    assert cli.main(command(tiny_folder, sets, out["stopped"], *only)) == 130
    assert (out["stopped"] / "cgi-dm.unfinished.npz").is_file()
    assert not (out["stopped"] / "result.json").exists()
    assert cli.main(command(tiny_folder, sets, out["stopped"], *only)) == 0
    assert cli.main(command(tiny_folder, sets, out["whole"], *only)) == 0
    assert starts == [None, [50, 50, 50, 50, 0, 0], None]
    scores = [json.loads((place / "result.json").read_text())["details"]["tests"]["cgi-dm"] for place in out.values()]
    assert scores[0] == scores[1]
    # another seed is another run: what was saved of the first does not count
    assert cli.main(command(tiny_folder, sets, out["whole"], *only, "--seed", "1")) == 0
    assert starts[-1] is None


def test_the_state_of_another_run_or_a_broken_file_is_not_gone_on_with(tmp_path):
    store = Store(tmp_path / "state.npz", ["a"])
    assert store.read() is None
    store.write(done=np.array([25]))
    assert store.read()["done"].tolist() == [25]
    assert Store(store.path, ["b"]).read() is None
    store.path.write_bytes(store.path.read_bytes()[:100])
    assert store.read() is None


def test_pictures_in_both_folders_count_once(tiny_folder, sets, tmp_path, capsys):
    both = folder_of(tmp_path / "both", 2, 5)
    for name in ("0.png", "1.png"):
        (both / f"copy-{name}").write_bytes((sets["images"] / name).read_bytes())
    options = ["--methods", "loss-difference"]
    assert cli.main(command(tiny_folder, {**sets, "non-members": both}, tmp_path / "out", *options)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert any("2 non-members are among the pictures in question" in note for note in result["notes"])
    assert len(result["details"]["tests"]["loss-difference"]["non_members"]) == 2
    same = {**sets, "non-members": sets["images"]}
    assert cli.main(command(tiny_folder, same, tmp_path / "same", *options)) == 1
    assert "non-members must be other pictures than those in question" in capsys.readouterr().err


def test_copies_of_a_file_are_no_further_evidence(tiny_folder, sets, tmp_path):
    copied = {}
    for name, folder in sets.items():
        copied[name] = shutil.copytree(folder, tmp_path / folder.name)
        for i in range(2):
            shutil.copy(folder / "0.png", copied[name] / f"copy-{i}.png")
    options = ["--methods", "loss-difference"]
    assert cli.main(command(tiny_folder, copied, tmp_path / "out", *options)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    test = result["details"]["tests"]["loss-difference"]
    assert [one["picture"] for one in test["pictures"]] == ["0.png", "1.png", "2.png"]
    assert len(test["non_members"]) == 3
    for what in ("pictures", "non-members"):
        assert f"2 {what} are copies of others and were left out: copy-0.png, copy-1.png" in result["notes"]
    assert {row["case"]["n0"] for row in result["rows"]} == {3}


@pytest.mark.parametrize(("options", "message"), [
    (["--methods", "magic"], "methods must be of loss-difference"),
    (["--methods", "base-loss"], "methods must be of loss-difference"),
    (["--methods", "loss", "loss"], "methods must be at least one, each once, got loss loss"),
    (["--methods"], "methods must be at least one, each once, got none"),
    (["--settings.num-draws", "1"], "num_draws must be at least 2, got 1"),
    (["--settings.num-steps", "30"], "num_steps must be from 1 to 25, or a multiple of 25, got 30"),
    (["--settings.alpha", "nan"], "alpha must be above 0, got nan"),
    (["--settings.batch-size", "0"], "batch_size must be at least 1, got 0"),
    (["--seed", "-1"], "seed must be from 0 to 4294967295"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_read(options, message, capsys):
    needed = ["--model", "nowhere", "--images", "nowhere", "--prompt", "a red dog"]
    assert cli.main(["authenticate", *needed, *options]) == 1
    assert message in capsys.readouterr().err
