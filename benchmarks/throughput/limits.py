"""What a machine can do at most, and what binds a row.

Two limits, as in the roofline model (Williams, Waterman, Patterson 2009): the operations of a step over the rate of a large matrix product, and the
bytes of a step over the rate of a large sum of arrays. A row is bound by

    products    if the first is at least half of its time,
    memory      else if the second is,
    overheads   else: many small operations, threads that wait, what is done outside of the program

Operations are those of matrix products and convolutions, counted in the traced program. Bytes are XLA's count of what each operation of the compiled
program reads and writes, whether a cache or the memory serves it, so the second share may exceed one; that is why products are asked first. XLA
counts the body of a loop once: of a program that is a loop over steps, as those of the methods are, its figures are of one step and of what is done
once. Where they have fewer operations than the traced program, there are loops inside a step, and bytes are a lower bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput import timing

SIDE = 1024
"""Of the square matrices."""
LENGTH = 2**25
"""Numbers of each array of the sum: 128 MiB, more than caches hold."""
LEAST = 0.5
"""Share of the time that a limit must explain to be what binds."""


class Peaks(NamedTuple):
    """GFLOP/s of matrix products on both sides, and GB/s of memory, each by clock: `wall` and `cpu`."""

    ours: dict[str, float]
    torch: dict[str, float]
    memory: dict[str, float]

    def products(self, clock: str) -> float:
        """The machine's: the better of both sides."""
        return max(self.ours[clock], self.torch[clock])


def measured() -> Peaks:
    """Times both; PyTorch is imported here."""
    from benchmarks.torch_baselines.networks import whole

    square = np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)
    ours, theirs, product = jnp.asarray(square), whole(square), jax.jit(jnp.matmul)
    flops = 2 * SIDE**3
    return Peaks(
        timing.peak(lambda: jax.block_until_ready(product(ours, ours)), flops),
        timing.peak(lambda: theirs @ theirs, flops),
        timing.peak(*_triad()),
    )


def _triad():
    """(what adds a multiple of one array to another in place, bytes that it reads and writes)."""
    add = jax.jit(lambda total, part: total + 0.5 * part, donate_argnums=0)
    held = [jnp.zeros(LENGTH), jnp.ones(LENGTH)]

    def run():
        held[0] = jax.block_until_ready(add(*held))

    return run, 3 * 4 * LENGTH


def bound(products: float, memory: float) -> str:
    """By the shares of a row's time that each limit explains; see above."""
    if products >= LEAST:
        return "products"
    return "memory" if memory >= LEAST else "overheads"
