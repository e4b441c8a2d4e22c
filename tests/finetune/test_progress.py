import io

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dmsec_jax.finetune.dreambooth import Info, State
from dmsec_jax.finetune.progress import progress_bar


def test_shows_steps_loss_and_speed():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    info = Info(*[np.full(25, 0.1234)] * 5)
    state = State({}, (), None, jnp.int32(0))
    with progress_bar(100, 4, console) as on_chunk:
        on_chunk(25, info, state)
        first = len(text.getvalue())
        on_chunk(50, info, state)
    assert "pictures/s" not in text.getvalue()[:first]
    last = text.getvalue()[first:]
    for part in ("fine-tuning", "50/100", "loss 0.1234", "pictures/s"):
        assert part in last
