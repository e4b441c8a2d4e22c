"""Training steps compiled for TPUs: weights are gathered, gradients are summed, and nothing else is exchanged."""

import pytest

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("topology", "axes"), [("v5e-4", "fsdp=4"), ("v5e-16", "data=4,fsdp=4")])
def test_cut_weights_are_gathered_and_gradients_summed(judged, topology, axes):
    # only weights of `spread.SMALL` entries are cut here: TPUs pass smaller ones round in a ring of permutations while they multiply them
    talk, share = judged("DreamBooth", topology, axes, temporaries=60)
    assert {"all-gather"} < talk.keys()
    assert 1 / 4 < share < 2 / 3, "half of this network's weights and moments lie on one device in four"
