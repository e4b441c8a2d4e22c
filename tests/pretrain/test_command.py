"""`dmsec pretrain` with trainings that do nothing: what an interrupted run may go on from, and what is refused."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmsec_jax.checkpoints import diffusers
from dmsec_jax.commands import pretrain
from dmsec_jax.pretrain import autoencoder, card, corpus, stages


def icon(style="noto", name="red apple"):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = (200, 0, 0, 255)
    return corpus.Icon(style, name, "food-fruit", "1f34e", rgba, False)


@pytest.fixture
def trained(monkeypatch):
    """The stages that were trained, in order; nothing is downloaded, trained, or written but the intermediate files."""
    done = []

    def of(stage, params):
        return lambda *args: done.append(stage) or params

    monkeypatch.setattr(corpus, "install", lambda folder: folder)
    monkeypatch.setattr(corpus, "read_icons", lambda modules: [icon(), icon("twemoji", "red pear")])
    monkeypatch.setattr(stages, "train_autoencoder", of("autoencoder", {"conv": {"kernel": np.ones(2, np.float32)}}))
    monkeypatch.setattr(stages, "train_denoiser", of("denoiser", {"unet": {}, "text_encoder": {}}))
    monkeypatch.setattr(diffusers, "write_model", lambda *args, **options: None)
    monkeypatch.setattr(card, "write", lambda *args: None)
    return done


@pytest.fixture
def run(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vocab_size: 600\nautoencoder:\n  num_steps: 4\n")
    return lambda **options: pretrain.run(
        pretrain.Config(recipe=recipe, work=tmp_path / "work", out=tmp_path / "out", **options)
    )


def test_a_finished_autoencoder_is_used_again_for_the_same_recipe_and_pictures_alone(trained, run, tmp_path):
    assert run() == 0
    assert run(set=("denoiser.num_steps=3",)) == 0
    assert trained == ["autoencoder", "denoiser", "denoiser"]
    with pytest.raises(ValueError, match="of this run, got another origin.autoencoder.num_steps;"):
        run(set=("autoencoder.num_steps=7",))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "photos" / "one.png")
    with pytest.raises(ValueError, match="got another origin.photos; choose another --work"):
        run(photos=tmp_path / "photos")


def test_a_snapshot_trains_nothing(trained, run):
    with pytest.raises(ValueError, match="no finished autoencoder; train first"):
        run(snapshot=True)
    assert trained == []
    assert run() == 0
    with pytest.raises(ValueError, match="a folder with a checkpoint"):
        run(snapshot=True)
    assert trained == ["autoencoder", "denoiser"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"set": ("chunk_steps=0",)}, "chunk_steps must be at least 1"),
        ({"set": ("save_every=0",)}, "save_every must be above 0"),
        ({"what": "skeleton", "set": ("chunk_steps=0",)}, "chunk_steps must be at least 1"),
        ({"photos": "empty"}, "a folder of pictures, got none"),
        ({"cutouts": "nowhere"}, "a folder of pictures, got none"),
        ({"photos": "filled", "start": Path("model")}, "photos, cutouts must be left out with a model to start from"),
    ],
)
def test_what_cannot_work_is_refused_first(trained, run, tmp_path, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "filled").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "filled" / "one.png")
    if options.get("what") == "skeleton":
        (tmp_path / "recipe.yaml").write_text("")
    folders = {name: tmp_path / options[name] for name in ("photos", "cutouts") if name in options}
    with pytest.raises(ValueError, match=said):
        run(**options | folders)
    assert trained == []


def test_the_card_names_what_was_given_and_nothing_else():
    icons = [icon(), icon("fluent", "red pear")]
    text = card.data(icons, card.Origin(command=""))
    assert "Noto Emoji" in text
    assert "2 icons of 1 concepts" in text
    for word in ("Twemoji", "CC-BY-4.0", "photograph", "cut-out", "went on"):
        assert word not in text
    text = card.data([icon("twemoji")], card.Origin(command="", photos=3, start=None))
    assert "all other icons of these styles, and 3 photographs." in text
    assert "CC-BY-4.0" in text
    assert "cut-out" not in text
    assert "went on from the model of SHA-256 `abc`" in card.data(icons, card.Origin(command="", start="abc"))


def test_checkpoints_of_another_recipe_are_not_continued(monkeypatch, tmp_path):
    def counted(key, state, pictures, cfg, *, model, num_steps):
        return state._replace(step=state.step + num_steps), jnp.zeros(num_steps)

    monkeypatch.setattr(autoencoder, "init", lambda *args: autoencoder.State({}, (), {"a": jnp.ones(1)}, jnp.int32(0)))
    monkeypatch.setattr(autoencoder, "run", counted)
    monkeypatch.setattr(autoencoder, "standardise", lambda params, mean, std: params)
    monkeypatch.setattr(stages, "moments", lambda *args: (np.zeros((1, 2)), np.zeros((1, 2))))
    recipe = stages.Recipe(chunk_steps=2, save_every=2, autoencoder=autoencoder.Config(num_steps=4))
    chunks = []

    def train(origin):
        pictures = np.zeros((1, 64, 64, 3), np.uint8)
        return stages.train_autoencoder(recipe, [icon()], pictures, tmp_path, lambda *at: chunks.append(at[1]), origin)

    train({"seed": 0})
    train({"seed": 0})
    assert chunks == [2, 4]
    with pytest.raises(ValueError, match="another origin.seed; choose another output folder"):
        train({"seed": 1})
