"""A function of rows on a mesh of eight virtual devices."""

import re

import jax

from dmsec_jax import parallel

COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def without_talk(run, key, params, rows, index):
    """What `run` gives with its rows shared, on the host; its devices must say nothing to each other, and each keep its share."""
    mesh = parallel.make_mesh("data=4,fsdp=2")
    spread_rows, spread_index = parallel.shard_rows((rows, index), mesh)
    everywhere = parallel.replicate(params, mesh)
    compiled = jax.jit(run).lower(key, everywhere, spread_rows, spread_index).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    found = compiled(key, everywhere, spread_rows, spread_index)
    share = len(index) // mesh.size
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == share for leaf in jax.tree.leaves(found))
    return parallel.to_host(found)
