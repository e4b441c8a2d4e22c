"""What fits where, and what it projects to: the table of the cells that were compiled for TPU topologies."""

import json

from benchmarks.figures import common
from benchmarks.harness import RESULTS
from benchmarks.pod.__main__ import CELLS, Cell

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
    """Markdown, in the order of the cells; those without a result are counted."""
    found = [(cell, json.loads(cell.path.read_text())) for cell in CELLS if cell.path.is_file()]
    missing = "" if len(found) == len(CELLS) else f"\n\n{len(found)} of {len(CELLS)} cells are compiled so far."
    return common.table([HEAD, *(line(cell, content) for cell, content in found)]) + missing


def line(cell: Cell, content: dict) -> list[str]:
    """One cell."""
    found, limit = content["found"], content["limit_gib"]
    names = [cell.topology, cell.step, f"{cell.model}, {cell.pixels}", cell.mesh, str(cell.rows)]
    if not found["fits"]:
        need = "more" if found["needed_gib"] is None else f"{found['needed_gib']:.1f}"
        return [*names, f"**{need}** of {limit:.2f}", *["-"] * 3, f"does not fit: {content['notes'][0]}", "-", "-"]
    ratio = found["flops"] / found["flops_analytic"]
    talk = ", ".join(f"{part['count']} {kind}" for kind, part in found["collectives"].items()) or "none"
    beside = f" ({', '.join(found['unplanned'])})" if found["unplanned"] else ""
    rate = cell.rows * content["devices"] / found["projected_seconds"]
    return [
        *names,
        f"{found['peak_gib']:.2f} of {limit:.2f}",
        f"{found['flops'] / 1e12:.2f}, {ratio:.2f} x",
        f"{found['bytes'] / 1e9:,.0f}",
        talk + beside,
        found["bound"],
        f"{rate:,.1f}",
        f"{found['projected_mfu']:.0%}",
    ]
