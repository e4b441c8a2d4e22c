"""Training steps compiled for TPUs: weights are gathered, gradients are summed, and nothing else is exchanged."""

import pytest

from dmsec_jax.core import spread

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("topology", "axes"), [("v5e-4", "fsdp=4"), ("v5e-16", "data=4,fsdp=4")])
def test_cut_weights_are_gathered_and_gradients_summed(judged, monkeypatch, topology, axes):
    monkeypatch.setattr(spread, "SMALL", 2**10)  # so that the weights of a small network are cut
    talk, share = judged("DreamBooth", topology, axes, temporaries=60)
    assert {"all-gather"} < talk.keys()
    assert 1 / 4 < share < 0.3, "weights and moments are cut, all but the small ones"
