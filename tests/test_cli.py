"""The command line: verbs, errors, and a whole small run of fine-tuning, extraction and demo on a tiny model."""

import json

import numpy as np
import pytest

from dmsec_jax import cli
from dmsec_jax.data.images import save_png

SMALL = ["--settings.evaluations", "8", "--settings.num-steps", "2", "--settings.batch-size", "4"]
STEPS = ["--set", "tune.num_steps=4", "chunk_steps=2", "save_every=2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(5):
        save_png(folder / f"{i}.png", rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32))
    return folder


def test_help_and_unknown_verb(capsys):
    assert cli.main([]) == 0
    assert cli.main(["steal"]) == 1
    assert "no verb 'steal'" in capsys.readouterr().err


def test_bad_input_is_one_line_and_status_one(tiny_folder, tmp_path, capsys):
    status = cli.main(["finetune", "--model", str(tiny_folder), "--images", str(tmp_path), "--prompt", "a red dog"])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("dmsec: ")
    assert "a folder with at least one picture" in error


def test_finetune_then_extract(tiny_folder, pictures, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    common = ["--images", str(pictures), "--prompt", "a red dog"]
    model = ["--model", str(tiny_folder)]
    assert cli.main(["finetune", *common, *model, "--out", str(tuned), "--sample-every", "2", *STEPS]) == 0
    result = json.loads((tuned / "result.json").read_text())
    assert np.isfinite(result["rows"][0]["value"])
    assert sorted(path.name for path in (tuned / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    extract = ["extract", *common, "--base", str(tiny_folder), "--model", str(tuned / "model"), *SMALL]
    assert cli.main([*extract, "--out", str(tmp_path / "audit")]) == 0
    rows = json.loads((tmp_path / "audit" / "result.json").read_text())["rows"]
    found = {row["method"] for row in rows if row["metric"] == "AS"}
    assert found == {"finextract", "cfg", "lora-scale", "plain", "carlini"}
    assert "<html" in (tmp_path / "audit" / "report.html").read_text()


def test_demo_on_own_pictures_splits_off_hold_outs(tiny_folder, pictures, tmp_path):
    model = ["--model", str(tiny_folder), "--images", str(pictures), "--prompt", "a red dog", "--number", "3"]
    assert cli.main(["demo", *model, "--out", str(tmp_path), *STEPS, *SMALL]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    holdouts = [row for row in result["rows"] if row["case"]["pictures"] == "holdout"]
    assert holdouts
    assert all(row["case"]["n0"] == 3 for row in result["rows"])
    assert (tmp_path / "model" / "model_index.json").is_file()


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
