"""Two processes on this machine that join each other."""

import socket
import subprocess
import sys


def in_two(code: str, *args: str) -> list[subprocess.CompletedProcess]:
    """What becomes of `code` in two processes, whose arguments are a free address, their number, and `args`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", code, where, str(i), *args], **pipes) for i in range(2)]
    outputs = [child.communicate(timeout=300) for child in children]
    return [
        subprocess.CompletedProcess(child.args, child.returncode, *output)
        for child, output in zip(children, outputs, strict=True)
    ]
