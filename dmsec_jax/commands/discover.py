"""`dmsec discover`: which columns of a table cause which, hidden common causes allowed, and how sure that is."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dmsec_jax import discovery
from dmsec_jax.causal.background import Background
from dmsec_jax.commands.places import require_free
from dmsec_jax.core import config
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import sha256
from dmsec_jax.data import tables
from dmsec_jax.methods import spot
from dmsec_jax.report import discovery as report
from dmsec_jax.report import page
from dmsec_jax.report.discovery import Discovery


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Learn which variables of a table cause which, when some causes may be hidden (SPOT)."""

    data: tyro.conf.Positional[Path]
    """CSV (with a header), Parquet, or .npy; one row per observation, one column per variable."""
    out: Path = Path("out/discover")
    """Where result.json, report.html, the graphs (GraphML, DOT, SVG) and the heat map go."""
    columns: tuple[str, ...] = ()
    """Use only these columns."""
    drop_missing: bool = False
    """Leave out rows in which a value is missing."""
    transform: Literal["standardise", "normal-scores"] = "standardise"
    """What is done to each column; normal-scores (of the ranks) for skewed columns."""
    family: discovery.Family = "ancestral"
    """Of graphs; `dag` allows no hidden common causes."""
    required: tuple[str, ...] = ()
    """Edges that are known, as `cause>effect`."""
    forbidden: tuple[str, ...] = ()
    """Edges that cannot be, as `cause>effect`; `one|other` for neither direction nor a hidden common cause."""
    tiers: tuple[str, ...] = ()
    """Columns in order of time, each group as `a,b`: none causes one of an earlier group."""
    restarts: int = 2
    """Random starts of the search."""
    set: tuple[str, ...] = ()
    """Numbers of the search (`methods.spot.Config`), for example num_steps=20."""
    posterior: Path = discovery.SHIPPED
    """Folder of the trained posterior; `dmsec pretrain --what skeleton` makes one."""
    seed: int = 0


def run(cfg: Config) -> int:
    """Reads, learns, writes."""
    console = Console()
    began = time.monotonic()
    require_free(cfg.out)
    known = _background(cfg)
    table, dropped = _table(cfg)
    seconds = {"reading": time.monotonic() - began}
    began = time.monotonic()
    model = discovery.SPOT(
        restarts=cfg.restarts,
        family=cfg.family,
        transform=cfg.transform,
        background=known,
        search=config.override(spot.Config(), cfg.set),
        posterior=cfg.posterior,
        seed=cfg.seed,
    )
    _fit(model, table, console)
    seconds["learning"] = time.monotonic() - began
    found = Discovery(
        source=cfg.data.name,
        names=table.names,
        num_rows=model.num_rows_,
        dropped_rows=dropped,
        transform=cfg.transform,
        family=cfg.family,
        background=_sentences(known),
        probability=model.edge_probabilities_,
        mag=model.mag_,
        pag=model.pag_,
        coef=model.coef_,
        omega=model.omega_,
        bic=model.bic_,
        bics=model.bics_,
        calibration=model.calibration_,
        notes=model.notes_,
        command=page.command_line(sys.argv[1:]),
        config=config.to_dict(cfg) | {"posterior": cfg.posterior.name},
        seeds={"seed": cfg.seed},
        seconds=seconds,
        inputs={cfg.data.name: sha256(cfg.data), "posterior": sha256(cfg.posterior)},
    )
    report.write(cfg.out, found)
    console.print(report.summary(found), markup=False, highlight=False)
    for note in found.notes:
        console.print(f"Note: {page.printable(note)}", markup=False, highlight=False)
    console.print(f"\nReport: {cfg.out / 'report.html'}", markup=False)
    return 0


def _fit(model: discovery.SPOT, table: tables.Table, console: Console) -> None:
    """Learns, with a bar for every stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def on_step(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        model.fit(table, on_step=on_step)


def _table(cfg: Config) -> tuple[tables.Table, int]:
    """The table, checked, and how many rows were dropped."""
    table = tables.read(cfg.data)
    if cfg.columns:
        unknown = [name for name in cfg.columns if name not in table.names]
        have = f"names of columns ({', '.join(table.names)[:200]})"
        require(not unknown, "columns", have, ", ".join(unknown), "correct them")
        table = tables.Table(cfg.columns, table.values[:, [table.names.index(name) for name in cfg.columns]])
    before = len(table.values)
    if cfg.drop_missing:
        table = tables.without_missing(table)
    try:
        tables.check(table)
    except ValueError as error:
        hint = "; --drop-missing drops those rows" if "missing values" in str(error) else ""
        raise ValueError(f"{cfg.data}: {error}{hint}") from error
    return table, before - len(table.values)


def _background(cfg: Config) -> Background:
    forbidden = [text for text in cfg.forbidden if "|" not in text]
    apart = [text for text in cfg.forbidden if "|" in text]
    return Background(
        required=tuple(_pair(text, ">") for text in cfg.required),
        forbidden=tuple(_pair(text, ">") for text in forbidden),
        apart=tuple(_pair(text, "|") for text in apart),
        tiers=tuple(tuple(name.strip() for name in group.split(",")) for group in cfg.tiers),
    )


def _pair(text: str, sign: str) -> tuple[str, str]:
    one, found, other = text.partition(sign)
    if not found or not one.strip() or not other.strip():
        raise fail("edge", "written as `cause>effect`", repr(text), "quote it for the shell")
    return one.strip(), other.strip()


def _sentences(known: Background) -> tuple[str, ...]:
    return (
        *(f"{cause} causes {effect}" for cause, effect in known.required),
        *(f"{cause} does not cause {effect} directly" for cause, effect in known.forbidden),
        *(f"{one} and {other} are not linked" for one, other in known.apart),
        *([f"in time, {', then '.join(' and '.join(tier) for tier in known.tiers)}"] if known.tiers else []),
    )
