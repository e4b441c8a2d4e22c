"""The bench that compiles for TPUs: work counted by hand, and what is read off a compiled program's text."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks.figures import pod
from benchmarks.pod import compiled, counts
from benchmarks.pod.__main__ import CELLS, VARIABLES, missing, must_fit
from benchmarks.pod.chips import CHIPS, TOPOLOGIES
from benchmarks.pod.steps import BUILDS, GRAPHS, MODELS, Program
from dmsec_jax.models import presets, unet, vae


def products(jaxpr):
    """Floating-point operations of all matrix products and convolutions of a program, programs inside it included; of branches the last."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * eqn.outvars[0].aval.size
        elif name == "conv_general_dilated":
            total += 2 * math.prod(eqn.invars[1].aval.shape[:3]) * eqn.outvars[0].aval.size
        elif name == "cond":
            total += products(eqn.params["branches"][0].jaxpr)
        elif name == "scan":
            total += eqn.params["length"] * products(eqn.params["jaxpr"].jaxpr)
        else:
            inside = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
            total += sum(products(program) for program in inside if hasattr(program, "eqns"))
    return total


@pytest.mark.parametrize("preset", [presets.TINY, presets.TINY_XL], ids=["sd", "xl"])
def test_counts_by_hand_are_those_of_the_traced_networks(preset):
    side, tokens = preset.unet.sample_size, 7
    params = jax.eval_shape(partial(unet.init, cfg=preset.unet), jax.random.key(0))
    shape = lambda *lengths: jax.ShapeDtypeStruct(lengths, jnp.float32)
    inputs = shape(1, side, side, preset.unet.in_channels), shape(1)
    inputs += (shape(1, tokens + preset.unet.extra_rows, preset.unet.cross_attention_dim),)
    traced = jax.make_jaxpr(partial(unet.apply, preset.unet))(params, *inputs)
    assert counts.unet_forward(preset.unet, side, tokens).total == products(traced.jaxpr)

    pixels = preset.vae.sample_size
    params = jax.eval_shape(partial(vae.init, cfg=preset.vae), jax.random.key(0))
    traced = jax.make_jaxpr(partial(vae.encode, preset.vae))(params, shape(1, pixels, pixels, 3))
    assert counts.vae_encode(preset.vae, pixels).total == products(traced.jaxpr)


def test_stable_diffusion_takes_what_is_published():
    forward = counts.unet_forward(presets.SD15.unet, 64, 77)
    assert forward.total == pytest.approx(2 * 0.4e12, rel=0.01)  # 0.4 trillion multiplications and additions
    assert forward.long > 0.1 * forward.total


TEXT = """
  %all-reduce.1 = f32[1024]{0:T(1024)} all-reduce(%a), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %ag = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%b), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = bf16[8,8]{1,0} all-gather-done(%ag)
  %ag2 = f32[96,8]{0,1} all-gather(%d), channel_id=15, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}
  %cp = f32[16]{0} collective-permute(%c), source_target_pairs={{0,1},{1,0}}
  %cp2 = (f32[16]{0}, f32[16]{0}) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}
  %send = (f32[16]{0}, u32[], token[]) send(%c, %token), channel_id=3, is_host_transfer=true
  %not = f32[16]{0} fusion(%all-reduce.1), kind=kLoop
"""


def test_collectives_are_counted_with_the_bytes_of_a_ring():
    found = compiled.collectives(TEXT)
    assert {kind: part["count"] for kind, part in found.items()} == {
        "all-reduce": 1,
        "all-gather": 2,
        "collective-permute": 2,
        "send": 1,
    }
    assert found["all-reduce"]["bytes"] == pytest.approx(2 * 3 / 4 * 4096)
    assert found["all-gather"]["bytes"] == pytest.approx(3 / 4 * (128 + 4 * 96 * 8))
    assert found["collective-permute"]["bytes"] == 2 * 64
    assert found["send"]["bytes"] == 64 + 4  # with its context


