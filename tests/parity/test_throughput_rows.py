"""Rows of the throughput benchmark at tiny sizes: both sides compute the same. The others are compared whenever they are measured."""

import numpy as np
import pytest

pytestmark = pytest.mark.torch


def largest(case):
    """The largest difference of the baselines that need no compiler."""
    from benchmarks.throughput import cases

    ours = case.named(cases.build(case).run())
    peers = [build() for name, build in case.peers.items() if name != cases.COMPILED]
    return max(error for run in peers for error in cases.differences(case, ours, run()).values())


def test_spots_posterior_objective_and_steps_are_those_of_their_baselines():
    from benchmarks.throughput import discovery

    assert largest(discovery.posterior(10, 2)) < 1e-5
    assert largest(discovery.lagrangian(8, 2)) < 1e-5
    assert largest(discovery.steps(8, 2)) < 2e-3


def test_rows_are_chosen_by_pattern_and_can_be_named_again():
    from benchmarks.throughput import rows

    names = list(rows.chosen((), (1, 8)))
    assert len(names) == len(set(names))
    assert not any("sd15" in name or " " in name for name in names)
    assert {"unet-forward/sd15/1", "unet-forward/sd15/2"} <= set(rows.chosen(("*/sd15/*",), (1,)))
    for name in np.random.default_rng(0).permutation(names)[:5]:
        assert list(rows.chosen((name,), (1, 8))) == [name]
