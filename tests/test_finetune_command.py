"""`dmsec finetune`: what it refuses before it starts, and runs that are interrupted, repeated or changed."""

import json
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dmsec_jax import cli, monitoring, pipeline, tuning
from dmsec_jax.commands import finetune
from dmsec_jax.core import trees
from dmsec_jax.data.images import save_png

QUICK = ["chunk_steps=2", "save_every=2", "patterns=[conv_out]"]  # training one layer compiles fast


@pytest.fixture
def tune(tiny_folder, pictures):
    """Runs the command with further options; returns its exit status."""

    def run(out, *options, steps=6, sets=(), prompt="a red dog"):
        needed = ["--model", str(tiny_folder), "--images", str(pictures), "--prompt", prompt, "--out", str(out)]
        more = ["--sample-every", "2", *options, "--set", f"tune.num_steps={steps}", *QUICK, *sets]
        return cli.main(["finetune", *needed, *more])

    return run


def account(out):
    """What must not depend on when and in how many pieces a run was made."""
    found = json.loads((out / "result.json").read_text())
    return {name: found[name] for name in ("rows", "details", "inputs", "seeds", "pictures", "notes")}


@pytest.fixture
def whole(tune, tmp_path):
    assert tune(tmp_path / "whole") == 0
    return tmp_path / "whole"


