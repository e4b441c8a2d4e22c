"""From one core to a pod: one mesh, where arrays lie on it, start-up on many hosts, and a thin `pmap` twin.

Steps are pure and know nothing of devices: rows (pictures, latents, draws, graphs) are spread over the whole mesh, and the compiler runs the
same program on every device. Results do not depend on the number of devices, because the key of row j folds in its global index.

    mesh = parallel.make_mesh("data=4,fsdp=2")
    known, index = parallel.shard_rows((known, index), mesh)
    params = parallel.replicate(params, mesh)
    with jax.set_mesh(mesh):                                 # training draws its rows inside the step, kernels run apart: `core.spread`
        state, info = jax.jit(cgi_dm.run, static_argnames=...)(key, known, ...)

    state = jax.device_put(state, parallel.plan(state, mesh))
    with jax.set_mesh(mesh):
        state, info = jax.jit(dreambooth.run, static_argnames=...)(key, state, data, ...)

The commands say which mesh once (`launch`); their functions spread rows and gather results themselves.

Axes: `data` spreads rows; `fsdp` spreads rows and, of large weights, the output channels too (`plan`), which are gathered where they are used,
as in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmsec_jax.core import spread
from dmsec_jax.core.checks import require

AXES = ("data", "fsdp")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    auto: bool = False,
) -> None:
    """Joins this process with the others of the run; call it before anything else touches a device.

    Args:
        coordinator: host:port of process 0, the same in every process; with the two numbers, for clusters that JAX does not recognise.
        auto: ask the cluster instead: Slurm, Open MPI, Cloud TPU, GKE. With neither, the process stays alone.

    Raises:
        ValueError: if only some of the three are given, or numbers that do not fit, or both ways at once.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if auto:
            jax.distributed.initialize()
        return
    names = "coordinator, num_processes, process_id"
    require(None not in given, names, "all three or none", str(given), "add what is missing")
    require(not auto, names, "none where the cluster is asked", str(given), "leave out one of the two ways")
    fits = num_processes >= 1 and 0 <= process_id < num_processes
    require(fits, "process_id", f"from 0 to {num_processes - 1}", process_id, "number the processes from 0")
    jax.distributed.initialize(coordinator, num_processes, process_id)


def make_mesh(axes: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `data` and `fsdp` over `devices` (all of all hosts by default); of several slices of TPUs, `data` goes across.

    Args:
        axes: for example "data=8,fsdp=4"; an axis left out has size 1, except that "" puts all devices on `data`.

    Raises:
        ValueError: on another axis, a size below 1, a product that is not the number of devices, or `data` that slices do not divide.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(axes) if axes else (len(devices), 1)
    cure = f"devices here are {len(devices)}: choose sizes with that product"
    require(math.prod(shape) == len(devices), "mesh", f"of {len(devices)} devices", axes, cure)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1:  # the network between slices is slow: weights are gathered within one
        fits = shape[0] % slices == 0
        require(fits, "mesh", f"of a multiple of {slices} on data, the slices", axes, "cut weights within a slice")
        within = (shape[0] // slices, shape[1])
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1), devices), AXES)
    # Explicit axes, now the default, would ask for output shardings all through the networks
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sizes(axes: str) -> tuple[int, int]:
    """Of `data` and `fsdp`, by text such as "data=8,fsdp=4"; one that is left out is 1.

    Raises:
        ValueError: on another axis, or a size below 1.
    """
    found = dict.fromkeys(AXES, 1)
    for part in filter(None, axes.split(",")):
        name, _, size = (piece.strip() for piece in part.partition("="))
        ok = name in AXES and size.isdecimal() and int(size) >= 1
        require(ok, "mesh", "like data=8,fsdp=4", repr(axes), f"give sizes of {' and '.join(AXES)}")
        found[name] = int(size)
    return tuple(found.values())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Everything on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Each leaf [N, ...], the same on every host, with its rows spread over the mesh.

    Raises:
        ValueError: unless the number of devices divides N.
    """
    for leaf in jax.tree.leaves(tree):
        fits = leaf.ndim >= 1 and leaf.shape[0] % mesh.size == 0
        require(fits, "rows", f"a multiple of {mesh.size} devices", leaf.shape, "fill the last batch up")
    return jax.device_put(tree, rows(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The whole tree on every device."""
    return jax.device_put(tree, replicated(mesh))


def placed(tree: Any) -> Any:
    """Arrays where programs want what every device needs: on all devices of the mesh in force, or on the default device."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(jnp.asarray, tree) if mesh.empty else replicate(tree, mesh)


def cut(tree: Any) -> Any:
    """Weights where `plan` has them on the mesh in force, or on the default device."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(jnp.asarray, tree) if mesh.empty else jax.device_put(tree, plan(tree, mesh))


def own_rows(count: int, mesh: Mesh) -> slice:
    """Which of `count` rows the devices of this process hold: read only these from disk, then `from_own_rows`.

    Raises:
        ValueError: unless the number of devices divides `count`, or if its rows are not consecutive.
    """
    require(count % mesh.size == 0, "rows", f"a multiple of {mesh.size} devices", count, "fill the last batch up")
    parts = rows(mesh).addressable_devices_indices_map((count,)).values()
    bounds = sorted((part.start or 0, count if part.stop is None else part.stop) for (part,) in parts)
    joined = all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    require(joined, "mesh", "of consecutive rows per process", str(bounds), "order the devices by process")
    return slice(bounds[0][0], bounds[-1][1])


def from_own_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays from the rows of each process (`own_rows`)."""
    put = lambda leaf: jax.make_array_from_process_local_data(rows(mesh), np.asarray(leaf))
    return jax.tree.map(put, tree)


to_host = spread.to_host


def plan(tree: Any, mesh: Mesh) -> Any:
    """Where each weight of a parameter tree, or of a training state, lies (`core.spread.specs`)."""
    put = lambda spec: NamedSharding(mesh, spec)
    return jax.tree.map(
        put, spread.specs(tree, mesh.shape["fsdp"]), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Memory that a parameter tree, or a training state, takes on one device under a plan."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def pmapped(run: Callable, in_axes: Sequence[int | None], devices: Sequence[jax.Device] | None = None) -> Callable:
    """The twin of `jit` on a mesh: `run` under `jax.pmap`, rows split over the devices and joined again.

    For steps whose rows do not meet, such as sampling, PGD and CGI-DM; keys and indices make every row what it is on one device.

    Args:
        run: of positional arrays and trees; bind what is static with `functools.partial`.
        in_axes: for each argument, 0 if its leaves have rows, None if it is whole on every device.

    Returns:
        A function of the same arguments: (rows, ...) -> outputs whose leading axis is that of the devices; `joined` undoes it.

    Raises:
        ValueError: when called, unless the number of devices divides the rows.
    """
    devices = jax.devices() if devices is None else devices
    mapped = jax.pmap(run, axis_name="rows", in_axes=tuple(in_axes), devices=devices)

    def split(leaf):
        fits = leaf.shape[0] % len(devices) == 0
        require(fits, "rows", f"a multiple of {len(devices)} devices", leaf.shape, "fill the last batch up")
        return leaf.reshape(len(devices), -1, *leaf.shape[1:])

    def call(*args):
        parts = [arg if axis is None else jax.tree.map(split, arg) for arg, axis in zip(args, in_axes, strict=True)]
        return mapped(*parts)

    return call


def joined(tree: Any, axis: int = 0) -> Any:
    """What `pmapped` gave, [devices, ...], with the parts of each leaf joined along `axis` of a part."""
    return jax.tree.map(lambda leaf: np.concatenate(list(np.asarray(leaf)), axis=axis), tree)
