"""Floor 6, protection against a model that has begun to learn: the attacked model is itself fine-tuned on the pictures, as an imitator would.

Le, Phung, Nguyen, Dao, Tran, Tran, "Anti-DreamBooth: Protecting Users from Personalized Text-to-image Synthesis", ICCV 2023, arXiv 2303.15433.

    FSMG   the model is fine-tuned on the clean pictures, then stays as it is while they are attacked   (Sec. 4.2)
    ASPL   fine-tuning and attack alternate, `rounds` times   (Sec. 4.3):
           1. a copy of the model learns from the clean pictures for a few steps;
           2. the attack goes on against that copy;
           3. the model learns from the pictures as they are now.

Deviations: the public code trains on a clean set A and attacks a set B of the same person; here, where an artist has one set, A is B before the
attack. There is no prior preservation, and the text encoder stays as it is. The models learn from tiles of the model's size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmsec_jax import pipeline
from dmsec_jax.core import spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray
from dmsec_jax.finetune import adapters, dreambooth
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.pipeline import Pipeline

Tiles = Float[AnyArray, "N side side C"]
Params = dict[str, Any]
TrainFn = Callable[[jax.Array, Any, Tiles, int], Any]
"""(key, training state, pictures, steps) -> training state; the given one stays usable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surrogate:
    """How the attacked model learns.

    Attributes:
        prompt: of the pictures.
        steps: FSMG: of the fine-tuning.
        learning_rate, batch_size: of both.
        train_steps, attack_steps: ASPL: of each training and of the attack, in a round.
    """

    prompt: str
    steps: int = 400
    learning_rate: float = 1e-4
    batch_size: int = 4
    train_steps: int = 3
    attack_steps: int = 6

    def __post_init__(self):
        for name in ("steps", "batch_size", "train_steps", "attack_steps"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name), "raise it")


def alternate(
    key,
    attack: Any,
    main: Any,
    clean: Tiles,
    rounds: int,
    *,
    train_fn: TrainFn,
    attack_fn: Callable[[Any, Any], Any],
    attacked_fn: Callable[[Any], Tiles],
    train_steps: int,
) -> Any:
    """ASPL: the state of the attack after `rounds` rounds.

    Args:
        attack, main: states of the attack and of the model's training.
        attack_fn: (attack, training state) -> attack, some steps on.
        attacked_fn: attack -> the pictures as they are.
    """
    for i in range(rounds):
        key_copy, key_main = jax.random.split(jax.random.fold_in(key, i))
        copy = train_fn(key_copy, main, clean, train_steps)
        attack = attack_fn(attack, copy)
        main = train_fn(key_main, main, attacked_fn(attack), train_steps)
    return attack


def fsmg(key, base: Pipeline, tiles: Tiles, surrogate: Surrogate) -> Params:
    """The network to attack, fine-tuned on the clean tiles: in place of `params["unet"]`."""
    return _train(key, _start(base, surrogate), tiles, surrogate.steps, base, surrogate).trainable


def aspl(base: Pipeline, surrogate: Surrogate, *, begin_fn: Callable, advance_fn: Callable) -> Callable:
    """The attack that alternates, as `protection.protect` takes it; give it all tiles of all pictures as one batch, it cuts them itself.

    It takes `settings.steps` rounded up to whole rounds.

    Args:
        begin_fn, advance_fn: `protection.begin` and `protection.advance`.
    """

    def attack_fn(key, model, settings, progress, rows: dict) -> tuple[np.ndarray]:
        count, rounds = len(rows["index"]), -(-settings.steps // surrogate.attack_steps)
        parts = _parts(rows, min(settings.batch_size, count))

        def attack(states: list, learnt: dreambooth.State) -> list:
            harder = model._replace(params={**model.params, "unet": learnt.trainable})
            on = lambda part, state: advance_fn(key, harder, settings, part, state, surrogate.attack_steps)
            states = [on(part, state) for part, state in zip(parts, states, strict=True)]
            progress(count / rounds)
            return states

        changes = lambda states: np.concatenate([state.attack.delta for state in states])[:count]
        last = alternate(
            jax.random.fold_in(key, rounds),
            [begin_fn(key, model, settings, part) for part in parts],
            _start(base, surrogate),
            rows["image"],
            rounds,
            train_fn=functools.partial(_train, base=base, surrogate=surrogate),
            attack_fn=attack,
            attacked_fn=lambda states: np.asarray(rows["image"]) + changes(states),
            train_steps=surrogate.train_steps,
        )
        return (changes(last),)

    return attack_fn


def _parts(rows: dict, size: int) -> list[dict]:
    return [
        {name: jnp.asarray(part)[index] for name, part in rows.items()}
        for index, _ in spread.batches(len(rows["index"]), size)
    ]


_FULL = adapters.full()
_run = jax.jit(dreambooth.run, static_argnames=("eps_fn", "adapter", "num_steps"))


def _tune(surrogate: Surrogate) -> dreambooth.Config:
    return dreambooth.Config(num_steps=1, batch_size=surrogate.batch_size, learning_rate=surrogate.learning_rate)


def _start(base: Pipeline, surrogate: Surrogate) -> dreambooth.State:
    return dreambooth.init(jax.random.key(0), base.params["unet"], _tune(surrogate), adapter=_FULL)


def _train(key, state: dreambooth.State, tiles: Tiles, steps: int, base: Pipeline, surrogate: Surrogate):
    """`steps` steps on tiles of one or three channels; the given state stays usable."""
    pictures = np.broadcast_to(np.asarray(tiles, np.float32), (*tiles.shape[:3], 3))
    mean, logvar = pipeline.encode(base, np.clip(pictures, -1, 1))
    data = Data(examples(mean, pipeline.contexts(base, [surrogate.prompt]), logvar))
    options = {"eps_fn": base.functions.predict_fn, "adapter": _FULL, "schedule": base.schedule, "num_steps": steps}
    state, info = _run(key, state, data, base.params["unet"], _tune(surrogate), **options)
    finite = bool(jax.device_get(info.finite).all())
    require(finite, "loss of the surrogate", "finite", "NaN", "lower the learning rate")
    return state
