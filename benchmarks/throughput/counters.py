"""Work counted in a traced program, and memory of a compiled one: nothing is run."""

import math
from typing import Any

from jax.interpreters import partial_eval


def flops(closed: Any) -> float:
    """Floating-point operations of the matrix products and convolutions that a traced program's results need (see `products`)."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return products(jaxpr)


def peak_bytes(memory: Any) -> int:
    """What a compiled program holds at most: arguments, results where they are others, and temporaries, of its `memory_analysis`."""
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return sum(sizes) - memory.alias_size_in_bytes


def products(jaxpr: Any) -> float:
    """Floating-point operations of all matrix products and convolutions, a multiplication and an addition as two; loops times their length.

    Of branches the cheapest counts: what a platform does beyond it is its own way of being fast. A `while` loop counts once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, inside = eqn.primitive.name, [part for value in eqn.params.values() for part in _programs(value)]
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * eqn.outvars[0].aval.size
        elif kind == "conv_general_dilated":
            out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
            kernel = eqn.invars[1].aval
            total += 2 * kernel.size / kernel.shape[out_axis] * eqn.outvars[0].aval.size
        elif kind == "cond":
            total += min(products(branch) for branch in inside)
        elif kind == "scan":
            total += eqn.params["length"] * sum(map(products, inside))
        else:
            total += sum(map(products, inside))
    return total


def _programs(value: Any) -> list[Any]:
    """Programs in a parameter of an operation."""
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return _programs(value.jaxpr)
    if isinstance(value, tuple | list):
        return [program for part in value for program in _programs(part)]
    return []
