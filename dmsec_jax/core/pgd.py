"""Projected gradient ascent inside a ball and a box, each example on its own: batching never changes a result.

    velocity = momentum velocity + g / mean |g|                        (Dong et al. 2018, Eq. 6; the mean in place of the sum)
    delta    = clip_box(x + project(delta + a_i direction(velocity))) - x

Norms are over all axes but the first. What is ascended is the caller's: a gradient function returns the gradient, averaged over as many
Monte-Carlo draws as it likes; to descend, negate it. Sizes are `Budget`s, a number with its unit, so that the factor 2 between [0, 1] and
[-1, 1] cannot be forgotten.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dmsec_jax.core.arrays import expand
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import AnyArray, Key

Norm = Literal["l2", "linf"]
Size = float | Float[Array, ""] | Float[Array, "B"]
Unit = Literal["8bit", "01", "pm1", "latent"]
"""Levels of 0..255, of [0, 1], of [-1, 1], or of latents, which have no fixed relation to pixels."""

_PM1 = {"8bit": 2 / 255, "01": 2.0, "pm1": 1.0}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("unit",))
@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """A size and what it counts; `Budget(8, "8bit") == Budget(8 / 255, "01") == Budget(16 / 255, "pm1")`.

    In a config `value` is traced, `unit` is static.
    """

    value: float
    unit: Unit

    __no_type_check__ = True  # jax rebuilds it with tracers where the float stood

    def to(self, unit: Unit) -> Size:
        """The value in another unit.

        Raises:
            ValueError: between pixels and latents, and on an unknown unit.
        """
        if unit == self.unit:
            return self.value
        known = unit in _PM1 and self.unit in _PM1
        require(
            known,
            "unit",
            f"one of {', '.join(_PM1)} for a budget of pixels",
            f"{self.unit} to {unit}",
            "state it in that unit",
        )
        return self.value * (_PM1[self.unit] / _PM1[unit])

    def _canonical(self) -> tuple[str, float]:
        return ("latent", self.value) if self.unit == "latent" else ("8bit", round(self.to("8bit"), 9))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and self._canonical() == other._canonical()

    def __hash__(self) -> int:
        return hash(self._canonical())


@config
class Config:
    """How far, in which steps.

    budget: radius of the ball, in the norm; the value a number or [B].
    step_size: of the first step, in the norm.
    decay: size of the last step over that of the first, linear between; 1 keeps it.
    momentum: share of the accumulated gradient that is kept; 0 keeps none.
    start: zero, or uniform in the ball.
    unit: of x and of the box.
    low, high: the box, which holds x.
    """

    budget: Budget = Budget(8.0, "8bit")
    step_size: Budget = Budget(2.0, "8bit")
    num_steps: int = 40
    norm: Norm = "linf"
    decay: float = 1.0
    momentum: float = 0.0
    start: Literal["zero", "random"] = "zero"
    unit: Unit = "pm1"
    low: float = -1.0
    high: float = 1.0


class State(NamedTuple):
    delta: Float[Array, "B ..."]
    velocity: Float[Array, "B ..."]
    i: Int[Array, ""]
    """Steps done."""


class Info(NamedTuple):
    """Per example, of one step; `advance` stacks steps in front."""

    gradient_norm: Float[Array, "... B"]
    finite: Bool[Array, "... B"]
    """Whether the gradient was; where not, it counted as zero."""


GradientFn = Callable[[Key, Float[Array, "B ..."]], tuple[Float[Array, "B ..."], Any]]
"""(key of the step, x + delta) -> (gradient to ascend, anything to report)."""


def norm(x: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """Euclidean norm of each example."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))


def direction(gradient: Float[Array, "B ..."], kind: Norm) -> Float[Array, "B ..."]:
    """Steepest ascent of unit size in the norm: gradient / |gradient|_2, or its sign; zero where the gradient is zero.

    Raises:
        ValueError: on another kind of norm.
    """
    if kind == "l2":
        size = expand(norm(gradient), gradient)
        return gradient / jnp.where(size > 0, size, 1.0)
    if kind == "linf":
        return jnp.sign(gradient)
    raise _no_norm(kind)


