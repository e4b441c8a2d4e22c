"""Rows over devices: of the mesh in force (`jax.set_mesh`), or of a `pmap` axis. Without either these functions change nothing, so that a step
holds no word about devices but where its rows are and which weights it needs whole."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmsec_jax.core.checks import require

Axis = str | tuple[str, ...] | None
"""Of `pmap`, or those of a mesh inside `each`."""
SMALL = 2**16
"""Weights of fewer entries lie on every device: gathering them would cost more than it saves."""
BRIEF = 2**12
"""Gradients of fewer entries are summed over devices in one piece: each sum costs two meetings, which take longer than copying so few."""


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


def even(tree: Any) -> Any:
    """As `rows`, but leaves that have no rows, or not a multiple of the devices, stay as they are."""
    mesh = _mesh()
    if mesh is None:
        return tree
    shared = lambda leaf: jnp.ndim(leaf) and leaf.shape[0] % mesh.size == 0
    return jax.tree.map(lambda leaf: rows(leaf) if shared(leaf) else leaf, tree)


def filled(count: int) -> int:
    """The next multiple of the devices of the mesh: batches that are filled up to it can be shared."""
    mesh = _mesh()
    return count if mesh is None else -(-count // mesh.size) * mesh.size


def batches(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(`filled(min(size, count))` of the indices 0..count-1, how many of them count) for each batch: where rows are short the last one is
    repeated, so that one compilation serves any count."""
    size = filled(min(size, count))
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)


def whole(tree: Any) -> Any:
    """Leaves that every device of the mesh holds, as the host reads them: weights that were cut are gathered here, and their gradients summed."""
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


def cut(tree: Any) -> Any:
    """Weights, or a training state, over the axis `fsdp` of the mesh, as `specs` says; `whole` gathers them where they are used."""
    mesh = _mesh()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, specs(tree, mesh.shape["fsdp"]))


def cut_shapes(tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s that say where `cut` puts each leaf, so that what is read into them never lies whole on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    put = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(put, tree, specs(tree, mesh.shape["fsdp"]))


def specs(tree: Any, size: int) -> Any:
    """For each leaf, where `size` devices hold it: a kernel or table of `SMALL` entries or more is cut along its last axis (output channels of
    [in, out] and HWIO) over `fsdp`, or along the one before it if only that one divides; all else lies on every device.

    Output channels, not the largest axis: a weight cut along an axis that is summed over would turn its gradient's sum into an exchange of
    activations.
    """

    def spec(leaf) -> PartitionSpec:
        divided = [axis for axis in (-1, -2) if leaf.ndim >= 2 and leaf.shape[axis] % size == 0]
        if size == 1 or not divided or leaf.size < SMALL:
            return PartitionSpec()
        names = [None] * leaf.ndim
        names[divided[0]] = "fsdp"
        return PartitionSpec(*names)

    return jax.tree.map(spec, tree)


def to_host(tree: Any) -> Any:
    """NumPy arrays of the whole, on every host: a collective, so all processes call it. Leaf by leaf: a device holds one of them whole.

    Typed keys, which NumPy has no type for, stay where they are.
    """

    def fetched(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        here = jax.process_count() == 1 or getattr(leaf, "is_fully_replicated", True)
        return jax.device_get(leaf) if here else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetched, tree)


def own_rows(tree: Any, axis_name: Axis) -> Any:
    """This device's share of leaves [N, ...] under `pmap` or `each`.

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


def each(run: Callable[[Axis], Any], axis_name: Axis, count: int) -> Any:
    """`run(axis_name)` on every device, which takes its `own_rows` of `count` there and ends with `summed` or `mean`, so that all have the same.

    Under `pmap` with `axis_name` that happens anyway. Under a mesh whose devices hold all weights (`fsdp` of 1) and divide `count` it does so here,
    as the compiler would sum every weight's gradient by itself. Else `run(None)`, whose `rows` the compiler shares.
    """
    mesh = _mesh() if axis_name is None else None
    if mesh is None or mesh.shape.get("fsdp", 1) > 1 or count % mesh.size:
        return run(axis_name)
    return jax.shard_map(lambda: run(mesh.axis_names), in_specs=(), out_specs=PartitionSpec(), check_vma=False)()


def summed(tree: Any, axis_name: Axis) -> Any:
    """The sum over the devices of `axis_name`; brief leaves of a type travel together."""
    if axis_name is None:
        return tree
    leaves, form = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype if leaf.size < BRIEF else i, []).append(i)
    joined = [jnp.concatenate([leaves[i].ravel() for i in group]) for group in groups.values()]
    for group, total in zip(groups.values(), jax.lax.psum(joined, axis_name), strict=True):
        parts = jnp.split(total, np.cumsum([leaves[i].size for i in group])[:-1])
        for i, part in zip(group, parts, strict=True):
            leaves[i] = part.reshape(leaves[i].shape)
    return form.unflatten(leaves)


def mean(tree: Any, axis_name: Axis) -> Any:
    """The mean over the devices of `axis_name`."""
    if axis_name is None:
        return tree
    count = jax.lax.axis_size(axis_name)
    return jax.tree.map(lambda leaf: leaf / count, summed(tree, axis_name))


def on_any_host(flag: bool) -> bool:
    """Whether it is set in one of the processes of the run; all of them ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def meet() -> None:
    """Waits until every process of the run has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def _mesh() -> jax.sharding.AbstractMesh | None:
    """That in force, if the compiler is the one to place arrays on it; inside `pmap` and `shard_map` it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and set(mesh.axis_types) == {AxisType.Auto} else None
