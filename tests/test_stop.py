"""A polite signal to one of two processes that train together stops both, and the same command goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_launch import assert_same

from dmsec_jax import cli

pytestmark = pytest.mark.slow  # processes that compile

STEPS = ["tune.num_steps=60", "chunk_steps=2", "save_every=2", "patterns=[conv_out]", "tune.adam_epsilon=1e-3"]


def started(line):
    """Two processes that share one command line, each with two devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--mesh", "data=4", "--coordinator", where, "--num-processes", "2", "--process-id"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    command = [sys.executable, "-m", "dmsec_jax", *line, *options]
    return [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]


def ended(children):
    outputs = [child.communicate(timeout=600)[0] for child in children]
    return [child.returncode for child in children], "\n".join(outputs)


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_one_of_two_processes_stops_both_and_a_rerun_ends_like_one_device(
    told, tiny_folder, pictures, tmp_path
):
    line = ["finetune", "--images", str(pictures), "--prompt", "a red dog", "--model", str(tiny_folder)]
    line += ["--sample-every", "0", "--set", *STEPS, "--out"]
    out, expected = tmp_path / "out", tmp_path / "expected"
    children = started([*line, str(out)])
    while not list((out / "checkpoints").glob("[0-9]*")):
        assert all(child.poll() is None for child in children), ended(children)
        time.sleep(0.05)
    children[told].send_signal(signal.SIGTERM)
    status, log = ended(children)
    assert status == [130, 130], log
    assert not (out / "model").exists(), "it was stopped before its end"
    status, log = ended(started([*line, str(out)]))
    assert status == [0, 0], log
    assert cli.main([*line, str(expected)]) == 0
    assert_same(out, expected)
