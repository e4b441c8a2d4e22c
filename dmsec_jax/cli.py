"""`dmsec VERB ...`: a table from verbs to their configs and functions, and nothing else."""

import atexit
import contextlib
import importlib
import os
import sys

VERBS = {
    "authenticate": "were these pictures used to fine-tune that model? (CGI-DM and membership tests)",
    "demo": "the whole story on the embedded model: fine-tune on ten pictures, extract them, report",
    "discover": "which columns of a table cause which, when some causes may be hidden? (SPOT)",
    "extract": "which training pictures does a fine-tuned model give away? (FineXtract and baselines)",
    "finetune": "fine-tune a model on a few pictures (DreamBooth, optionally Bayesian; full weights, LoRA or OFT)",
    "info": "what is this model or LoRA, and can it be loaded? (family, parts, ranks, SHA-256, every key that does not fit)",
    "protect": "change pictures slightly so that models learn less from them (AdvDM, Mist, ...), and measure how well that works",
    "pretrain": "train the embedded model, or the skeleton posterior, from scratch",
}
"""Verb -> one line of help; `dmsec_jax.commands.<verb>` holds `Config` and `run`."""
SHARED = ("authenticate", "discover", "extract", "finetune", "pretrain", "protect")
"""Verbs that many devices and processes can share; they take the options of `launch.Devices` too."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dmsec`; returns the exit status: 0 done, 1 refused with one clear error, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in VERBS:
        asked_for_help = not argv or argv[0] in ("-h", "--help")
        lines = "\n".join(f"  {verb:12} {text}" for verb, text in VERBS.items())
        print(f"usage: dmsec VERB [options]\n\n{lines}\n\ndmsec VERB --help lists the options of a verb.")
        return 0 if asked_for_help else _refuse(f"no verb {argv[0]!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes on slow compilation are no news to a user
    try:
        return _run(argv)
    except (ValueError, OSError, OverflowError, ImportError) as error:  # the last where an optional package lacks
        ours = isinstance(error, OSError) and error.strerror and error.filename is None  # says all but its number
        return _refuse(error.strerror if ours else str(error))
    except KeyboardInterrupt:
        atexit.register(_leave)  # runs before what was registered earlier: JAX would wait for the work on the device
        return 130


def _run(argv: list[str]) -> int:
    """Parses the options of a verb and does its work."""
    import tyro

    command = importlib.import_module(f"dmsec_jax.commands.{argv[0]}")
    options = {"prog": f"dmsec {argv[0]}", "args": argv[1:], "description": command.__doc__}
    where = contextlib.nullcontext()
    if argv[0] in SHARED:
        from dmsec_jax import launch

        cfg, devices = launch.parse(command.Config, **options)
        where = launch.on(devices)
    else:
        cfg = tyro.cli(command.Config, **options)
    with where:
        return command.run(cfg)


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(130)


def _refuse(message: str) -> int:
    """What the message quotes may be a stranger's, and must not steer the terminal."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in message
    )
    print(f"dmsec: {shown}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
