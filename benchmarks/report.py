"""`python -m benchmarks.report`: every figure in the README, from the committed results; `--check` changes nothing and fails where one differs.

The README has blocks, `<!-- NAME: begin, ... -->` to `<!-- NAME: end -->`; `benchmarks.figures.NAME` writes each, with its plots. In a section that
has a block, prose holds no digit outside of it (conditions are words; code and links may have any): a figure that nobody generates grows old
unseen.
"""

import dataclasses
import importlib
import re
import sys
import tempfile
from pathlib import Path

import tyro

from benchmarks.figures import common
from dmsec_jax.core.checks import require

BLOCK = re.compile(r"<!-- (\w+): begin[^>]*-->\n.*?<!-- \1: end -->", re.DOTALL)
FREE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|\barXiv[: ]\d+\.\d+|^#+ .*?$", re.DOTALL | re.MULTILINE)
"""Where digits may stand: code, links, comments, numbers of papers, headings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The README's figures."""

    check: bool = False
    """Change nothing; say which blocks and plots differ from what the results give."""


def main(cfg: Config) -> int:
    """1 if something differs under `--check`, or if prose has digits."""
    if not cfg.check:
        draw()
    differing = stale() if cfg.check else []
    wrong = [f"{name} is not what the results give: run python -m benchmarks.report" for name in differing]
    wrong += [f"a digit in prose: {line}" for line in typed(common.README.read_text())]
    print("\n".join(wrong) or "every figure in README.md is generated, and is what the results give")
    return int(bool(wrong))


def blocks(readme: str) -> dict[str, str]:
    """Name -> block, with its marks."""
    return {found[1]: found[0] for found in BLOCK.finditer(readme)}


def draw() -> None:
    """Writes every block that the README has, and its plots."""
    names = list(blocks(common.README.read_text()))
    require(len(names) > 0, str(common.README), "with marks of blocks", "without", "add <!-- NAME: begin --> and end")
    for name in names:
        importlib.import_module(f"benchmarks.figures.{name}").main()


def stale() -> list[str]:
    """Blocks and plots that differ from what the results give."""
    root = common.README.parent
    with tempfile.TemporaryDirectory() as folder, common.shadow(Path(folder)) as copy:
        draw()
        now, then = (blocks(path.read_text()) for path in (copy, common.README))
        wrong = [name for name in then if now[name] != then[name]]
        for plot in sorted(Path(folder).rglob("*.svg")):
            name = plot.relative_to(folder)
            if not (root / name).is_file() or (root / name).read_bytes() != plot.read_bytes():
                wrong.append(name.as_posix())
    return wrong


def typed(readme: str) -> list[str]:
    """Lines of prose with digits in sections that have a block."""
    found = []
    for section in re.split(r"^(?=## )", readme, flags=re.MULTILINE):
        if BLOCK.search(section):
            prose = FREE.sub("", BLOCK.sub("", section))
            found += [line.strip() for line in prose.splitlines() if re.search(r"\d", line)]
    return found


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
