"""`python -m benchmarks.pod`: compiles the steps at full size for TPU topologies, one file per cell under `results/pod`.

Nothing runs and no TPU is needed, only the extra `[aot]`. What has a result for the same program is not compiled again, so an interrupted run
goes on. A cell takes from one minute to half an hour on one core.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from benchmarks.harness import RESULTS, revision, table
from benchmarks.pod import chips, compiled, steps
from benchmarks.pod.steps import Setting
from dmsec_jax import parallel
from dmsec_jax.core.files import write_json
from dmsec_jax.report.result import Row, versions

FOLDER = RESULTS / "pod"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A step, what it is made of, and what it is compiled for."""

    step: str
    model: str
    pixels: int
    topology: str
    mesh: str
    """As `parallel.make_mesh` takes it."""
    rows: int
    """Per device."""
    weights: str = "float32"

    @property
    def name(self) -> str:
        spelt = f"{self.step} {self.model} {self.pixels} {self.mesh} x{self.rows} {self.weights}"
        return spelt.translate(str.maketrans({" ": "-", "=": None, ".": None, ",": "-"}))

    @property
    def path(self) -> Path:
        return FOLDER / self.topology.replace(" ", "") / f"{self.name}.json"


SAMPLED = {"UNet": 4, "sampling": 4, "AdvDM": 2, "CGI-DM": 2}
"""Steps whose rows never meet -> rows per device at 512 pixels."""
TRAINED = ("DreamBooth", "Bayesian")
"""Steps that change all weights."""
VARIABLES = {"SPOT search": 8, "SPOT posterior": 1}
"""Steps of causal discovery -> starts or data sets per device, of 100 variables."""


def alone(step: str, topology: str, model: str = "SD 1.5", pixels: int = 512, rows: int | None = None, **more) -> Cell:
    """A step whose rows never meet: they spread over all devices, weights lie on each."""
    devices = chips.TOPOLOGIES[topology].devices
    return Cell(step, model, pixels, topology, f"data={devices}", SAMPLED[step] if rows is None else rows, **more)


def trained(step: str, topology: str, model: str = "SD 1.5", pixels: int = 512, rows: int = 4, fsdp: int = 4) -> Cell:
    """A step of training, weights cut over `fsdp` devices."""
    data = chips.TOPOLOGIES[topology].devices // fsdp
    return Cell(step, model, pixels, topology, f"data={data},fsdp={fsdp}", rows)


def discovering(step: str, topology: str) -> Cell:
    """A step of causal discovery, its starts or data sets over all devices."""
    return Cell(step, steps.GRAPHS, 100, topology, f"data={chips.TOPOLOGIES[topology].devices}", VARIABLES[step])


CELLS = (
    # what must fit: every step of Stable Diffusion 1.5 on v5e, every step of Stable Diffusion XL on v5p
    *(alone(step, "v5e-4") for step in SAMPLED),
    *(trained(step, "v5e-4") for step in TRAINED),
    trained("LoRA", "v5e-4", fsdp=1),
    *(alone(step, "v5p-8", "SDXL", 1024, 1) for step in SAMPLED),
    *(trained(step, "v5p-8", "SDXL", 1024, 1) for step in TRAINED),
    trained("LoRA", "v5p-8", "SDXL", 1024, 1, fsdp=1),
    *(discovering(step, "v5e-4") for step in VARIABLES),
    # more devices of data: the same work on each
    *(alone("UNet", topology) for topology in ("v5e-16", "v5e-256")),
    *(trained("LoRA", topology, fsdp=1) for topology in ("v5e-16", "v5e-256")),
    *(trained("DreamBooth", topology) for topology in ("v5e-16", "v5e-256", "2 x v5e-16")),
    # the state whole on each device: what a posterior adds to it
    *(trained(step, "v5p-8", fsdp=1) for step in ("DreamBooth", "Bayesian", "Bayesian linear")),
    # larger pictures
    *(alone(step, "v5e-4", pixels=1024, rows=1) for step in SAMPLED),
    *(trained("DreamBooth", topology, pixels=1024, rows=1) for topology in ("v5e-4", "v5e-16")),
    trained("LoRA", "v5e-4", pixels=1024, rows=1, fsdp=1),
    *(alone("sampling", topology) for topology in ("v5e-256", "v6e-16", "v5p-128")),
    *(alone(step, topology) for topology in ("v5e-16", "v5e-256") for step in ("AdvDM", "CGI-DM")),
    alone("sampling", "v5e-4", "SDXL", 1024, 1),
    *(trained("DreamBooth", topology) for topology in ("v6e-16", "v5p-8", "v5p-128")),
    *(trained("DreamBooth", topology, "SDXL", 1024, 1) for topology in ("v6e-16", "v5p-128")),
)
"""In order of worth."""


