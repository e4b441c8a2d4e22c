"""What unfinished work is bound to: the model as it was read, not only its file."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dmsec_jax import imitation, loading, pipeline, tuning
from dmsec_jax.checkpoints import adapter_export
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.checkpoints.unfinished import Store
from dmsec_jax.commands import authenticate, demo, extract, finetune, protect
from dmsec_jax.core.files import sha256
from dmsec_jax.methods import finextract


@pytest.fixture
def adapter(tmp_path):
    """A LoRA in PEFT's layout, whose scale stands in a file of its own."""
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = {"down": np.ones((32, 2), np.float32), "up": np.ones((2, 32), np.float32)}
    adapter_export.write_lora(file, {"unet": {"time_embedding": {"linear_2": factors}}})
    configure(file.parent, 2)
    return file.parent


def configure(folder, alpha):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))


def test_the_origin_of_a_tuned_model_tells_readings_of_one_file_apart(tiny_pipeline, adapter):
    def origin(**options):
        return pipeline.load_tuned(adapter, tiny_pipeline, **options).origin

    first = origin()
    assert first == origin()
    assert origin(strength=0.5) != first
    assert origin(weights="model_ema") != first
    assert origin(allow_partial=True) != first
    assert origin(variant="fp16") != first
    configure(adapter, 4)
    assert origin() != first
    assert origin()["sha256"] == first["sha256"]
    (digest,) = [pipeline.load_tuned(adapter, tiny_pipeline).inputs("model")["model adapter_config.json"]]
    assert digest == sha256(adapter / "adapter_config.json")


def test_the_origin_of_a_model_names_what_it_predicts_and_its_learnt_words(tiny_pipeline, tmp_path):
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[tiny_pipeline.schedule.prediction_type]
    assert loading.predicting(tiny_pipeline, other).origin != tiny_pipeline.origin
    file, origins = tmp_path / "style.safetensors", []
    for value in (0.0, 1.0):
        write_tensors(file, {"emb_params": np.full((1, 8), value, np.float32)})
        words = pipeline.with_words(tiny_pipeline, [file])
        origins.append(words.origin)
        assert words.inputs("base")["base words 1, style.safetensors"] == sha256(file)
    assert origins[0] != origins[1]
    cfg = protect.Config(images=tmp_path)
    assert protect._origin(cfg, words, []) != protect._origin(cfg, tiny_pipeline, [])


def test_imitators_of_a_model_read_otherwise_are_trained_anew(tiny_pipeline, tmp_path, monkeypatch):
    trained = []

    def imitate(key, base, views, prompt, recipe, count):
        trained.append(base)
        return np.random.default_rng(0).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)

    monkeypatch.setattr(imitation, "imitate", imitate)
    views = np.zeros((1, 16, 16, 3), np.float32)
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[tiny_pipeline.schedule.prediction_type]

    def compare(base):
        trained.clear()
        imitation.compare(0, base, {"clean": views}, views, "a", tuning.DEFAULT, 2, folder=tmp_path)
        return len(trained)

    assert [compare(tiny_pipeline), compare(tiny_pipeline)] == [2, 0]
    assert compare(loading.predicting(tiny_pipeline, other)) == 2
    file = tmp_path / "clean.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert compare(loading.predicting(tiny_pipeline, other)) == 1  # cut short: that one alone


def test_extracted_pictures_are_kept_by_their_numbers_not_by_their_batches(tmp_path):
    pictures = finextract.Extraction(np.arange(10.0), np.ones(10, bool), np.arange(10.0))
    for start, stop in ((0, 3), (3, 6), (8, 10)):
        part = {name: array[start:stop] for name, array in pictures._asdict().items()}
        Store(tmp_path / f"unfinished.plain.{start}-{stop}.npz", ["plain"]).write(**part)

    def kept(start, stop, made_from="plain"):
        found = extract._stored(tmp_path, "unfinished.plain", [made_from], range(start, stop))
        return None if found is None else found.images.tolist()

    assert [kept(0, 3), kept(0, 4), kept(1, 6), kept(9, 10)] == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4, 5], [9]]
    assert [kept(4, 8), kept(6, 8), kept(6, 10), kept(0, 3, made_from="another")] == [None] * 4


@pytest.mark.parametrize("command", [extract, authenticate])
def test_verbs_bind_their_unfinished_work_to_both_models_as_they_were_read(
    tiny_folder, adapter, pictures, tmp_path, monkeypatch, command
):
    class Stop(Exception):
        pass

    def seen(subject, *args, inputs, origin, **options):
        raise Stop([inputs, origin])

    monkeypatch.setattr(command, command.__name__.rpartition(".")[2], seen)
    write_tensors(tmp_path / "style.safetensors", {"emb_params": np.ones((1, 8), np.float32)})

    def called(**options):
        folders = {"model": adapter, "base": tiny_folder, "images": pictures, "out": tmp_path / "out"}
        with pytest.raises(Stop) as stopped:
            command.run(command.Config(prompt="a red dog", **folders, **options))
        return stopped.value.args[0]

    inputs, origin = called()
    assert origin == [
        pipeline.load(tiny_folder).origin,
        pipeline.load_tuned(adapter, pipeline.load(tiny_folder)).origin,
    ]
    assert list(inputs) == ["base", "model", "model adapter_config.json"]
    assert called(adapter_strength=0.5)[1] != origin
    assert called(embeddings=(tmp_path / "style.safetensors",))[1] != origin
    assert called(reading=pipeline.Reading(weights="model_ema"))[1] != origin


def test_the_demo_binds_the_recovery_of_pictures_to_the_model_that_it_trained(tiny_pipeline, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def seen(*args, inputs, **options):
        raise Stop(inputs)

    monkeypatch.setattr(authenticate, "authenticate", seen)
    extracted = SimpleNamespace(tuned="tuned", config={}, inputs={"base": "1", "model": "2", "picture a.png": "3"})
    subject = pipeline.Subject(tiny_pipeline, tiny_pipeline.params, "a")
    with pytest.raises(Stop) as stopped:
        demo._authenticate(demo.Config(out=tmp_path), subject, None, None, extracted, {}, None)
    assert stopped.value.args[0] == {"base": "1", "model": "2"}


def test_checkpoints_are_bound_to_the_reading(tiny_folder, tiny_pipeline, pictures):
    cfg = finetune.Config(images=pictures, prompt="a red dog", model=tiny_folder)
    inputs = finetune._inputs(cfg, tuning.DEFAULT)
    read = pipeline.load(tiny_folder, allow_partial=True)
    origins = [finetune._origin(cfg, base, inputs, tuning.DEFAULT) for base in (tiny_pipeline, read)]
    assert origins[0] != origins[1]
    assert origins[0]["base"]["sha256"] == tiny_pipeline.sha256
