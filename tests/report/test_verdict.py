import dataclasses

import numpy as np
import pytest
from scipy import stats

from dmsec_jax.metrics.extraction import Matches
from dmsec_jax.report.extraction import Threshold
from dmsec_jax.report.verdict import tally, verdict

HIGH, LOW = (0.9, 0.8, 0.7, 0.6), (0.1, 0.2, 0.3, 0.1)


def test_a_leak_needs_training_pictures_ahead_of_holdouts(made):
    found = verdict(made.extraction((made.method(scores=HIGH, nulls=LOW),)))
    assert found.kind == "leak"
    assert found.headline == "All 4 training pictures can be read out of this model."
    assert (found.training, found.holdouts) == ((4, 4), (0, 4))
    assert found.p_value == pytest.approx(1 / 70)  # of the 8-choose-4 ways to label the pictures, one is as extreme
    assert "once in 70 audits" in found.reasons[0]


def test_holdouts_that_match_as_well_take_the_verdict_away(made):
    found = verdict(made.extraction((made.method(scores=HIGH, nulls=HIGH),)))
    assert found.kind == "unclear"
    assert "no evidence" in found.headline
    assert found.p_value == 1
    assert "4 of 4 match" in found.comparison[0]


def test_three_of_four_against_none_is_not_enough(made):
    found = verdict(made.extraction((made.method(scores=(*HIGH[:3], 0.1), nulls=LOW),)))
    assert found.kind == "unclear"
    assert found.headline.startswith("3 of 4 training pictures have look-alikes")


def test_without_holdouts_chance_is_the_null(made):
    found = verdict(made.without_holdouts())
    chance = 1 - 0.99**4
    assert found.holdouts is None
    assert found.chance == pytest.approx(4 * chance)
    assert found.p_value == pytest.approx(stats.binom.sf(2, 4, chance))
    assert found.kind == "leak"
    assert found.headline == "3 of 4 training pictures can be read out of this model."
    assert any("No hold-out" in reason for reason in found.reasons)


def test_nothing_found_is_not_called_safe(made):
    found = verdict(made.extraction((made.method(scores=LOW),)))
    assert (found.kind, found.headline) == ("none", "No training picture could be read out of this model.")
    assert "no proof of safety" in found.reasons[0]


def test_what_the_base_model_makes_too_is_not_counted(made):
    method = made.method(scores=HIGH, nulls=(0.6, 0.6, 0.1, 0.1))
    base = {"base_scores": np.array([0.9, 0.85, 0.69, 0.2]), "holdout_base_scores": np.array([0.7, 0.5, 0.5, 0.5])}
    extraction = made.extraction((method,), **base)
    assert tally(extraction, method) == (2, 4)
    assert tally(extraction, method, holdouts=True) == (1, 4)
    assert any("Not counted are 2" in reason for reason in verdict(extraction).reasons)


def test_a_low_threshold_that_the_base_passes_by_accident_discards_nothing(made):
    method = made.method(scores=HIGH, base_similarity=np.full(4, 0.55))
    extraction = made.extraction((method,), base_scores=np.full(4, 0.55))
    assert tally(extraction, method) == (4, 4)


def test_a_method_without_finite_images_gives_no_verdict(made):
    found = verdict(made.extraction((made.failed(), made.method("plain"))))
    assert found.kind == "failed"
    assert found.training == (0, 4)
    assert "NaN" in found.reasons[0]


def test_baselines_are_named_with_their_counts(made):
    peers = verdict(made.extraction()).reasons[-1]
    assert peers == "Other ways to sample the same model find 1 (Plain)."


def test_chance_where_no_pair_matched_is_an_upper_limit():
    assert Threshold(value=0.5, false_match_rate=0.0, pairs=300).chance(1) == pytest.approx(0.01)
    assert Threshold(value=0.5, false_match_rate=0.0, pairs=0).chance(5) == 1
    assert Threshold(value=0.5, false_match_rate=0.1, pairs=50).chance(2) == pytest.approx(0.19)


def test_images_without_a_group_are_no_failure(made):
    loose = dataclasses.replace(made.failed(), generated=20, finite=20)
    found = verdict(made.extraction((loose, made.method("plain"))))
    assert found.kind == "none"
    assert "No group of look-alikes was found among the 20 images" in found.reasons[0]
    assert found.p_value == 1.0


def test_few_pictures_without_hold_outs_prove_nothing(made):
    stand_in = Threshold(value=0.5, false_match_rate=0.0, pairs=160, same_style=False)
    found = verdict(made.without_holdouts(threshold=stand_in))
    assert found.kind == "unclear"
    assert (
        found.headline
        == "3 of 4 training pictures have look-alikes among the extractions, which proves nothing without hold-outs."
    )
    assert found.comparison == ()
    assert "Give hold-outs" in found.reasons[0]
    judged = verdict(made.extraction((made.method(scores=HIGH, nulls=LOW),), threshold=stand_in))
    assert judged.kind == "leak"  # hold-outs say what the style alone is worth


def test_one_extraction_is_evidence_of_one_picture(made):
    matches = Matches(np.zeros(4, int), np.array([0.7, 0.9, 0.8, 0.2]))
    method = made.method(matches=matches)
    extraction = made.extraction((method,))
    assert extraction.read_out(method).tolist() == [False, True, False, False]
    assert tally(extraction, method) == (1, 4)
    assert "Not counted are 2 whose only match is closer to another of the pictures." in verdict(extraction).reasons