@pytest.mark.slow  # compiles training and sampling
def test_interrupted_resumed_and_repeated_runs_give_the_same_account(tune, whole, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    look = monitoring.look

    def interrupting(*args, **options):  # while the first sheet is drawn
        signal.raise_signal(signal.SIGINT)
        return look(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(monitoring, "look", interrupting)
        assert tune(tmp_path / "cut") == 130
    signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "cut" / "result.json").exists()
    assert "after 2 steps" in (tmp_path / "cut" / "report.html").read_text()
    for _ in range(2):  # the rest; then a finished run once more
        assert tune(tmp_path / "cut") == 0
        assert account(tmp_path / "cut") == account(whole)
        assert len(account(whole)["details"]["loss"]) == 6
    sheets = sorted(path.relative_to(whole) for path in whole.rglob("*.png"))
    assert len(sheets) == 6
    assert all((tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes() for name in sheets)


@pytest.mark.slow  # compiles for long
def test_a_posterior_is_trained_resumed_and_exported_as_its_mean(tune, tmp_path):
    """In one piece and in two: the same account, model and deviations; the pictures are drawn by models of the posterior."""
    options = ["--bayes", "[conv_out/kernel]", "--sheets", "posterior"]
    rate = ["bayes.sigma_rate=1e-3", "bayes.kl_weight=0.1"]
    assert tune(tmp_path / "whole", *options, sets=rate) == 0
    assert tune(tmp_path / "cut", *options, sets=rate, steps=4) == 0
    assert tune(tmp_path / "cut", *options, sets=rate) == 0
    assert account(tmp_path / "cut") == account(tmp_path / "whole")
    row = account(tmp_path / "whole")["rows"][0]
    assert (row["method"], row["case"]["bayes"], row["case"]["steps"]) == ("full", "conv_out/kernel", 6)
    for name in ("posterior.safetensors", "model/unet/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    sigma = load_file(tmp_path / "whole" / "posterior.safetensors")
    assert list(sigma) == ["conv_out/kernel"]
    assert 0 < np.abs(sigma["conv_out/kernel"] - 0.01).max() < 0.01  # learned, six steps of Adam away from the start
    sheets = sorted((tmp_path / "whole").rglob("samples/*.png"))
    assert len({path.read_bytes() for path in sheets}) == 3


@pytest.mark.slow  # trains or compiles for long
def test_the_monitor_ends_a_training_that_copies(tune, tmp_path, monkeypatch):
    look = monitoring.look

    def copying(watched, step, *rest):
        return look(watched, step, *rest)._replace(copied_p=0.0 if step >= 4 else 1.0, noise_p=1.0)

    monkeypatch.setattr(monitoring, "look", copying)
    for _ in range(2):  # trained; then asked once more, when there is nothing left to do
        assert tune(tmp_path, "--stop-at", "copying") == 0
        details = account(tmp_path)["details"]
        assert len(details["loss"]) == 4
        assert [(found["step"], found["stage"]) for found in details["stages"]] == [(2, "learning"), (4, "copying")]
        assert details["advice"] == "Samples were copying at step 4: stop at step 2, the most faithful before it."
        assert account(tmp_path)["rows"][0]["case"]["steps"] == 4
    assert tune(tmp_path) == 0
    assert [found["step"] for found in account(tmp_path)["details"]["stages"]] == [2, 4, 6]


@pytest.mark.slow  # trains or compiles for long
def test_a_longer_run_goes_on_and_a_damaged_sheet_is_left_out(tune, whole):
    (whole / "samples" / "step-000004.png").write_bytes(b"no picture")
    first = account(whole)["details"]["loss"]
    assert tune(whole, steps=8, sets=["save_every=4"]) == 0
    assert account(whole)["details"]["loss"][:6] == first
    assert len(account(whole)["details"]["loss"]) == 8
    assert [name[-10:-4] for name in account(whole)["pictures"]] == ["000002", "000006", "000008"]


@pytest.mark.slow  # compiles training and sampling
def test_checkpoints_of_another_run_are_refused(tune, whole, tmp_path, capsys):
    before = account(whole)

    def refused(*options, **more):
        assert tune(whole, *options, **more) == 1
        return capsys.readouterr().err.strip()

    error = refused("--seed", "1", sets=["tune.learning_rate=1e-3"])
    assert "got another origin.recipe.tune.learning_rate, origin.seed; choose another output folder, or remove" in error
    assert error.startswith("dmsec: checkpoint 6 of ")
    assert "got another origin.prompts;" in refused(prompt="a blue cat")
    assert "got another origin.prior;" in refused("--prior-prompt", "a cat", "--prior-count", "4")
    assert "got another origin.text_encoder" in refused("--text-encoder")
    more = tmp_path / "others"
    save_png(more / "0.png", np.zeros((16, 16, 3), np.float32))
    assert "got another origin.pictures, origin.prompts;" in refused("--images", str(more))
    assert account(whole) == before


@pytest.mark.parametrize(("options", "message"), [
    (["--seed", "-1"], "seed must be in 0..2**32 - 1, got -1"),
    (["--seed", "99999999999999999999"], "seed must be in"),
    (["--sample-every", "-3"], "sample_every must be at least 0, got -3"),
    (["--prior-prompt", "a dog", "--prior-count", "0"], "prior_count must be at least 1, got 0"),
    (["--prior-images", "nowhere"], "prior_prompt must be given with prior_images"),
    (["--prior-prompt", "dog " * 20], "prompt must be at most 16 tokens"),
    (["--prompt", "dog " * 20], "shorten it (in Python, truncate=True cuts it)"),
    (["--recipe", "nowhere.yaml"], "nowhere.yaml must be a YAML file, got nothing; correct the path"),
    (["--recipe", "."], "must be a YAML file, got a folder; correct the path"),
    (["--set", "tune.learning_rate=-1"], "learning_rate must be positive and finite, got -1.0"),
    (["--set", "tune.batch_size=0"], "batch_size must be at least 1, got 0"),
    (["--set", "tune.ema_decay=1"], "ema_decay must be in (0, 1), got 1"),
    (["--set", "tune.num_steps=0"], "num_steps must be at least 1, got 0"),
    (["--set", "tune.t_max=2000"], "t_min, t_max must be a range within [0, 1000], got [0, 2000)"),
    (["--set", "chunk_steps=0"], "chunk_steps must be at least 1, got 0"),
    (["--set", "patterns=[nothing]"], "nothing"),
    (["--set", "lora.rank=0"], "rank must be at least 1, got 0"),
    (["--set", "lora.rank=1000"], "rank must be at most"),
    (["--set", "lora.targets=all"], "targets must be one of"),
    (["--set", "lora.rank=1", "oft.blocks=1"], "lora, oft must be one of them at most, got both"),
    (["--bayes", "everything"], "selection must be one of norm"),
    (["--bayes", "lora-up"], "found in some parameter path"),
    (["--bayes", "norm", "--set", "bayes.sigma0=-1"], "sigma0 must be at least 0 and finite, got -1"),
    (["--stop-at", "copying", "--sample-every", "0"], "stop_at must be never without samples, got copying"),
    (["--sample-every", "10"], "sample_every must be a multiple of chunk_steps=25, or 0, got 10; round it, or give --set chunk_steps=10"),
    (["--stop-at", "copying", "--set", "tune.num_steps=50"], "stop_at must be never in 50 steps without a sample, got copying"),
    (["--sheets", "posterior"], "sheets must be mean without a posterior"),
    (["--sheets", "posterior", "--bayes", "norm", "--set", "bayes.noise=dropout"], "sheets must be mean without a post"),
    (["--bayes", "norm", "--set", "bayes.noise=activations", "lora.rank=1", "bayes.selection=lora-up"], "unless all weights of the UNet"),
    (["--bayes", "norm", "--set", "bayes.dropout=1"], "dropout must be in [0, 1), got 1"),
    (["--features", "clip"], "weights must be given for the features clip"),
    (["--clip", "nowhere"], "nowhere/config.json"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_done(
    tiny_folder, pictures, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(finetune.pipeline, "load", None)
    out = tmp_path / "out"
    needed = ["--model", str(tiny_folder), "--images", str(pictures), "--out", str(out)]
    prompt = [] if "--prompt" in options else ["--prompt", "a red dog"]
    assert cli.main(["finetune", *needed, *prompt, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dmsec: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_an_out_that_cannot_be_used_is_refused_at_once(tune, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "mine.txt").write_text("mine")
    for out, message in (
        ("file", "file must be a folder, got a file; choose another --out"),
        ("file/inside", "file must be a folder, got a file; choose another --out"),
        ("other", "model must be a model folder or nothing, got something else; choose another --out"),
    ):
        assert tune(tmp_path / out) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_pictures_are_not_read_from_where_samples_are_written(tune, tmp_path, capsys):
    save_png(tmp_path / "pictures" / "0.png", np.zeros((16, 16, 3), np.float32))
    assert tune(tmp_path, "--images", str(tmp_path / "pictures")) == 1
    assert "images must be outside of what is written" in capsys.readouterr().err


def test_the_base_model_is_not_overwritten(tune, tiny_folder, capsys):
    assert tiny_folder.name == "model"
    assert tune(tiny_folder.parent) == 1
    assert "model must be another than the one that is written" in capsys.readouterr().err


@pytest.mark.slow  # compiles for long
def test_lora_is_written_for_other_programs_beside_the_merged_model(tune, tiny_folder, tmp_path):
    chosen = ["patterns=[]", "lora.rank=2", "lora.alpha=6", "lora.targets=[conv_out/kernel, attn1/to_q/kernel]"]
    assert tune(tmp_path, "--sample-every", "0", steps=2, sets=chosen) == 0
    base, merged = pipeline.load(tiny_folder), pipeline.load(tmp_path / "model")
    for name in ("lora.safetensors", "lora-kohya.safetensors"):
        tuned = pipeline.load_tuned(tmp_path / name, base)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned.params, merged.params)
    assert not np.array_equal(tuned.params["unet"]["conv_out"]["kernel"], base.params["unet"]["conv_out"]["kernel"])


@pytest.mark.slow  # compiles for long
def test_oft_and_one_file_are_written_for_other_programs_beside_the_model(tune, tiny_folder, tmp_path):
    chosen = ["patterns=[]", "oft.blocks=2", "oft.targets=[attn1/to_q/kernel]", "oft.radius=0.001"]
    chosen += ["tune.learning_rate=0.01"]  # so that the radius matters
    assert tune(tmp_path, "--sample-every", "0", "--single-file", steps=2, sets=chosen) == 0
    base, merged = pipeline.load(tiny_folder), pipeline.load(tmp_path / "model")
    turned = pipeline.load_tuned(tmp_path / "oft-unet", base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), turned.params, merged.params)
    whole = pipeline.load_tuned(tmp_path / "model.safetensors", base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole.params, merged.params)
    moved = trees.flatten(jax.tree.map(lambda a, b: np.abs(a - b).max(), merged.params["unet"], base.params["unet"]))
    assert all((change > 0) == path.endswith("attn1/to_q/kernel") for path, change in moved.items())


def test_what_another_run_left_in_the_same_folder_goes_and_nothing_else(tune, tmp_path, monkeypatch):
    done = tuning.Tuned({}, {"a": np.zeros(2)}, None, SimpleNamespace(loss=np.ones(2)), 1.0, 0, 2, True)
    monkeypatch.setattr(tuning, "tune", lambda *args, **options: done)
    monkeypatch.setattr(pipeline, "save", lambda *args: None)
    monkeypatch.setattr(finetune, "write_lora", lambda path, *rest: path.write_bytes(b"lora"))
    own = [tmp_path / name for name in ("model.safetensors", "posterior.safetensors", "samples/mine.png")]
    sheet = tmp_path / "samples" / "step-000050.png"
    for path in (*own, sheet):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    factors = [tmp_path / name for name in finetune.LORA_FILES.values()]
    assert tune(tmp_path, "--sample-every", "0", steps=2, sets=["patterns=[]", "lora.rank=2"]) == 0
    assert all(path.is_file() for path in factors)
    assert not sheet.exists()
    assert tune(tmp_path, "--sample-every", "0", steps=2) == 0
    assert not any(path.exists() for path in factors)
    assert all(path.read_bytes() == b"mine" for path in own)


@pytest.mark.slow  # compiles for long
def test_notes_are_one_line_each(tune, tmp_path, capsys):
    save_png(tmp_path / "in" / "a\n\x1b[31mb.png", np.zeros((8, 8, 3), np.float32))
    assert tune(tmp_path / "out", "--images", str(tmp_path / "in"), "--sample-every", "0", steps=2) == 0
    (note,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("note: ")]
    assert note.startswith("note: a \ufffd[31mb.png has a square of 8 pixels")


def test_ctrl_c_leaves_without_waiting_for_the_device(monkeypatch):
    def interrupted(cfg):
        raise KeyboardInterrupt

    at_exit = []
    monkeypatch.setattr(finetune, "run", interrupted)
    monkeypatch.setattr(cli.atexit, "register", at_exit.append)
    assert cli.main(["finetune", "--images", "x", "--prompt", "y"]) == 130
    assert at_exit == [cli._leave]


def test_overflow_is_one_line(monkeypatch, capsys):
    def overflowing(cfg):
        raise OverflowError("too large")

    monkeypatch.setattr(finetune, "run", overflowing)
    assert cli.main(["finetune", "--images", "x", "--prompt", "y"]) == 1
    assert capsys.readouterr().err == "dmsec: too large\n"
