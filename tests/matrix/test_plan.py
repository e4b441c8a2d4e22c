"""Which models a plan has, and what their hashes depend on."""

import collections
import dataclasses

import pytest

from benchmarks.matrix import plan
from benchmarks.trained import TUNERS
from dmsec_jax import tuning

PRESETS = sorted(path.stem for path in plan.FOLDER.glob("*.yaml"))
GRID = plan.Grid(
    sets=("openmoji",), seeds=2, n0=(3,), steps=(20,), tuners=("full", "lora"), treatments=("clean", "advdm")
)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_trainable_models_and_each_once(preset):
    cells = plan.cells(plan.read(preset))
    assert len(set(cells)) == len(cells) > 0
    for cell in cells:
        recipe = tuning.read(None, cell.overrides())
        assert cell.steps % recipe.chunk_steps == 0
        assert tuning.tuner_of(recipe) == cell.tuner
        assert (recipe.bayes is not None) == ("bayes" in cell.objective)


def test_small_covers_what_the_issue_asks_for():
    cells = plan.cells(plan.read("small"))
    count = {name: len({getattr(cell, name) for cell in cells}) for name in plan.IDENTITY}
    least = {"tuner": 3, "objective": 2, "treatment": 4, "set": 3, "seed": 5}
    assert all(count[name] >= number for name, number in least.items()), count
    assert len(cells) == 360


def test_seeds_come_one_after_the_other_so_that_a_run_cut_short_is_whole():
    seeds = [cell.seed for cell in plan.cells(plan.read("small"))]
    assert seeds == sorted(seeds)


def test_tuners_learn_at_the_rates_of_the_other_benchmarks():
    for tuner, overrides in TUNERS.items():
        assert tuning.read(None, overrides).tune.learning_rate == plan.RATES[tuner]


def test_what_does_not_apply_is_zero():
    for cell in plan.cells(plan.Plan(grids=(GRID,))):
        assert (cell.rank > 0) == (cell.tuner == "lora")
        assert (cell.budget > 0) == (cell.treatment != "clean")
        assert (cell.sigma0 > 0) == (cell.objective == "bayes")
        assert (cell.prior_weight > 0) == (cell.objective == "prior")


def test_a_model_in_two_grids_is_one_model():
    more = dataclasses.replace(GRID, seeds=3)
    assert len(plan.cells(plan.Plan(grids=(GRID, more)))) == len(plan.cells(plan.Plan(grids=(more,))))


def test_knobs_are_drawn_apart_and_the_same_every_time():
    draws = plan.Draws(sets=("openmoji", "other"), count=300)
    cells = plan.cells(plan.Plan(draws=(draws,)))
    assert cells == plan.cells(plan.Plan(draws=(draws,)))
    assert len(cells) == 600
    share = collections.Counter((cell.rank, cell.n0) for cell in cells)
    assert min(share.values()) > 30, "all combinations of two knobs, about as often"
    longer = plan.cells(plan.Plan(draws=(dataclasses.replace(draws, count=400),)))
    assert set(cells) < set(longer), "more models do not change the first"


def test_digests_depend_on_everything_and_on_no_order():
    assert plan.digest({"a": 1, "b": 2}) == plan.digest({"b": 2, "a": 1})
    assert plan.digest({"a": 1}) != plan.digest({"a": 2})


@pytest.mark.parametrize(("override", "message"), [
    ("grids=[{sets: [openmoji], seeds: 1, n0: [3], steps: [20], tuners: [lore]}]", "tuner must be one of full, lora, oft"),
    ("grids=[{sets: [openmoji], seeds: 1, n0: [3], steps: [20], treatments: [glaze]}]", "treatment must be one of"),
    ("grids=[{sets: [openmoji], seeds: 1, n0: [3], steps: [25]}]", "steps and early must be multiples of 10"),
    ("effort.evaluation=3", "did you mean 'evaluations'"),
])  # fmt: skip
def test_errors_name_the_cure(override, message):
    with pytest.raises(ValueError, match=message):
        plan.read("tiny", (override,))
