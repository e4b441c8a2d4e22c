"""What is drawn, where tables go, how plots are saved, and how a figure is printed."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import write_atomically

SHARES = ("AUC", "detection_AUC", "TPR", "accuracy", "A-ESR")
"""What metrics that lie in [0, 1] start with."""
TUNERS = {"": "", "full": "full", "lora": "LoRA", "oft": "OFT"}
"""As people write them."""
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MARK = "begin, written by python -m benchmarks.report"
_places = {"root": ROOT}
"""Where blocks and plots go: the repository, or a `shadow`."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Result rows of one set, number of pictures and tuner, "" where nothing was fine-tuned."""

    name: str
    tuner: str
    n0: int
    rows: list[dict]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.n0} pictures{', ' * bool(self.tuner)}{TUNERS[self.tuner]}"

    @property
    def steps(self) -> list[int]:
        return sorted({row["case"]["steps"] for row in self.rows})

    def all(self, metric: str, method: str, **case) -> list[dict]:
        """The rows of this metric, method and case."""
        same = lambda row: (row["metric"], row["method"]) == (metric, method) and case.items() <= row["case"].items()
        return list(filter(same, self.rows))

    def first(self, metric: str, method: str, **case) -> dict | None:
        """The first of them, or None."""
        return (self.all(metric, method, **case) or [None])[0]


def read(
    folder: Path, rows_of: Callable[[list[dict]], list[dict]], names: tuple[str, ...] = ("set", "tuner", "n0")
) -> list[Study]:
    """The newest study of each set, tuner and number of pictures: OpenMoji first, full before LoRA, many pictures before few.

    Args:
        rows_of: the rows of a file that count; none if the file is of another kind.
        names: of the case, what tells studies apart; these three and more.
    """
    newest: dict[tuple, Study] = {}
    for path in sorted(folder.glob("*/*.json"), key=lambda path: path.name):
        key = lambda row: tuple(str(row["case"].get(name, "")) for name in names)
        rows = sorted(rows_of(json.loads(path.read_text())["rows"]), key=key)
        for own, members in itertools.groupby(rows, key):
            newest[own] = Study(own[0], own[1], int(own[2]), list(members))
    require(len(newest) > 0, str(folder), "a folder with results", "none", f"run python -m benchmarks.{folder.name}")
    order = lambda item: (item[0][0] != "openmoji", item[0][0], item[0][1], -item[1].n0, item[0])
    return [study for _, study in sorted(newest.items(), key=order)]


def newest(bench: str) -> list[dict]:
    """Every row of a benchmark's results once: of rows that say the same, the one of the newest file."""
    found = {}
    for path in sorted((RESULTS / bench).glob("*/*.json"), key=lambda path: path.name):
        for row in json.loads(path.read_text())["rows"]:
            found[json.dumps([row["metric"], row["method"], row["case"]], sort_keys=True)] = row
    return list(found.values())


@contextlib.contextmanager
def shadow(folder: Path) -> Iterator[Path]:
    """Lets blocks and plots go to a folder, with a copy of the README that it yields, for the length of a block."""
    shutil.copy(README, folder / README.name)
    _places["root"] = folder
    try:
        yield folder / README.name
    finally:
        _places["root"] = README.parent


def into_readme(bench: str, text: str) -> None:
    """Replaces what stands between the two marks of this benchmark.

    Raises:
        ValueError: if the README lacks them.
    """
    path = _places["root"] / README.name
    end = f"<!-- {bench}: end -->"
    readme = path.read_text()
    begin = re.search(rf"<!-- {bench}: begin[^>]*-->", readme)
    marked = begin is not None and end in readme
    require(marked, str(path), "with both marks of the table", "without", f"add <!-- {bench}: {MARK} --> and {end}")
    after = readme[begin.end() :].partition(end)[2]
    whole = f"{readme[: begin.start()]}<!-- {bench}: {MARK} -->\n{text}\n{end}{after}"
    write_atomically(path, whole.encode())


def save(figure: Figure, path: Path) -> str:
    """Writes an SVG, the same for the same data; returns its place for a link in the README."""
    place = path.relative_to(ROOT)
    target = _places["root"] / place
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(target, format="svg", metadata={"Date": None}, facecolor="white")
    return place.as_posix()


FOLDED = 12
"""A table of more lines opens at a click: what it says stands in the sentences and plots before it."""


def table(lines: list[list[str]], *, fold: bool = True) -> str:
    """Markdown, folded if it is long; the first line is the header."""
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    count = len(lines) - 1
    if not fold or count <= FOLDED:
        return text
    return f"<details><summary>Table, {count} lines</summary>\n\n{text}\n\n</details>"


def number(row: dict | None, *, brief: bool = False, signed: bool = False) -> str:
    """Value and interval; bold where the interval of a difference excludes zero."""
    if row is None or row["value"] is None:
        return "-"
    if brief:
        return f"{row['value']:.2f}"
    sign = "+" if signed else ""
    low, high = row["low"], row["high"]
    if low is None:
        return f"{row['value']:{sign}.2f}"
    if row["metric"].startswith(SHARES) and not signed:  # Student's interval does not know where a share ends
        low, high = max(low, 0.0), min(high, 1.0)
    text = f"{row['value']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
    return f"**{text}**" if signed and (low > 0 or high < 0) else text
