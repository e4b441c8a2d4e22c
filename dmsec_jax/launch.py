"""Options of the long verbs that say where the work is done: on which mesh, and by how many processes together.

`python -m dmsec_jax.launch` with the same options lets all devices add up, to see that they work.
"""

import atexit
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from dmsec_jax import parallel
from dmsec_jax.core import spread
from dmsec_jax.core.checks import require

COUNT_FLAG = "xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Where the work is done; results do not depend on it, beyond rounding."""

    mesh: str | None = None
    """Devices to share the work, for example data=8,fsdp=4: data shares rows (pictures, latents, starts), fsdp rows and what training keeps of
    large weights; "data" alone takes all there are. On a CPU devices are cores. Default: all devices on data where several processes were joined,
    else one device."""
    coordinator: str | None = None
    """Join other processes that run the same command: host:port of process 0, with --num-processes and --process-id."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    auto: bool = False
    """Join the processes that the cluster started: Slurm, Open MPI (up to 4), Cloud TPU or GKE."""


def parse(config: type, args: Sequence[str], prog: str, description: str | None) -> tuple[Any, Devices]:
    """A verb's config and the devices, from one command line."""
    plain = tyro.conf.arg(name="")

    def both(cfg: Annotated[config, plain], devices: Annotated[Devices, plain]) -> tuple[Any, Devices]:
        return cfg, devices

    return tyro.cli(both, prog=prog, args=args, description=description)


@contextlib.contextmanager
def on(devices: Devices) -> Iterator[None]:
    """Joins the other processes and puts the mesh in force. Every process computes and reads; process 0 writes (`core.files`).

    A process that fails ends at once, and so do the others, who find its connection closed: leaving properly would wait for them,
    while they wait for it.

    Raises:
        ValueError: as `parallel.initialize` and `parallel.make_mesh`.
    """
    require(devices.mesh != "", "mesh", "like data=8,fsdp=4", "''", "leave the option out for one device")
    axes = "" if devices.mesh in (None, "data") else devices.mesh
    if devices.mesh is not None and devices.coordinator is None and not devices.auto:
        _take_cores(math.prod(parallel.sizes(axes)) if axes else None)
    parallel.initialize(devices.coordinator, devices.num_processes, devices.process_id, auto=devices.auto)
    together = jax.process_count() > 1
    if devices.mesh is None and not together:
        yield
        return
    try:
        with jax.set_mesh(parallel.make_mesh(axes)):
            yield
    except BaseException:
        if together:
            atexit.register(_end)  # runs before JAX's own, which leaves properly
        raise
    if together:
        jax.distributed.shutdown()


def _take_cores(count: int | None) -> None:
    """Makes so many devices of a CPU (None: one of each core), unless their number was set otherwise or JAX has begun.

    Each works on rows of its own, where one device has its cores share every operation and wait for each other: measured in benchmarks/LOG.md.
    """
    if jax.config.jax_num_cpu_devices == -1 and COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with contextlib.suppress(RuntimeError):  # it has begun
            jax.config.update("jax_num_cpu_devices", count or cores)


def _end() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


def count(devices: Devices) -> int:
    """Lets every device contribute a one, and prints the sum: status 0 if it is the number of devices."""
    mesh_of = devices if devices.mesh is not None else dataclasses.replace(devices, mesh="data")
    with on(mesh_of):
        mesh = jax.sharding.get_mesh()
        own = parallel.own_rows(mesh.size, mesh)
        ones = parallel.from_own_rows(np.ones(own.stop - own.start, np.float32), mesh)
        total = int(jax.jit(lambda ones: spread.whole(ones.sum()))(ones))
        here = f"{jax.local_device_count()} of {mesh.size} devices ({jax.devices()[0].device_kind})"
        print(f"process {jax.process_index()} of {jax.process_count()}: {here} on {dict(mesh.shape)}; together {total}")
    return int(total != mesh.size)


if __name__ == "__main__":
    sys.exit(count(tyro.cli(Devices, description=__doc__)))
