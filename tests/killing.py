"""Command lines in children that are killed, at a file operation or after a time, as a power cut would."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["killing", "tyro", "jax", "optax", "orbax.checkpoint", "dmsec_jax.cli", "dmsec_jax.tuning"]
)
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
    ours, theirs = _SERVER.Pipe(duplex=False)
    log = Path(watched).with_suffix(".log")
    child = _SERVER.Process(
        target=_child, args=(line, str(watched), operation, seconds, devices, file_bytes, str(log), theirs)
    )
    child.start()
    theirs.close()
    child.join()
    try:
        count = ours.recv()
    except EOFError:
        count = 0
    return child.exitcode, count, log.read_text(errors="replace")


def _child(line, watched, operation, seconds, devices, file_bytes, log, pipe):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    done = 0

    def count(event: str, args: tuple) -> None:
        nonlocal done
        if event not in EVENTS or not str(args[0]).startswith(watched) or not _changes(event, args):
            return
        done += 1
        if done == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        if done == 1 and seconds is not None:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    sys.addaudithook(count)
    if file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from dmsec_jax import cli

    status = cli.main(line)
    sys.stdout.flush()
    pipe.send(done)
    pipe.close()
    os._exit(status)


def _changes(event: str, args: tuple) -> bool:
    return event != "open" or bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
