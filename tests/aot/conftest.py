"""A small network, and its steps compiled for TPUs that are not here."""

import dataclasses
import math

import pytest

from dmsec_jax.models import presets

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


@pytest.fixture
def program(monkeypatch):
    """(step, topology, mesh) -> the step and its compiled program, of two rows per device."""
    from benchmarks.pod import chips, compiled, steps
    from dmsec_jax import parallel

    def of(step, topology, axes):
        mesh = parallel.make_mesh(axes, chips.devices(topology))
        setting = steps.Setting("small", UNET.sample_size, 2 * chips.TOPOLOGIES[topology].devices)
        lowered = compiled.lower(steps.BUILDS[step](setting, mesh), mesh, "")
        return lowered.program, lowered.lowered.compile(compiler_options=compiled.OPTIONS)

    monkeypatch.setitem(steps.MODELS, "small", SMALL)
    return of


@pytest.fixture
def judged(program):
    """As `program`, after what holds for every step: no exchange beside the plan, buffers that were given away are used again, temporaries
    (MiB) within a budget, and the TPU kernel in place where there are networks. Gives what is exchanged, and the share of those buffers that
    lies on one device."""
    import jax

    from benchmarks.pod import compiled

    on_a_device = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    def of(step, topology, axes, temporaries):
        made, found = program(step, topology, axes)
        talk, memory = compiled.collectives(found.as_text()), found.memory_analysis()
        assert talk.keys() <= made.plan
        given = sum(on_a_device(leaf) for i in made.donated for leaf in jax.tree.leaves(made.args[i]))
        assert memory.alias_size_in_bytes >= given
        assert memory.temp_size_in_bytes <= temporaries * 2**20
        assert made.work is None or "tpu_custom_call" in found.as_text()
        whole = sum(leaf.size * leaf.dtype.itemsize for i in made.donated for leaf in jax.tree.leaves(made.args[i]))
        return talk, given / whole

    return of
