"""Effects of knobs that were drawn at random, and whether the graph that is learnt agrees with them."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.matrix import causes
from benchmarks.matrix.causes import Effect, agreement, within


def test_within_one_set_it_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    knob, outcome = rng.normal(size=(2, 50))
    outcome = np.exp(outcome + 0.5 * knob)
    rho, p = within(knob, outcome, np.zeros(50, int))
    expected = stats.spearmanr(knob, outcome)
    assert rho == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue)


def test_sets_that_differ_make_no_effect():
    rng, sets = np.random.default_rng(1), np.repeat([0, 1], 100)
    knob, outcome = rng.normal(size=(2, 200)) + 3 * sets
    assert abs(np.corrcoef(knob, outcome)[0, 1]) > 0.5
    assert abs(within(knob, outcome, sets)[0]) < 0.2


def test_a_knob_that_never_turns_has_no_effect():
    assert within(np.ones(10), np.arange(10.0), np.zeros(10, int)) == (0.0, 1.0)


def test_agreement_counts_against_the_interventions():
    effect = lambda holm, adjacent: Effect("rate", "AS", 0.3, holm, holm, adjacent, False, 0.5)
    effects = [effect(0.01, True), effect(0.01, False), effect(0.5, True), effect(0.5, True), effect(0.9, False)]
    found = agreement(effects, lambda one: one.adjacent)
    assert (found.precision, found.recall, found.found, found.true) == (1 / 3, 1 / 2, 3, 2)
    assert agreement(effects, lambda one: one.ancestor)[:2] == (1.0, 0.0)


@pytest.mark.slow
def test_a_planted_cause_is_found_by_graph_and_intervention():
    rng, rows = np.random.default_rng(2), []
    for _ in range(400):
        row = {name: rng.normal() for name in causes.KNOBS}
        row["AS_finextract"] = row["steps"] + row["rate"] + 0.5 * rng.normal()
        row["separation"] = row["AS_finextract"] + 0.5 * rng.normal()
        row["imitation"] = -row["budget"] + 0.5 * rng.normal()
        row["diversity"] = rng.normal()
        rows.append(row | {"set": "one"})
    found = causes.learn(rows)
    told = {(one.knob, one.outcome) for one in found.effects if one.told}
    through = {(knob, outcome) for knob in ("steps", "rate") for outcome in ("AS_finextract", "separation")}
    assert told == through | {("budget", "imitation")}
    linked = {(one.knob, one.outcome) for one in found.effects if one.adjacent}
    assert linked == {("steps", "AS_finextract"), ("rate", "AS_finextract"), ("budget", "imitation")}
    assert agreement(found.effects, causes.VIEWS["ancestor"])[:2] == (1.0, 1.0)
    assert found.knob_links == 0
    assert {row.metric for row in causes.result_rows(found)} == {"effect", "precision", "recall", "false_links"}
