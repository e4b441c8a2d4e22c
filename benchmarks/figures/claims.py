"""What the papers say and whether the direction holds here."""

from benchmarks import claims
from benchmarks.figures import common


def main() -> None:
    """Puts the table into the README."""
    common.into_readme("claims", table())


def table() -> str:
    """Markdown: one line per claim."""
    lines = [["paper", "says", "measured here", "on", "cases; differences", "holds", "command"]]
    for claim, found in claims.verdicts():
        on = ", ".join(found.on) or "-"
        lines.append(
            [claim.paper, claim.says, claim.measured, on, claims.counted(found), found.holds, f"`{claim.command}`"]
        )
    return common.table(lines, fold=False)
