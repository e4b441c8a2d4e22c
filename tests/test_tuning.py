from pathlib import Path

import jax
import pytest

from dmsec_jax.core.config import from_dict, load
from dmsec_jax.core.trees import flatten
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune.adapters import count
from dmsec_jax.models import presets, unet
from dmsec_jax.tuning import OFT, LoRA, Recipe, adapter_of, check, settings

CONFIGS = Path(__file__).parents[1] / "configs/finetune"


@pytest.fixture(scope="module")
def nano():
    return jax.eval_shape(lambda: unet.init(jax.random.key(0), presets.NANO.unet))


@pytest.mark.parametrize("name", ["full", "lora", "oft", "bayes"])
def test_shipped_recipes_fit_the_embedded_model(nano, name):
    recipe = load(Recipe, CONFIGS / f"{name}.yaml")
    check(recipe, nano, ScheduleConfig())
    trained = count(adapter_of(recipe), nano)
    everything = sum(leaf.size for leaf in flatten(nano).values())
    assert (trained == everything) == (name in ("full", "bayes"))
    assert 0 < trained <= everything
    assert recipe.save_every % recipe.chunk_steps == 0
    assert recipe.tune.num_steps % recipe.chunk_steps == 0  # compiles once


def test_patterns_choose_leaves_and_do_not_mix_with_low_rank(nano):
    chosen = adapter_of(from_dict(Recipe, {"patterns": ["norm"]}))
    trainable = jax.eval_shape(chosen.init, jax.random.key(0), nano)
    assert all("norm" in path for path in flatten(trainable))
    with pytest.raises(ValueError, match="patterns must be empty with LoRA or OFT"):
        adapter_of(Recipe(lora=LoRA(), patterns=("norm",)))


def test_own_target_patterns_come_through_yaml(nano):
    recipe = from_dict(Recipe, {"lora": {"rank": 3, "targets": ["attn1/to_v/kernel"]}})
    trainable = jax.eval_shape(adapter_of(recipe).init, jax.random.key(0), nano)
    assert {path.split("/")[-2] for path in flatten(trainable)} == {"to_v"}


def test_orthogonal_tuning_comes_through_yaml_and_excludes_low_rank(nano):
    recipe = from_dict(Recipe, {"oft": {"blocks": 2, "targets": ["attn1/to_v/kernel"], "cayley": "peft"}})
    trainable = jax.eval_shape(adapter_of(recipe).init, jax.random.key(0), nano)
    assert {tuple(path.split("/")[-2:]) for path in flatten(trainable)} == {("to_v", "generator")}
    with pytest.raises(ValueError, match="lora, oft must be one of them at most"):
        adapter_of(Recipe(lora=LoRA(), oft=OFT()))


def test_a_posterior_stands_beside_the_settings_of_the_training(nano):
    recipe = from_dict(Recipe, {"tune": {"num_steps": 7}, "bayes": {"selection": "norm", "sigma0": 0.5}})
    cfg = settings(recipe)
    assert (cfg.num_steps, cfg.sigma0) == (7, 0.5)
    check(recipe, nano, ScheduleConfig())
    with pytest.raises(ValueError, match="found in some parameter path"):
        check(from_dict(Recipe, {"bayes": {"selection": "oft"}}), nano, ScheduleConfig())
    with pytest.raises(ValueError, match="weight_samples must be at least 1"):
        check(from_dict(Recipe, {"bayes": {"weight_samples": 0}}), nano, ScheduleConfig())