def must_fit(cell: Cell) -> bool:
    """Whether the project promises it: Stable Diffusion 1.5 at 512 pixels on v5e, Stable Diffusion XL on v5p."""
    chip = chips.TOPOLOGIES[cell.topology].chip
    return (cell.model, cell.pixels, chip) == ("SD 1.5", 512, "v5e") or (cell.model, chip) == ("SDXL", "v5p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compile the steps at full size for TPU topologies, without a TPU."""

    only: str = ""
    """Cells whose topology and name contain this."""
    list: bool = False
    """Say which there are, which have a result, and which results are of an older program: traces those, seconds to a minute each."""
    minutes: float = math.inf
    """Begin no further cell after this time."""


def main(cfg: Config) -> None:
    """Compiles what has no result yet, and prints the table of what has."""
    chosen = [cell for cell in CELLS if cfg.only in f"{cell.topology} {cell.name}"]
    began = time.monotonic()
    if not cfg.list:
        for i, cell in enumerate(chosen):
            if (time.monotonic() - began) / 60 >= cfg.minutes:
                break
            print(f"[{i + 1}/{len(chosen)}] {cell.topology}: {cell.name} ... ", end="", flush=True)
            print(measured(cell), flush=True)
    lines = [[cell.topology, cell.name, _state(cell) + (_age(cell) if cfg.list else "")] for cell in chosen]
    print(table(["topology", "cell", "result"], lines))
    for cell in filter(must_fit, missing(chosen)):
        print(f"not compiled yet, must fit: {cell.topology} {cell.name}")
    seconds = round(time.monotonic() - began, 1)
    done = len(chosen) - len(missing(chosen))
    print(json.dumps({"bench": "pod", "cells": len(chosen), "results": done, "seconds": seconds}))


def missing(cells: Sequence[Cell] = CELLS) -> list[Cell]:
    """Cells that have no result."""
    return [cell for cell in cells if not cell.path.is_file()]


def traced(cell: Cell) -> compiled.Lowered:
    """The cell's program as it is now."""
    topology = chips.TOPOLOGIES[cell.topology]
    mesh = parallel.make_mesh(cell.mesh, chips.devices(cell.topology))
    setting = Setting(cell.model, cell.pixels, cell.rows * topology.devices, cell.weights)
    compiler = f"libtpu {importlib.metadata.version('libtpu')} {topology}"
    return compiled.lower(steps.BUILDS[cell.step](setting, mesh), mesh, compiler)


def outdated(cell: Cell) -> bool:
    """Whether the file of a cell is of another program than `traced`."""
    return json.loads(cell.path.read_text())["program"] != traced(cell).digest


def measured(cell: Cell) -> str:
    """Compiles a cell and writes its file, unless that holds the same program already."""
    topology = chips.TOPOLOGIES[cell.topology]
    chip = chips.CHIPS[topology.chip]
    lowered = traced(cell)
    if cell.path.is_file() and json.loads(cell.path.read_text())["program"] == lowered.digest:
        return "has a result"
    found = compiled.measure(lowered, chip, cell.rows, topology.slices)
    rows = [dataclasses.asdict(row) for row in rows_of(cell, found, chip)]
    content = {
        "schema": "dmsec-bench",
        "version": 1,
        "bench": "pod",
        "git": revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions() | {"libtpu": importlib.metadata.version("libtpu")},
        "cell": dataclasses.asdict(cell),
        "devices": topology.devices,
        "limit_gib": chip.memory / chips.GIB,
        "program": lowered.digest,
        "found": found,
        "rows": rows,
        "notes": [] if found["fits"] else [remedy(cell, found, chip)],
    }
    write_json(cell.path, content)
    return f"{found['compile_seconds']:.0f} s, " + _state(cell)


def rows_of(cell: Cell, found: dict, chip: chips.Chip) -> list[Row]:
    """The figures in the form of all benchmarks."""
    case = {"model": cell.model, "pixels": cell.pixels, "topology": cell.topology, "mesh": cell.mesh, "rows": cell.rows}
    row = lambda metric, value, unit: Row(
        bench="pod", metric=metric, value=value, n=1, unit=unit, method=cell.step, case=case
    )
    limit = row("limit_gib", chip.memory / chips.GIB, "GiB")
    if not found["fits"]:
        return [row("peak_gib", found["needed_gib"], "GiB"), limit]
    rows = [
        row("peak_gib", found["peak_gib"], "GiB"),
        limit,
        *(
            row(kind.replace("-", "_"), found["collectives"].get(kind, {"count": 0})["count"], "instructions")
            for kind in (*compiled.KINDS, compiled.SEND)
        ),
    ]
    if "flops" in found:
        rows += [
            row("flops_ratio", found["flops"] / found["flops_analytic"], "compiled / analytic"),
            row("projected_seconds", found["projected_seconds"], "seconds"),
            row("projected_mfu", found["projected_mfu"], "share"),
        ]
    return rows


def remedy(cell: Cell, found: dict, chip: chips.Chip) -> str:
    """What would make a cell fit."""
    cures = []
    if cell.rows > 1:
        cures.append(f"fewer than {cell.rows} rows per device")
    if cell.weights == "float32" and "data" in cell.mesh and "fsdp" not in cell.mesh:
        cures.append("weights kept in bfloat16, or cut over fsdp")
    if "fsdp" in cell.mesh:
        cures.append("a wider fsdp axis")
    larger = [name for name, other in chips.CHIPS.items() if other.memory / chips.GIB > (found["needed_gib"] or 0)]
    cures.append(f"a chip with more memory ({', '.join(larger) or 'none of these'})")
    return "; or ".join(cures)


def _state(cell: Cell) -> str:
    if not cell.path.is_file():
        return "not compiled yet"
    content = json.loads(cell.path.read_text())
    found = content["found"]
    if not found["fits"]:
        return f"does not fit: needs {found['needed_gib']} of {content['limit_gib']:.2f} GiB; {content['notes'][0]}"
    talk = ", ".join(f"{part['count']} {kind}" for kind, part in found["collectives"].items()) or "no collectives"
    ratio = f", {found['flops'] / found['flops_analytic']:.2f} x analytic" if "flops" in found else ""
    return f"{found['peak_gib']:.2f} of {content['limit_gib']:.2f} GiB{ratio}, {talk}"


def _age(cell: Cell) -> str:
    """A word on a result of an older program; nothing where there is no result or no compiler to name."""
    known = cell.path.is_file() and importlib.util.find_spec("libtpu") is not None
    return "; of an OLDER program" if known and outdated(cell) else ""


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
