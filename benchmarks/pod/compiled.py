"""One cell: a step compiled for a topology, and what the compiled program says of itself."""

import collections
import hashlib
import math
import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from benchmarks.pod.chips import GIB, Chip
from benchmarks.pod.steps import Program
from dmsec_jax.core.checks import require

OPTIONS = {"exec_time_optimization_effort": -1.0}
"""A tenth of the compile time; less is fused, so memory and bytes are upper bounds."""
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SEND = "send"
"""What a device gives to another slice: there the compiler hands over to the hosts, and groups of the collectives are within a slice."""
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join((*KINDS, SEND))})(?:-start)?\((.*)")
ARRAY = re.compile(r"\b(?:pred|[suf](\d+)|bf(16)|f8\w*)\[([\d,]*)\]")
GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<size>\d+)\]|\{\{(?P<members>[\d,]+)\}|mesh\[(?P<mesh>[^\]]*)\][^{]*\{(?P<axes>[^}]*)\})"
)
TOO_LARGE = re.compile(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMGT])")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
LOOP_BODY = re.compile(r"body=%?([\w.\-]+)")


class Lowered(NamedTuple):
    """A step before it is compiled."""

    program: Program
    lowered: jax.stages.Lowered
    digest: str
    """Of its text and of what compiles it."""


def lower(program: Program, mesh: Mesh, compiler: str) -> Lowered:
    """Traces a step for the devices of a mesh."""
    options = {} if program.out_shardings is None else {"out_shardings": program.out_shardings}
    with jax.set_mesh(mesh):
        # what a step is given lies on the device, read or not: the base model beside a copy of it that is trained
        jitted = jax.jit(program.run, donate_argnums=program.donated, keep_unused=True, **options)
        lowered = jitted.lower(*program.args)
    text = "\n".join([compiler, str(sorted(OPTIONS.items())), str(mesh.shape), lowered.as_text()])
    return Lowered(program, lowered, hashlib.sha256(text.encode()).hexdigest())


def measure(step: Lowered, chip: Chip, examples: float, slices: int = 1) -> dict[str, Any]:
    """Compiles, and reads off everything; `examples` are those of one device.

    A program that does not fit is refused by the compiler: then only what it would need is known.
    """
    began, spent = time.monotonic(), time.process_time()
    try:
        compiled = step.lowered.compile(compiler_options=OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "needed_gib": needed(str(error)), "compile_seconds": time.monotonic() - began}
    seconds, spent = time.monotonic() - began, time.process_time() - spent
    text, memory = compiled.as_text(), compiled.memory_analysis()
    found = collectives(text)
    gib = lambda name: getattr(memory, f"{name}_in_bytes") / GIB
    return {
        "fits": True,
        "compile_seconds": seconds,
        "compile_cpu_seconds": spent,
        "peak_gib": gib("peak_memory"),
        "arguments_gib": gib("argument_size"),
        "outputs_gib": gib("output_size"),
        "aliased_gib": gib("alias_size"),
        "temporaries_gib": gib("temp_size"),
        "collectives": found,
        "unplanned": sorted(found.keys() - step.program.plan - ({SEND} if slices > 1 else set())),
        "kernels": text.count("tpu_custom_call"),
        **(projection(step.program, compiled.cost_analysis(), found, chip, examples) if step.program.work else {}),
    }


def projection(
    program: Program, cost: dict[str, float], found: dict[str, dict[str, float]], chip: Chip, examples: float
) -> dict[str, Any]:
    """What is computed and moved, by the compiler and by hand, and the time that the slowest of a chip's peaks gives it."""
    work, repeats = program.work, program.repeats
    flops = (cost["flops"] + work.hidden * examples) * repeats
    sent = {kind: part["bytes"] * repeats for kind, part in found.items()}
    moved, between = cost["bytes accessed"] * repeats, sent.pop(SEND, 0.0)
    times = {
        "products": flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sum(sent.values()) / chip.links,
        "network": between / chip.network,
    }
    slowest = max(times.values())
    return {
        "flops": flops,
        "flops_analytic": (work.visible + work.hidden) * examples * repeats,
        "flops_useful": work.useful * examples * repeats,
        "bytes": moved,
        "seconds": times,
        "bound": max(times, key=times.get),
        "projected_seconds": slowest,
        "projected_mfu": work.useful * examples * repeats / slowest / chip.flops,
    }


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Kind -> how many there are and the bytes that one device sends for them, as a ring does."""
    found = collections.defaultdict(lambda: {"count": 0, "bytes": 0.0})
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            result, kind, rest = match.groups()
            size = sum(map(_bytes, ARRAY.finditer(result)))
            found[kind]["count"] += 1
            found[kind]["bytes"] += size * _factor(kind, rest, asynchronous=f"{kind}-start(" in line)
    return dict(found)


def in_loops(text: str) -> set[str]:
    """Kinds of the collectives that a loop's body holds, which are run once per iteration."""
    bodies, found, inside = set(LOOP_BODY.findall(text)), set(), False
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            inside = match[1] in bodies
        elif inside and (match := COLLECTIVE.search(line)):
            found.add(match[2])
    return found


def _factor(kind: str, rest: str, asynchronous: bool) -> float:
    """What one device sends, over the size of what the instruction gives."""
    if kind == SEND:
        return 1.0
    if kind == "collective-permute":
        return 0.5 if asynchronous else 1.0  # the start gives its operand, too
    n = together(rest)
    if kind == "all-gather" and asynchronous:  # gives its operands, too
        return (n - 1) / (n + 1)
    return {"all-reduce": 2 / n, "reduce-scatter": 1.0}.get(kind, 1 / n) * (n - 1)


def together(text: str) -> int:
    """How many devices take part in a collective, by its groups: [groups, size], a list of members, or axes of a mesh.

    Raises:
        ValueError: if they are spelt in another way.
    """
    match = GROUPS.search(text)
    require(match is not None, "replica_groups", "of a known form", text[:200], "teach `compiled.together` that form")
    if match["size"]:
        return int(match["size"])
    if match["members"]:
        return match["members"].count(",") + 1
    sizes = dict(part.split("=") for part in match["mesh"].split(","))
    return math.prod(int(sizes[axis]) for axis in match["axes"].split(","))


def needed(message: str) -> float | None:
    """GiB that the compiler says it would take."""
    match = TOO_LARGE.search(message)
    return None if match is None else float(match[1]) * {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}[match[2]]


def _bytes(match: re.Match) -> int:
    bits = int(match[1] or match[2] or 8)
    return math.prod(int(n) for n in match[3].split(",") if n) * bits // 8