def project(delta: Float[Array, "B ..."], radius: Size, kind: Norm) -> Float[Array, "B ..."]:
    """The nearest point of the ball of that radius around zero.

    Raises:
        ValueError: on another kind of norm.
    """
    radius = expand(jnp.asarray(radius, delta.dtype), delta)
    if kind == "l2":
        size = expand(norm(delta), delta)
        return delta * jnp.minimum(1.0, radius / jnp.maximum(size, jnp.finfo(delta.dtype).tiny))
    if kind == "linf":
        return jnp.clip(delta, -radius, radius)
    raise _no_norm(kind)


def random_in_ball(
    key: Key, index: Int[AnyArray, "B"], shape: tuple[int, ...], radius: Size, kind: Norm
) -> Float[Array, "B ..."]:
    """Uniform in the ball, [B, *shape] float32; row j depends on `key` and `index[j]` alone.

    Raises:
        ValueError: on another kind of norm.
    """
    count = math.prod(shape)

    def one(j):
        key_direction, key_size = jax.random.split(jax.random.fold_in(key, j))
        if kind == "linf":
            return jax.random.uniform(key_direction, (count,), minval=-1.0, maxval=1.0)
        if kind == "l2":
            away = jax.random.normal(key_direction, (count,))
            return away / jnp.linalg.norm(away) * jax.random.uniform(key_size) ** (1 / count)
        raise _no_norm(kind)

    drawn = jax.vmap(one)(jnp.asarray(index)).reshape(-1, *shape)
    return expand(jnp.asarray(radius, drawn.dtype), drawn) * drawn


def init(
    key: Key, x: Float[AnyArray, "B ..."], mask: Float[AnyArray, "..."], index: Int[AnyArray, "B"], cfg: Config
) -> State:
    """Where the ascent begins: at x, or at random as `cfg.start` says.

    Args:
        mask: broadcasts to x; 0 where x must not change, else 1.
        index: global indices of the examples, for the random start.
    """
    delta = jnp.zeros_like(x)
    if cfg.start == "random":
        drawn = random_in_ball(key, index, x.shape[1:], cfg.budget.to(cfg.unit), cfg.norm)
        delta = in_box(x, drawn * mask, cfg)
    return State(delta, jnp.zeros_like(delta), jnp.int32(0))


def step(
    key: Key,
    state: State,
    x: Float[AnyArray, "B ..."],
    mask: Float[AnyArray, "..."],
    cfg: Config,
    *,
    gradient_fn: GradientFn,
) -> tuple[State, Info, Any]:
    """One step of all examples; the last value is what `gradient_fn` reported at the point before it."""
    gradient, report = gradient_fn(key, x + state.delta)
    size = norm(gradient)
    finite = jnp.isfinite(size)
    gradient = jnp.where(expand(finite, gradient), gradient, 0.0) * mask
    scale = jnp.mean(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))
    scale = expand(jnp.where(scale > 0, scale, 1.0), gradient)
    velocity = cfg.momentum * state.velocity + gradient / scale
    share = jnp.minimum(state.i / max(cfg.num_steps - 1, 1), 1.0)  # whoever goes on stays at the last length
    step_size = cfg.step_size.to(cfg.unit) * (1 + (cfg.decay - 1) * share)
    moved = state.delta + expand(jnp.asarray(step_size), velocity) * direction(velocity, cfg.norm)
    delta = in_box(x, project(moved, cfg.budget.to(cfg.unit), cfg.norm), cfg)
    return State(delta, velocity, state.i + 1), Info(size, finite), report


def advance(
    key: Key,
    state: State,
    x: Float[AnyArray, "B ..."],
    mask: Float[AnyArray, "..."],
    cfg: Config,
    *,
    gradient_fn: GradientFn,
    num_steps: int,
) -> tuple[State, Info, Any]:
    """`num_steps` on from a state as one `scan`; step i uses fold_in(key, i), so pieces give what one run gives."""

    def body(state, i):
        state, info, report = step(jax.random.fold_in(key, i), state, x, mask, cfg, gradient_fn=gradient_fn)
        return state, (info, report)

    state, (info, report) = jax.lax.scan(body, state, state.i + jnp.arange(num_steps))
    return state, info, report


def in_box(x: Float[AnyArray, "B ..."], delta: Float[Array, "B ..."], cfg: Config) -> Float[Array, "B ..."]:
    """`delta` shortened entry by entry so that x + delta lies in the box; it stays in the ball, since x is in the box."""
    return jnp.clip(x + delta, cfg.low, cfg.high) - x


def _no_norm(kind: object) -> ValueError:
    return fail("norm", "l2 or linf", repr(kind), "choose one of them")
