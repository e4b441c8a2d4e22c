"""TPU topologies, and what one of their chips can do at best."""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

# Silences libtpu's search for a machine; several processes may compile side by side.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

GIB = 2**30


class Chip(NamedTuple):
    """Peaks as Google Cloud's documentation gives them (cloud.google.com/tpu/docs/v5e, v5p, v6e); memory as the compiler enforces it."""

    flops: float
    """Per second, bfloat16."""
    bandwidth: float
    """Bytes per second to and from HBM."""
    links: float
    """Bytes per second to and from the other chips of a slice, all links together."""
    network: float
    """Bytes per second to other slices: the data center network's bandwidth, shared by the chips of a host."""
    memory: float
    """Bytes of HBM that a program may use."""


CHIPS = {
    # the network: 6.4 and 25.6 Tbit/s for the 256 chips of a pod of v5e and v6e (2 x 100 and 4 x 200 Gbit/s for 8 chips), 50 Gbit/s a chip of v5p
    "v5e": Chip(197e12, 819e9, 200e9, 25e9 / 8, 15.75 * GIB),
    "v5p": Chip(459e12, 2765e9, 600e9, 50e9 / 8, 95.74 * GIB),
    "v6e": Chip(918e12, 1640e9, 448e9, 100e9 / 8, 31.25 * GIB),
}


class Topology(NamedTuple):
    """Some chips, wired up."""

    chip: str
    shape: str
    devices: int
    slices: int = 1


TOPOLOGIES = {
    "v5e-4": Topology("v5e", "2x2", 4),
    "v5e-16": Topology("v5e", "4x4", 16),
    "v5e-256": Topology("v5e", "16x16", 256),
    "v5p-8": Topology("v5p", "2x2x1", 4),
    "v5p-128": Topology("v5p", "4x4x4", 64),
    "v6e-16": Topology("v6e", "4x4", 16),
    "2 x v5e-16": Topology("v5e", "4x4", 32, 2),
}
"""By Google's names, in which v5p counts the two cores of a chip."""


def devices(name: str) -> list[jax.Device]:
    """Devices to compile for; nothing can run on them."""
    topology = TOPOLOGIES[name]
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.chip}:{topology.shape}", **more
    ).devices
    assert len(found) == topology.devices
    return found
