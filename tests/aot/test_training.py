"""Training steps compiled for TPUs: weights are gathered, gradients are summed, and nothing else is exchanged."""

import pytest

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("topology", "axes"), [("v5e-4", "fsdp=4"), ("v5e-16", "data=4,fsdp=4")])
def test_cut_weights_are_gathered_and_gradients_summed(judged, topology, axes):
    # only weights of `spread.SMALL` entries are cut here: TPUs pass smaller ones round in a ring of permutations while they multiply them
    talk, share = judged("DreamBooth", topology, axes, temporaries=60)
    assert {"all-gather"} < talk.keys()
    assert 1 / 4 < share < 2 / 3, "half of this network's weights and moments lie on one device in four"


@pytest.mark.long
@pytest.mark.parametrize(("topology", "axes"), [("v5e-4", "fsdp=4"), ("v5e-16", "data=4,fsdp=4")])
def test_a_posterior_over_cut_weights_is_gathered_and_summed_like_them(judged, topology, axes):
    talk, _ = judged("Bayesian", topology, axes, temporaries=80)
    assert {"all-gather"} < talk.keys()


@pytest.mark.long
def test_low_rank_factors_are_summed_in_as_many_exchanges_whatever_the_devices(judged):
    counts = []
    for topology, axes in (("v5e-4", "data=4"), ("v5e-16", "data=16")):
        talk, share = judged("LoRA", topology, axes, temporaries=60)
        assert share == 1, "small factors lie on every device"
        counts.append({kind: part["count"] for kind, part in talk.items()})
    assert counts[0] == counts[1]
    assert counts[0].keys() <= {"all-reduce"}


def test_data_sets_of_a_posterior_over_skeletons_meet_in_its_gradient(judged):
    talk, _ = judged("SPOT posterior", "v5e-4", "data=4", temporaries=60)
    assert "all-reduce" in talk
