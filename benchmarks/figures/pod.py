"""What fits where, and what it projects to: the table of the cells that were compiled for TPU topologies."""

import json

from benchmarks.figures import common
from benchmarks.harness import RESULTS
from benchmarks.pod.__main__ import CELLS, Cell, missing, must_fit

FOLDER = RESULTS / "pod"
HEAD = [
    "topology",
    "step",
    "model, pixels",
    "mesh",
    "rows per device",
    "peak of limit (GiB)",
    "TFLOP per device, of analytic",
    "GB moved",
    "collectives (unplanned)",
    "bound by",
    "*projected* rows/s",
    "*projected* MFU",
]


def main() -> None:
    """Puts the table into the README."""
    common.into_readme("pod", table())


def table() -> str:
    """Markdown, in the order of the cells; those without a result are counted, and named where they must fit."""
    found = [(cell, json.loads(cell.path.read_text())) for cell in CELLS if cell.path.is_file()]
    return common.table([HEAD, *(line(cell, content) for cell, content in found)]) + remainder(missing())


def remainder(absent: list[Cell]) -> str:
    """A paragraph on the cells that have no result."""
    if not absent:
        return ""
    counted = f"\n\n{len(CELLS) - len(absent)} of {len(CELLS)} cells are compiled so far."
    promised = [f"{cell.step} ({cell.model}, {cell.topology})" for cell in absent if must_fit(cell)]
    return counted + (f" Not compiled yet, of those that must fit: {', '.join(promised)}." if promised else "")


def line(cell: Cell, content: dict) -> list[str]:
    """One cell."""
    found, limit = content["found"], content["limit_gib"]
    names = [cell.topology, cell.step, f"{cell.model}, {cell.pixels}", cell.mesh, str(cell.rows)]
    if not found["fits"]:
        need = "more" if found["needed_gib"] is None else f"{found['needed_gib']:.1f}"
        return [*names, f"**{need}** of {limit:.2f}", *["-"] * 3, f"does not fit: {content['notes'][0]}", "-", "-"]
    talk = ", ".join(f"{part['count']} {kind}" for kind, part in found["collectives"].items()) or "none"
    beside = f" ({', '.join(found['unplanned'])})" if found["unplanned"] else ""
    peak = f"{found['peak_gib']:.2f} of {limit:.2f}"
    if "flops" not in found:  # loops within loops hide them
        return [*names, peak, "-", "-", talk + beside, "-", "-", "-"]
    rate = cell.rows * content["devices"] / found["projected_seconds"]
    return [
        *names,
        peak,
        f"{found['flops'] / 1e12:.2f}, {found['flops'] / found['flops_analytic']:.2f} x",
        f"{found['bytes'] / 1e9:,.0f}",
        talk + beside,
        found["bound"],
        f"{rate:,.1f}",
        f"{found['projected_mfu']:.0%}",
    ]
