"""Steps of a small network compiled for TPUs that are not here: what devices say to each other, what is reused, what fits, which kernels run."""

import dataclasses

import jax
import pytest

pytest.importorskip("libtpu", reason="needs the aot extra, run `pip install -e .[aot]`")

from benchmarks.pod import chips, compiled, steps
from dmsec_jax import parallel
from dmsec_jax.models import presets

pytestmark = pytest.mark.aot

UNET = dataclasses.replace(
    presets.TINY.unet,
    sample_size=32,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(96,),  # kernels of more than `spread.SMALL` entries
    norm_num_groups=8,
    cross_attention_dim=32,
)
VAE = dataclasses.replace(presets.TINY.vae, block_out_channels=(16,), sample_size=32)
SMALL = dataclasses.replace(presets.TINY, unet=UNET, vae=VAE)
MIB = 2**20


@pytest.fixture(scope="module")
def program():
    """(step, topology, mesh) -> the step and its compiled program, of two rows per device."""
    made = {}

    def of(step, topology, axes):
        if (step, topology) not in made:
            mesh = parallel.make_mesh(axes, chips.devices(topology))
            setting = steps.Setting("small", UNET.sample_size, 2 * chips.TOPOLOGIES[topology].devices)
            lowered = compiled.lower(steps.BUILDS[step](setting, mesh), mesh, "")
            made[step, topology] = lowered.program, lowered.lowered.compile(compiler_options=compiled.OPTIONS)
        return made[step, topology]

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(steps.MODELS, "small", SMALL)
        yield of


def bytes_of(tree):
    """On one device."""
    return sum(leaf.sharding.shard_shape(leaf.shape) and _bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf):
    count = 1
    for length in leaf.sharding.shard_shape(leaf.shape):
        count *= length
    return count * leaf.dtype.itemsize


@pytest.mark.parametrize(("step", "topology", "axes", "temporaries"), [
    ("sampling", "v5e-16", "data=16", 8),
    ("CGI-DM", "v5e-4", "data=4", 40),
    ("DreamBooth", "v5e-4", "fsdp=4", 60),
    ("DreamBooth", "v5e-16", "data=4,fsdp=4", 60),
])  # fmt: skip
def test_devices_exchange_what_is_planned_and_reuse_what_was_given_away(program, step, topology, axes, temporaries):
    made, found = program(step, topology, axes)
    talk = compiled.collectives(found.as_text())
    assert talk.keys() <= made.plan
    assert bool(talk) == bool(made.plan)
    memory = found.memory_analysis()
    given = sum(bytes_of(made.args[i]) for i in made.donated)
    assert memory.alias_size_in_bytes >= given
    assert memory.temp_size_in_bytes <= temporaries * MIB
    assert "tpu_custom_call" in found.as_text()
