"""The command line: verbs, errors, and a whole small run of fine-tuning, extraction and demo on a tiny model."""

import json

import numpy as np
import pytest

from dmsec_jax import cli, tuning
from dmsec_jax.commands import demo
from dmsec_jax.core.files import sha256
from dmsec_jax.data.images import save_png

SMALL = ["--settings.evaluations", "8", "--settings.num-steps", "2", "--settings.batch-size", "4"]
STEPS = ["--set", "tune.num_steps=4", "chunk_steps=2", "save_every=2"]
LAST = [*STEPS, "patterns=[conv_out]"]  # training one layer compiles fast
SAME = "The two models are the same: nothing was learnt, so nothing can be found."


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four training pictures: every test has as many, so that all share what is compiled."""
    return folder_of(tmp_path_factory.mktemp("pictures"), 4)


def folder_of(folder, count):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        save_png(folder / f"{i}.png", rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32))
    return folder


def test_help_and_unknown_verb(capsys):
    assert cli.main([]) == 0
    assert cli.main(["steal"]) == 1
    assert "no verb 'steal'" in capsys.readouterr().err


def test_ctrl_c_and_missing_packages_during_the_imports_are_no_tracebacks(monkeypatch, capsys):
    def importing(error):
        def load(name):
            raise error

        return load

    monkeypatch.setattr(cli.atexit, "register", lambda leave: None)
    monkeypatch.setattr(cli.importlib, "import_module", importing(KeyboardInterrupt()))
    assert cli.main(["info"]) == 130
    monkeypatch.setattr(cli.importlib, "import_module", importing(ImportError("needs pyarrow")))
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "dmsec: needs pyarrow\n"


def test_bad_input_is_one_line_and_status_one(tiny_folder, tmp_path, capsys):
    status = cli.main(["finetune", "--model", str(tiny_folder), "--images", str(tmp_path), "--prompt", "a red dog"])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("dmsec: ")
    assert "a folder with at least one picture" in error


@pytest.mark.slow  # compiles for long
def test_finetune_then_extract(tiny_folder, pictures, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    common = ["--images", str(pictures), "--prompt", "a red dog"]
    model = ["--model", str(tiny_folder)]
    assert cli.main(["finetune", *common, *model, "--out", str(tuned), "--sample-every", "2", *LAST]) == 0
    result = json.loads((tuned / "result.json").read_text())
    assert np.isfinite(result["rows"][0]["value"])
    sheets = [f"step-00000{step}.{kind}" for step in (2, 4) for kind in ("json", "png")]
    assert sorted(path.name for path in (tuned / "samples").iterdir()) == sheets
    extract = ["extract", *common, "--base", str(tiny_folder), "--model", str(tuned / "model"), *SMALL]
    extract += ["--settings.methods", "finextract", "plain", "carlini"]  # the demo runs all
    assert cli.main([*extract, "--out", str(tmp_path / "audit")]) == 0
    rows = json.loads((tmp_path / "audit" / "result.json").read_text())["rows"]
    found = {row["method"] for row in rows if row["metric"] == "AS"}
    assert found == {"finextract", "plain", "carlini"}
    assert "<html" in (tmp_path / "audit" / "report.html").read_text()


@pytest.mark.parametrize(
    ("count", "options", "split"),
    [(1, {}, (1, 0)), (3, {}, (2, 1)), (6, {}, (4, 2)), (18, {}, (10, 8)), (6, {"number": 5}, (5, 1))],
)
def test_demo_keeps_hold_outs_back(tmp_path, count, options, split):
    pictures, holdout = demo._pictures(demo.Config(images=folder_of(tmp_path, count), **options), 16)
    assert (len(pictures), len(holdout or ())) == split


def test_demo_trains_on_all_pictures_where_hold_outs_are_given(tmp_path):
    for name, count in {"mine": 6, "others": 2}.items():
        folder_of(tmp_path / name, count)
    pictures, holdout = demo._pictures(demo.Config(images=tmp_path / "mine", holdout=tmp_path / "others"), 16)
    assert (len(pictures), len(holdout)) == (6, 2)


def test_demo_refuses_an_out_that_it_cannot_use_before_it_loads_anything(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.pipeline, "load", None)
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "mine.txt").write_text("mine")
    (tmp_path / "stages").write_text("mine")
    for out, message in {
        tiny_folder.parent: "model must be another than the one that is written",
        tmp_path / "other": "model must be a model folder or nothing, got something else",
        tmp_path: "stages must be a folder, got a file; choose another --out",
    }.items():
        assert cli.main(["demo", "--model", str(tiny_folder), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow  # all layers are trained
def test_demo_on_own_pictures_splits_off_hold_outs(tiny_folder, tmp_path_factory, tmp_path):
    pictures = folder_of(tmp_path_factory.mktemp("more"), 6)
    model = ["--model", str(tiny_folder), "--images", str(pictures), "--prompt", "a red dog", "--number", "4"]
    fast = [
        "--looks",
        "2",
        "--membership.num-steps",
        "2",
        "--membership.num-draws",
        "2",
        "--membership.tile",
        "2",
        "--protected",
        "2",
    ]
    assert cli.main(["demo", *model, "--out", str(tmp_path), *STEPS, *SMALL, *fast]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    found = {row["method"] for row in result["rows"] if row["metric"] == "AS"}
    assert found == {"finextract", "cfg", "lora-scale", "plain", "carlini"}
    holdouts = [row for row in result["rows"] if row["case"]["pictures"] == "holdout"]
    assert {row["n"] for row in holdouts if row["value"] is not None} == {2}
    assert all(row["case"]["n0"] == 4 for row in result["rows"])
    assert (tmp_path / "model" / "model_index.json").is_file()
    model = sha256(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "authentication"):
        assert json.loads((folder / "result.json").read_text())["inputs"]["model"] == model
    assert any("protection/report.html" in note for note in result["notes"])
    protection = json.loads((tmp_path / "protection" / "result.json").read_text())
    rises = [row for row in protection["rows"] if row["metric"] == "loss_rise"]
    assert [row["case"]["purifier"] for row in rises] == ["none", *demo.PURIFIERS]
    assert all(row["n"] == 2 and np.isfinite(row["value"]) for row in rises)
    assert (tmp_path / "protection" / "report.html").is_file()
    assert [one["step"] for one in result["details"]["stages"]] == [0, 2, 4]
    stages = json.loads((tmp_path / "stages" / "result.json").read_text())["details"]["stages"]
    assert stages["plain"] == result["details"]["stages"]
    assert [one["step"] for one in stages["bayes"]] == [0, 2, 4]
    assert stages["bayes"][0] == stages["plain"][0]
    assert stages["bayes"][-1] != stages["plain"][-1]
    assert "With a posterior over the weights (norm)" in (tmp_path / "stages" / "report.html").read_text()


@pytest.mark.slow  # compiles for long
def test_finetune_with_generated_class_pictures(tiny_folder, pictures, tmp_path, monkeypatch):
    seen, tune = [], tuning.tune

    def spied(*args, prior, **options):
        seen.append(prior)
        return tune(*args, prior=prior, **options)

    monkeypatch.setattr(tuning, "tune", spied)
    common = ["--model", str(tiny_folder), "--images", str(pictures), "--prompt", "a red dog", "--sample-every", "0"]
    prior = ["--prior-prompt", "a dog", "--prior-count", "4"]
    assert cli.main(["finetune", *common, *prior, "--out", str(tmp_path), *LAST]) == 0
    ((drawn, prompts),) = seen
    assert drawn.shape == (4, 16, 16, 3)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    assert prompts == ["a dog"] * 4
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["config"]["prior_prompt"] == "a dog"
    assert np.isfinite(result["rows"][0]["value"])
    assert (tmp_path / "model" / "model_index.json").is_file()


def audited(tiny_folder, pictures, out, *options):
    """Extraction of the model from itself: whatever it finds, the choices made must arrive."""
    models = ["--base", str(tiny_folder), "--model", str(tiny_folder)]
    common = ["--images", str(pictures), "--prompt", "a red dog", "--out", str(out)]
    status = cli.main(["extract", *models, *common, *SMALL, *options])
    return json.loads((out / "result.json").read_text()) if status == 0 else None


@pytest.mark.slow  # trains or compiles for long
def test_a_sweep_reports_every_guidance(tiny_folder, pictures, tmp_path):
    methods = ["--settings.methods", "finextract", "plain"]
    sweep = ["--settings.w", "1.5", "2", "--settings.k", "0", "-0.02"]
    found = audited(tiny_folder, pictures, tmp_path / "sweep", *methods, *sweep)
    assert found["method"] == "finextract-w1p5-k0"
    labels = {name: method["label"] for name, method in found["details"]["methods"].items()}
    assert labels == {
        "finextract-w1p5-k0": "FineXtract, w = 1.5, k = 0",
        "finextract-w1p5-km0p02": "FineXtract, w = 1.5, k = -0.02",
        "finextract-w2-k0": "FineXtract, w = 2, k = 0",
        "finextract-w2-km0p02": "FineXtract, w = 2, k = -0.02",
        "plain": "plain sampling",
    }
    same, note = found["notes"]
    assert same == SAME
    assert "tried at 4 guidances; the verdict rests on FineXtract, w = 1.5, k = 0 alone" in note
    assert "choose the weight on pictures that the verdict does not use" in note
    alone = audited(tiny_folder, pictures, tmp_path / "alone", *methods, "--settings.w", "2", "--settings.k", "-0.02")
    assert list(alone["details"]["methods"]) == ["finextract", "plain"]
    assert alone["notes"] == [SAME]
    scores = lambda result, name: [row["score"] for row in result["details"]["methods"][name]["training"]]
    np.testing.assert_allclose(scores(alone, "finextract"), scores(found, "finextract-w2-km0p02"), atol=1e-4)


@pytest.mark.slow  # compiles two samplers
def test_samplers_and_clusterings_are_chosen(tiny_folder, pictures, tmp_path):
    options = ["--settings.methods", "plain", "--settings.clustering"]
    drawn = [*options, "agglomerative", "--number", "0"]
    public = [*options, "public", "--settings.sampler", "public"]
    clean = audited(tiny_folder, pictures, tmp_path / "clean", *drawn)
    other = audited(tiny_folder, pictures, tmp_path / "public", *public)
    sheets = [(tmp_path / name / "pictures" / "plain-samples.png").read_bytes() for name in ("clean", "public")]
    assert sheets[0] != sheets[1]
    assert clean["notes"] == [SAME]
    assert "Every clique counts" in other["notes"][1]
    assert len(other["details"]["methods"]["plain"]["sizes"]) >= 4


@pytest.mark.parametrize(("options", "message"), [
    (["--settings.methods", "magic"], "method must be one of finextract"),
    (["--settings.methods", "plain", "plain"], "methods, w and k must be different ones, got plain, plain"),
    (["--settings.w", "2", "2.0"], "methods, w and k must be different ones, got finextract-w2-k0, finextract-w2-k0"),
    (["--settings.w"], "methods, w and k must be at least one of each, got none"),
    (["--settings.w", "1.5", "0"], "w must be above 0 (1 is the fine-tuned model itself), got [0.0]"),
    (["--settings.cfg-weight", "nan"], "cfg_weight must be above 0"),
    (["--settings.k", "inf"], "k must be a finite number, got [inf]"),
    (["--settings.evaluations", "1"], "evaluations must be at least 2, got 1"),
    (["--settings.num-steps", "0"], "num_steps must be at least 1, got 0"),
    (["--settings.batch-size", "0"], "batch_size must be at least 1, got 0"),
    (["--settings.false-match-rate", "nan"], "false_match_rate must be a share between 0 and 1, got nan"),
    (["--settings.seed", "99999999999999999999"], "seed must be from 0 to 4294967295"),
    (["--settings.sampler", "euler"], "sampler must be one of ddim, public, got 'euler'"),
    (["--settings.clustering", "k-means"], "clustering must be one of cliques, agglomerative, public, got 'k-means'"),
    (["--settings.features", "vgg"], "features must be one of hog, sscd, clip, dino, dino-last-4, got 'vgg'"),
    (["--settings.features", "clip"], "weights must be given for the features clip"),
    (["--settings.features", "sscd"], "sscd_file must be given for the features sscd"),
    (["--settings.sscd-file", "net.pt"], "sscd_file must be given only for the features sscd, got net.pt"),
    (["--settings.features", "sscd", "--settings.sscd-file", "/dev/null"], "/dev/null must be"),
    (["--settings.features", "sscd", "--settings.sscd-file", "absent.pt"], "absent.pt"),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["extract", "demo"])
def test_settings_are_refused_before_anything_is_done(verb, options, message, capsys):
    needed = ["--model", "nowhere", "--images", "nowhere", "--prompt", "a red dog"]
    assert cli.main([verb, *needed, *options]) == 1
    assert message in capsys.readouterr().err


def test_public_clustering_needs_the_number_of_pictures(capsys):
    needed = ["--model", "nowhere", "--images", "nowhere", "--prompt", "a red dog"]
    assert cli.main(["extract", *needed, "--number", "0", "--settings.clustering", "public"]) == 1
    assert "must be told the number of training pictures to be public, got no number" in capsys.readouterr().err


def test_extracting_from_another_architecture_is_refused(tiny_folder, pictures, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    changed = json.loads(file.read_text()) | {"prediction_type": "epsilon", "beta_end": 0.5}
    file.write_text(json.dumps(changed))
    common = ["--images", str(pictures), "--prompt", "a red dog"]
    status = cli.main(["extract", *common, "--base", str(tiny_folder), "--model", str(tmp_path / "other")])
    assert status == 1
    assert "schedule and vocabulary" in capsys.readouterr().err


def test_hold_outs_that_were_trained_on_do_not_count(tiny_folder, pictures, tmp_path, capsys):
    plain = ["--settings.methods", "plain", "--holdout"]
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(pictures.iterdir())[:2]:
        (some / path.name).write_bytes(path.read_bytes())
    save_png(some / "new.png", np.zeros((16, 16, 3), np.float32))
    found = audited(tiny_folder, pictures, tmp_path / "out", *plain, str(some))
    assert any(
        "2 hold-outs are among the pictures in question and were left out: 0.png, 1.png" in note
        for note in found["notes"]
    )
    assert len(found["details"]["methods"]["plain"]["holdouts"]) == 1
    assert [name for name in found["inputs"] if name.startswith("hold-out")] == ["hold-out new.png"]
    common = ["--images", str(pictures), "--prompt", "a red dog", "--base", str(tiny_folder)]
    assert cli.main(["extract", *common, "--model", str(tiny_folder), *SMALL, *plain, str(pictures)]) == 1
    assert "hold-outs must be other pictures than those in question" in capsys.readouterr().err


def test_a_baseline_that_explodes_costs_the_others_nothing(tiny_folder, pictures, tmp_path):
    methods = ["--settings.methods", "plain", "cfg", "--settings.cfg-weight", "1e38"]
    found = audited(tiny_folder, pictures, tmp_path, *methods)
    assert found["details"]["methods"]["cfg"]["finite"] == 0
    assert found["details"]["methods"]["plain"]["finite"] == 8
    assert any("cfg: 4 of 4 pictures were not finite" in note for note in found["notes"])
