"""All rows, by name."""

import fnmatch
from collections.abc import Callable, Iterator

from benchmarks.throughput import discovery, methods, networks, others, training
from benchmarks.throughput.cases import Case


def every(batches: tuple[int, ...]) -> Iterator[tuple[str, str, int, Callable[[], Case]]]:
    """(op, shape, batch, builder) of every row."""
    for part in (networks, methods, training, others, discovery):
        yield from part.every(batches)


def chosen(
    patterns: tuple[str, ...], batches: tuple[int, ...], *, quick: bool = False
) -> dict[str, Callable[[], Case]]:
    """Name -> builder of the rows whose `op/shape/batch` fits a pattern; without patterns all but Stable Diffusion's, if quick of no middle size."""
    left_out = ("sd15", "middle") if quick else ("sd15",)
    found = {}
    for op, shape, batch, build in every(batches):
        name = f"{op}/{shape}/{batch}"
        asked = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        if asked or (not patterns and shape not in left_out):
            found[name] = build
    return found
