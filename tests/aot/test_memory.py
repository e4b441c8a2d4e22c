"""Remat policies by the memory of compiled steps: on CPUs the compiler undoes them, so only a program for another device can tell."""

import pytest

pytestmark = pytest.mark.aot


@pytest.fixture
def temporaries(program, monkeypatch):
    """(step, topology, axes, remat) -> bytes of temporaries on one device, with that policy in place of the step's own."""
    from benchmarks.pod import steps

    preset = steps.Setting.preset

    def of(step, topology, axes, remat):
        monkeypatch.setattr(steps.Setting, "preset", lambda setting, _: preset(setting, remat))
        _, found = program(step, topology, axes)
        return found.memory_analysis().temp_size_in_bytes

    return of


@pytest.mark.parametrize(
    ("step", "axes"), [("DreamBooth", "fsdp=4"), pytest.param("AdvDM", "data=4", marks=pytest.mark.long)]
)
def test_blocks_that_are_computed_again_take_less_memory_than_what_they_would_keep(temporaries, step, axes):
    assert temporaries(step, "v5e-4", axes, "block") < temporaries(step, "v5e-4", axes, "none")
