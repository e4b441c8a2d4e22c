"""`python -m benchmarks.matrix`; the command is in a module of its own, as what `__main__` defines cannot be sent to the worker processes."""

import sys

import tyro

from benchmarks.matrix import command

if __name__ == "__main__":
    sys.exit(command.main(tyro.cli(command.Config, description=command.__doc__)))
