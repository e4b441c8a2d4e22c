"""Command lines in children that are killed, at a file operation or after a time, as a power cut would.

A kill costs the start of a process. `images` takes what many kills would leave from one run, and `resumed` goes on from each in one process.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from dmsec_jax import cli
from dmsec_jax.core import files

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["killing", "tyro", "jax", "optax", "orbax.checkpoint", "dmsec_jax.cli", "dmsec_jax.tuning"]
)
STOPPED = "stopped"
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def run(
    line: list[str],
    watched: Path,
    *,
    operation: int | None = None,
    seconds: float | None = None,
    devices: int = 1,
    file_bytes: int | None = None,
) -> tuple[int, int, str]:
    """Runs `dmsec` with a command line in a child.

    Args:
        watched: folder whose file operations count.
        operation: the child is killed before this one of them.
        seconds: or this long after the first of them.
        devices: that the child sees.
        file_bytes: no file may grow beyond this, as on a full disk.

    Returns:
        (exit status, -9 if it was killed; file operations; what it wrote to stdout and stderr).
    """
    log = Path(watched).with_suffix(".log")
    child, ours = _started(_child, line, str(watched), operation, seconds, devices, file_bytes, (), str(log))
    child.join()
    return child.exitcode, _received(ours) or 0, log.read_text(errors="replace")


def images(line: list[str], watched: Path, operations: Collection[int], place: Path) -> list[Path]:
    """What kills before these file operations would leave of `watched`: there the child is stopped, with all its threads, until the folder
    is copied to `place`. Ends with the run."""
    log = Path(watched).with_suffix(".log")
    child, ours = _started(_child, line, str(watched), None, None, 1, None, tuple(operations), str(log))
    made = []
    while _received(ours) == STOPPED:
        tasks = Path(f"/proc/{child.pid}/task")
        while any(task.read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.glob("*/stat")):
            time.sleep(0.001)
        made.append(shutil.copytree(watched, place / str(len(made)), symlinks=True))
        os.kill(child.pid, signal.SIGCONT)
    child.join()
    assert child.exitcode == 0, log.read_text(errors="replace")
    return made


def resumed(line: list[str], watched: Path, images: Sequence[Path], place: Path) -> list[Path]:
    """Runs the command to its end from each image, put where `watched` was, and moves what it leaves to `place`."""
    log = Path(watched).with_suffix(".log")
    child, ours = _started(_resume, line, str(watched), list(map(str, images)), str(place), str(log))
    child.join()
    assert child.exitcode == 0, log.read_text(errors="replace")
    return list(map(Path, ours.recv()))


def _started(target, *args):
    ours, theirs = _SERVER.Pipe(duplex=False)
    child = _SERVER.Process(target=target, args=(*args, theirs))
    child.start()
    theirs.close()
    return child, ours


def _received(pipe):
    try:
        return pipe.recv()
    except EOFError:  # it was killed
        return None


def _child(line, watched, operation, seconds, devices, file_bytes, stops, log, pipe):
    _write_to(log)
    done, one_at_a_time = 0, threading.Lock()

    def count(event: str, args: tuple) -> None:
        nonlocal done
        if event not in EVENTS or not str(args[0]).startswith(watched) or not _changes(event, args):
            return
        with one_at_a_time:
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            if done == 1 and seconds is not None:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if done in stops:
                pipe.send(STOPPED)
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread first: it goes no further

    sys.addaudithook(count)
    if file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    _see(devices)
    status = cli.main(line)
    pipe.send(done)
    _leave(pipe, status)


def _resume(line, watched, images, place, log, pipe):
    _write_to(log)
    _see(1)
    left = []
    for image in images:
        shutil.rmtree(watched, ignore_errors=True)
        shutil.copytree(image, watched, symlinks=True)
        files._tidy.cache_clear()  # a process tidies a folder once; here each image stands for a new process
        if status := cli.main(line):
            _leave(pipe, status)
        left.append(shutil.move(watched, Path(place) / Path(image).name))
    pipe.send(list(map(str, left)))
    _leave(pipe, 0)


def _see(devices: int) -> None:
    import jax  # not where this module is imported: only children set their devices

    jax.config.update("jax_num_cpu_devices", devices)


def _write_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _leave(pipe, status: int) -> None:
    sys.stdout.flush()
    pipe.close()
    os._exit(status)


def _changes(event: str, args: tuple) -> bool:
    return event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
