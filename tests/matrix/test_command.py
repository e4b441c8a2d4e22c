"""What `python -m benchmarks.matrix` hands to its worker processes."""

import pickle
import runpy
import subprocess
import sys

import pytest

from benchmarks.matrix import workers


def test_worker_processes_can_read_what_they_are_sent(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(workers, "together", lambda tasks, folder, make_job, count, tell: sent.append((make_job, tell)))
    argv = ["matrix", "--preset", "tiny", "--workers", "2", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.matrix", run_name="__main__", alter_sys=True)
    assert ended.value.code == 1, "no worker ran, so models are missing"
    read = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
    subprocess.run(read, input=pickle.dumps(sent[0]), check=True, env={"PYTHONPATH": ":".join(sys.path)})
