"""`--auto` finds its place among the processes that Slurm and Open MPI (up to 4, whose variables JAX reads) start."""

import os
import socket
import subprocess
import sys

import pytest

SLURM = lambda i, port: {
    "SLURM_JOB_ID": str(port - (65535 - 2**12 + 1)),  # JAX makes the port of it
    "SLURM_STEP_NODELIST": "127.0.0.1,node[002-003]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(i),
    "SLURM_LOCALID": str(i),
}
OPEN_MPI = lambda i, port: {
    "OMPI_MCA_orte_hnp_uri": f"{(port - (65535 - 2**12 + 1)) * 2**12}.0;tcp://127.0.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(i),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
}


def free_port() -> int:
    """One of those that JAX makes of a job's number."""
    for port in range(65000, 65000 - 1000, -1):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


@pytest.mark.parametrize("cluster", [SLURM, OPEN_MPI], ids=["slurm", "open-mpi"])
def test_processes_of_a_cluster_find_each_other(cluster):
    port, pipes = free_port(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    foreign = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "XLA_FLAGS")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    children = [
        subprocess.Popen([sys.executable, "-m", "dmsec_jax.launch", "--auto"], env=own | cluster(i, port), **pipes)
        for i in range(2)
    ]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    for i, (printed, _) in enumerate(outputs):
        assert f"process {i} of 2: 1 of 2 devices" in printed
        assert "together 2" in printed