LOOPS = """
%body.1 (arg.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %ag = f32[8,16]{1,0} all-gather(%b), replica_groups={{0,1}}, dimensions={0}
}

%fused (arg.2: f32[8]) -> f32[8] {
  %cp = f32[8]{0} collective-permute(%arg.2), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (arg.3: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8,16]{1,0}) while(%init), condition=%cond.1, body=%body.1
  %ar = f32[8]{0} all-reduce(%c), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_what_a_loop_exchanges_is_told_from_what_is_exchanged_once():
    assert compiled.collectives(LOOPS).keys() == {"all-gather", "all-reduce", "collective-permute"}
    assert compiled.in_loops(LOOPS) == {"all-gather"}


def test_what_goes_to_another_slice_takes_the_network():
    found = {"send": {"count": 1, "bytes": 3e9}, "all-reduce": {"count": 1, "bytes": 4e9}}
    program = Program(None, (), (), None, 2, counts.Count(1.0).forward(), frozenset())
    made = compiled.projection(program, {"flops": 1.0, "bytes accessed": 8.0}, found, CHIPS["v5e"], 1)
    assert made["seconds"]["network"] == pytest.approx(2 * 3e9 / 3.125e9)
    assert made["seconds"]["links"] == pytest.approx(2 * 4e9 / 200e9)
    assert made["bound"] == "network"


def test_groups_of_an_unknown_form_are_an_error_not_a_zero():
    assert compiled.together("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={1}") == 8
    assert compiled.together("replica_groups=mesh['a'=1,'b'=4], device_ids=([2,2]T(1,0)) {'b'}, dimensions={1}") == 4
    with pytest.raises(ValueError, match="replica_groups must be of a known form"):
        compiled.together("replica_groups=something")


@pytest.mark.parametrize(("message", "gib"), [
    ("Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G)", 40.0),
    ("Ran out of memory in memory space hbm. Used 20.51G of 15.75G hbm. Exceeded hbm capacity by 4.76G.", 20.51),
    ("something else", None),
])  # fmt: skip
def test_what_is_needed_is_read_off_the_refusal(message, gib):
    assert compiled.needed(message) == gib


def test_cells_name_what_there_is_and_no_two_share_a_file():
    assert {cell.step for cell in CELLS} == set(BUILDS)
    assert {cell.model for cell in CELLS} == {*MODELS, GRAPHS}
    assert {cell.topology for cell in CELLS} == set(TOPOLOGIES)
    assert {topology.chip for topology in TOPOLOGIES.values()} == set(CHIPS)
    assert len({cell.path for cell in CELLS}) == len(CELLS)


def test_every_step_that_must_fit_is_a_cell_before_all_others():
    everything = set(BUILDS) - set(VARIABLES) - {"Bayesian linear"}
    first = CELLS[: 2 * len(everything)]
    assert all(must_fit(cell) for cell in first)
    for model, topology in (("SD 1.5", "v5e-4"), ("SDXL", "v5p-8")):
        assert {cell.step for cell in first if (cell.model, cell.topology) == (model, topology)} == everything


def test_what_has_no_result_is_named():
    absent = missing()
    assert pod.remainder([]) == ""
    for cell in filter(must_fit, absent):
        assert f"{cell.step} ({cell.model}, {cell.topology})" in pod.remainder(absent)


def results():
    """(cell, what its committed file says) of all that were compiled."""
    return [(cell, json.loads(cell.path.read_text())) for cell in CELLS if cell.path.is_file()]


@pytest.mark.parametrize(("cell", "content"), results(), ids=lambda part: getattr(part, "name", ""))
def test_what_was_compiled_fits_exchanges_what_is_planned_and_computes_what_was_counted(cell, content):
    found = content["found"]
    if not found["fits"]:
        assert content["notes"], "says what would make it fit"
        assert not must_fit(cell)
        return
    assert found["peak_gib"] <= content["limit_gib"]
    assert found["unplanned"] == []
    if "flops" in found:
        assert found["flops"] == pytest.approx(found["flops_analytic"], rel=0.15)


def test_more_devices_of_data_do_not_change_what_one_computes():
    flops = {}
    for cell, content in results():
        if cell.topology.startswith("v5e-") and "flops" in content["found"]:
            cut = cell.mesh.partition("fsdp=")[2]
            flops.setdefault((cell.step, cell.model, cell.pixels, cell.rows, cut), []).append(content["found"]["flops"])
    assert max(map(len, flops.values())) >= 3
    for step, same in flops.items():
        assert same == pytest.approx([same[0]] * len(same), rel=1e-3), step
