"""Steps whose rows never meet, compiled for TPUs: devices say nothing to each other while they work, however many there are."""

import pytest

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("topology", ["v5e-4", "v5e-16"])
def test_sampling_of_fifty_steps_is_one_program_without_exchange(judged, topology):
    # 34 MiB when this was written; the logits of one long attention alone would be 16 more
    talk, _ = judged("sampling", topology, f"data={topology.removeprefix('v5e-')}", temporaries=40)
    assert not talk


def test_gradients_of_two_networks_need_no_exchange(judged):
    talk, _ = judged("CGI-DM", "v5e-16", "data=16", temporaries=60)
    assert not talk


@pytest.mark.parametrize("topology", [pytest.param("v5e-4", marks=pytest.mark.long), "v5e-16"])
def test_protection_through_encoder_and_network_needs_no_exchange(judged, topology):
    talk, _ = judged("AdvDM", topology, f"data={topology.removeprefix('v5e-')}", temporaries=60)
    assert not talk


def test_starts_of_a_search_over_graphs_meet_only_in_its_result(program):
    from benchmarks.pod import compiled

    made, found = program("SPOT search", "v5e-16", "data=16")
    assert compiled.collectives(found.as_text()).keys() <= made.plan
    assert not compiled.in_loops(found.as_text())
