"""Rows over devices: of the mesh in force (`jax.set_mesh`), or of a `pmap` axis. Without either these functions change nothing, so that a step
holds no word about devices but where its rows are and which weights it needs whole."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from dmsec_jax.core.checks import require


def rows(tree: Any) -> Any:
    """Leaves [N, ...] whose rows the devices of the mesh share.

    Raises:
        ValueError: unless the number of devices divides N.
    """
    mesh = _mesh()
    if mesh is None:
        return tree
    for leaf in jax.tree.leaves(tree):
        fits = leaf.shape[0] % mesh.size == 0
        require(fits, "batch", f"a multiple of {mesh.size}, the devices of the mesh", leaf.shape[0], "change it")
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(mesh.axis_names))


def whole(tree: Any) -> Any:
    """Leaves that every device of the mesh holds: weights that were cut are gathered here, and their gradients summed."""
    return tree if _mesh() is None else jax.lax.with_sharding_constraint(tree, PartitionSpec())


def apart(run: Callable, *args: Any) -> Any:
    """`run` of leaves [N, ...], on each device of the mesh for its own rows: for kernels that the compiler cannot divide.

    Where the number of devices does not divide N, every device runs it for all rows.
    """
    mesh = _mesh()
    if mesh is None:
        return run(*args)
    divided = all(leaf.shape[0] % mesh.size == 0 for leaf in jax.tree.leaves(args))
    where = PartitionSpec(mesh.axis_names) if divided else PartitionSpec()
    return jax.shard_map(run, in_specs=where, out_specs=where, check_vma=False)(*args)


def own_rows(tree: Any, axis_name: str | None) -> Any:
    """This device's share of leaves [N, ...] under `pmap`.

    Raises:
        ValueError: unless the number of devices divides N.
    """
    if axis_name is None:
        return tree
    count, i = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    for leaf in jax.tree.leaves(tree):
        fits = leaf.shape[0] % count == 0
        require(fits, "batch", f"a multiple of {count}, the devices of {axis_name}", leaf.shape[0], "change it")
    size = lambda leaf: leaf.shape[0] // count
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size(leaf), size(leaf)), tree)


def mean(tree: Any, axis_name: str | None) -> Any:
    """The mean over the devices of a `pmap`."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _mesh() -> jax.sharding.AbstractMesh | None:
    """That in force, if the compiler is the one to place arrays on it; inside `pmap` and `shard_map` it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(mesh.axis_types) == {AxisType.Auto} else None
