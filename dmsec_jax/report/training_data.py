"""How a fine-tuning went, for the reports that show it."""

import dataclasses

import numpy as np
from jaxtyping import Float

from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.finetune.monitor import Measures


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sheet:
    """Samples of the model after `step` steps: [K, H, W, 3] in [-1, 1]."""

    step: int
    samples: Float[AnyArray, "K H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """Loss per step [T] (NaN where it was not finite or not kept) and samples along the way, by rising step.

    `first_step` is the step that `loss[0]` belongs to, for a run that was resumed; `measures` say where the model stood, by rising step.
    """

    loss: Float[AnyArray, "T"]
    sheets: tuple[Sheet, ...] = ()
    first_step: int = 1
    measures: tuple[Measures, ...] = ()

    def __post_init__(self):
        steps = [sheet.step for sheet in self.sheets]
        require(steps == sorted(set(steps)), "sheets", "in the order of their steps", steps, "sort them")

    @property
    def last_loss(self) -> float:
        """Mean of the finite losses among the last tenth of the steps; NaN if there are none."""
        loss = np.asarray(self.loss)
        tail = loss[-max(1, len(loss) // 10) :]
        tail = tail[np.isfinite(tail)]
        return float(tail.mean()) if tail.size else float("nan")
