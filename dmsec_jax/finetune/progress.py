"""A progress bar for `driver.fit`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dmsec_jax.finetune.driver import OnChunk


@contextmanager
def progress_bar(num_steps: int, pictures_per_step: int, console: Console | None = None) -> Iterator[OnChunk]:
    """Yields the `on_chunk` that draws steps, mean loss and pictures/s of the last chunk, and the time left.

    The first chunk compiles, so the speed is shown from the second on.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    before = None
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("fine-tuning", total=num_steps, figures="compiling")

        def on_chunk(done: int, info: Any, state: Any) -> None:
            nonlocal before
            now = time.monotonic()
            figures = f"loss {float(np.mean(info.loss)):.4f}"
            if before is not None:
                figures += f", {len(info.loss) * pictures_per_step / max(now - before, 1e-9):.1f} pictures/s"
            before = now
            bar.update(task, completed=done, figures=figures)

        yield on_chunk
