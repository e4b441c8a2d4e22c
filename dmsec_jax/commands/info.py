"""`dmsec info PATH`: what a model or adapter is, and whether it can be loaded."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from dmsec_jax.checkpoints import hub
from dmsec_jax.checkpoints.inspection import Account, components, inspect
from dmsec_jax.core.files import read_json, sha256
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import schedule
from dmsec_jax.report.page import cut, printable

WIDTH = 160
"""Longest line of a value that strangers wrote."""
SENTENCES = 600
"""The same of a problem, whose end says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Say what a model or adapter is: family, parts, parameters, dtypes, ranks, metadata, SHA-256, and every key that does not fit."""

    path: Annotated[Path, tyro.conf.Positional]
    """A diffusers folder, a hub id, a single file (.safetensors, .ckpt), an adapter (LoRA, LoCon, LoHa, LoKr, DoRA, OFT), or learnt words."""
    base: Path | None = None
    """For an adapter or a single file: the model that it is for or made from, a diffusers folder; default: what its shapes look like."""


def run(cfg: Config) -> int:
    """Prints one page; 0 if everything fits and can be loaded, else 1."""
    path = hub.fetch(cfg.path) if hub.is_id(cfg.path) else cfg.path
    account = inspect(path, cfg.base)
    problems = [*account.problems, *(_beside(path) if account.kind == "diffusers folder" else [])]
    print(page(str(cfg.path), account, sha256(path), problems))
    sys.stdout.flush()
    return 1 if problems else 0


def page(path: str, account: Account, digest: str, problems: list[tuple[str, str]]) -> str:
    """The page as text, safe for a terminal whatever the file holds."""
    known = "" if account.family == "unknown" else f", {account.family}"
    facts = {"is": f"{account.kind}{known}", **account.facts, "sha256": digest}
    width = max(map(len, facts))
    lines = [_line(path), *(f"  {name:{width}}  {_line(value)}" for name, value in facts.items())]
    if account.parts:
        rows = [("part", "parameters", "stored as", "")]
        rows += [(part.name, f"{part.parameters:,}", part.dtypes, part.remark) for part in account.parts]
        name, count, dtypes = (max(len(row[i]) for row in rows) for i in range(3))
        lines += ["", *(f"  {a:{name}}  {b:>{count}}  {c:{dtypes}}  {_line(d)}".rstrip() for a, b, c, d in rows)]
    if account.metadata:
        lines += ["", "  metadata", *(f"    {_line(key)}: {_line(value)}" for key, value in account.metadata.items())]
    if not problems:
        return "\n".join([*lines, "", "  Everything fits: it can be loaded."])
    told = [f"    {kind}: {_line(what, SENTENCES)}" for kind, what in sorted(problems)]
    return "\n".join([*lines, "", f"  It cannot be loaded: {len(problems)} problem{'s' * (len(problems) > 1)}", *told])


def _beside(folder: Path) -> list[tuple[str, str]]:
    """What is wrong with scheduler and tokenizer."""
    problems = []
    readers = [
        lambda: schedule.from_scheduler_json(read_json(folder / "scheduler" / "scheduler_config.json"), "scheduler"),
        lambda: Tokenizer.load(folder / "tokenizer"),
    ]
    if "text_encoder_2" in components(folder):
        readers.append(lambda: Tokenizer.load(folder / "tokenizer_2"))
    for what in readers:
        try:
            what()
        except (ValueError, OSError) as error:
            problems.append(("unreadable", str(error)))
    return problems


def _line(text: str, width: int = WIDTH) -> str:
    return cut(printable(text), width)
