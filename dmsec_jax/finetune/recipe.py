"""One file's worth of choices for a fine-tuning: what `configs/finetune/*.yaml` hold."""

from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import Params
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import adapters, dreambooth, driver
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.lora import InitStyle, lora


@config
class LoRA:
    """See `lora.lora`."""

    rank: int = 4
    alpha: float | None = None  # None: as rank
    targets: str | tuple[str, ...] = "attention"
    init_style: InitStyle = "peft"


@config
class Recipe:
    tune: dreambooth.Config = dreambooth.Config()
    lora: LoRA | None = None  # None: the weights themselves are trained
    patterns: tuple[str, ...] = ()  # without LoRA: which leaves, as regular expressions over their paths; none: all
    chunk_steps: int = 25
    save_every: int = 0


def check(recipe: Recipe, params: Params, schedule: ScheduleConfig) -> None:
    """Refuses what would fail later; `params` may be `jax.eval_shape` results.

    Raises:
        ValueError: on what `dreambooth.check`, `driver.require_chunks` and `adapter_of` refuse, and on layers that the
            adapter does not find or fit.
    """
    dreambooth.check(recipe.tune, schedule)
    driver.require_chunks(recipe.chunk_steps, recipe.save_every)
    adapters.count(adapter_of(recipe), params)


def adapter_of(recipe: Recipe) -> Adapter:
    """The adapter that a recipe names. Keep it: a new one compiles anew.

    Raises:
        ValueError: on patterns beside LoRA, and what `lora.lora` refuses.
    """
    if recipe.lora is None:
        return adapters.full(recipe.patterns or None)
    require(not recipe.patterns, "patterns", "empty with LoRA", recipe.patterns, "name the layers in lora.targets")
    chosen = recipe.lora
    return lora(chosen.rank, chosen.alpha, chosen.targets, chosen.init_style)
