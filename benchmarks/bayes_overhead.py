"""`python -m benchmarks.bayes_overhead`: what a posterior adds to a training step, in time and in compiled memory."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.throughput.shapes import MIDDLE
from dmsec_jax import pipeline, tuning
from dmsec_jax.core import config
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import examples
from dmsec_jax.models import presets, unet
from dmsec_jax.report.result import Row

Shape = Literal["embedded", "middle", "sd15"]
CONFIGS = {"embedded": lambda: pipeline.load().configs, "middle": lambda: presets.SD15, "sd15": lambda: presets.SD15}
SIDES = {"embedded": 8, "middle": 32, "sd15": 64}
TOKENS = {"embedded": 24, "middle": 77, "sd15": 77}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Overhead benchmark."""

    shapes: tuple[Shape, ...] = ("embedded", "middle", "sd15")
    """Networks with random weights: the embedded model's, one of 29 million weights at 32 x 32 latents, Stable Diffusion 1.5's at 64 x 64."""
    compiled_only: tuple[Shape, ...] = ("sd15",)
    """Of these the memory is looked at, and no step is run."""
    selections: tuple[str, ...] = ("norm", "linear")
    generators: tuple[str, ...] = ("threefry2x32", "rbg")
    activations: tuple[str, ...] = ("linear",)
    """Selections whose noise is drawn in the outputs of their layers too (local reparameterisation)."""
    batch_size: int = 4
    rounds: int = 30
    """Each variant is timed once a round, in an order that is shuffled anew, so that a machine's moods hit all alike."""
    steps: int = 4
    """Per timing."""
    notes: tuple[str, ...] = ()
    """What else is to be said, for example that the machine was busy."""


def main(cfg: Config) -> None:
    """Times all variants and writes rows, table and JSON."""
    began = time.monotonic()
    variants = {"plain": ()} | {
        f"bayes-{name}/{generator}": (f"bayes.selection={name}", f"bayes.generator={generator}")
        for name, generator in itertools.product(cfg.selections, cfg.generators)
    }
    variants |= {
        f"bayes-{name}/activations": (f"bayes.selection={name}", "bayes.noise=activations") for name in cfg.activations
    }
    console = Console(stderr=True)
    rows = []
    for shape in cfg.shapes:
        programs = {}
        for name, own in variants.items():
            programs[name] = _program(cfg, shape, own)
            console.print(f"{shape} {name} compiled: {time.monotonic() - began:.0f} s", highlight=False)
        plain = programs["plain"].memory
        for name, program in programs.items():
            case = {"shape": shape, "batch": cfg.batch_size}
            both = {"memory": (program.memory, "bytes"), "memory_ratio": (program.memory / plain, "ratio to plain")}
            for metric, (value, unit) in both.items():
                names = {"bench": "corruption", "method": name, "case": case, "unit": unit}
                rows.append(Row(metric=metric, value=value, n=1, **names))
        if shape not in cfg.compiled_only:
            rows += _rows(cfg, shape, _timed(cfg, programs))
            console.print(f"{shape} timed: {time.monotonic() - began:.0f} s", highlight=False)
    shown = ("seconds", "seconds_ratio", "cpu_seconds_ratio", "memory_ratio")
    found = {(row.case["shape"], row.method, row.metric): harness.figure(row) for row in rows}
    lines = [
        [shape, name, *(found.get((shape, name, metric), "-") for metric in shown)]
        for shape, name in itertools.product(cfg.shapes, variants)
    ]
    print(harness.table(["shape", "method", *shown], lines))
    notes = [
        "ratios are medians over rounds of variant over plain in the same round, with bootstrap intervals",
        "memory: arguments, the base model's weights among them, results and temporaries of the compiled program; the training's state is given away",
        *cfg.notes,
    ]
    harness.write(
        "corruption", rows, config.to_dict(cfg) | {"part": "overhead"}, {"all": time.monotonic() - began}, notes
    )


class Program(NamedTuple):
    """A few steps of one variant."""

    run: Callable[[], None]
    """Goes on from where the last call ended."""
    memory: int


def _program(cfg: Config, shape: Shape, own: tuple[str, ...]) -> Program:
    """Compiled, and with random numbers to run on unless it is for its memory alone."""
    recipe = tuning.read(None, (f"tune.batch_size={cfg.batch_size}", *own))
    preset = CONFIGS[shape]()
    unet_cfg = MIDDLE if shape == "middle" else preset.unet
    functions = pipeline.functions(unet_cfg, preset.vae, preset.text)
    method = tuning.method_of(recipe, functions.noisy_fn)
    settings, adapter = tuning.settings(recipe), tuning.adapter_of(recipe)
    network = {"eps_fn": functions.predict_fn, "adapter": adapter, "schedule": ScheduleConfig(), "text_fn": None}
    key = jax.random.key(0)

    def start():
        params = unet.init(key, unet_cfg)
        side, pictures = SIDES[shape], 2 * cfg.batch_size
        mean = jax.random.normal(key, (pictures, side, side, unet_cfg.in_channels))
        context = jax.random.normal(key, (1, TOKENS[shape], unet_cfg.cross_attention_dim))
        data = examples.Data(examples.examples(mean, context, jnp.zeros_like(mean)))
        return method.init(key, params, settings, adapter=adapter), data, params

    def advance(state, data, params, settings):
        return method.run(key, state, data, params, settings, num_steps=cfg.steps, **network)[0]

    # the base model's weights stay on the device, whether a step reads them or not
    compiled = jax.jit(advance, donate_argnums=0, keep_unused=True).lower(*jax.eval_shape(start), settings).compile()
    parts = compiled.memory_analysis()
    size = parts.argument_size_in_bytes + parts.output_size_in_bytes + parts.temp_size_in_bytes
    size -= parts.alias_size_in_bytes
    if shape in cfg.compiled_only:
        return Program(lambda: None, size)
    state, data, params = jax.jit(start)()
    held = [state]

    def run() -> None:
        held.append(jax.block_until_ready(compiled(held.pop(), data, params, settings)))

    return Program(run, size)


def _timed(cfg: Config, programs: dict[str, Program]) -> dict[str, dict[str, np.ndarray]]:
    """Seconds a step [rounds] of each variant by each clock, the first round left out."""
    clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
    taken = {name: {clock: [] for clock in clocks} for name in programs}
    rng = np.random.default_rng(0)
    for _ in range(cfg.rounds + 1):
        for name in rng.permutation(list(programs)):
            before = {clock: read() for clock, read in clocks.items()}
            programs[name].run()
            for clock, read in clocks.items():
                taken[name][clock].append((read() - before[clock]) / cfg.steps)
    return {name: {clock: np.array(values[1:]) for clock, values in kinds.items()} for name, kinds in taken.items()}


def _rows(cfg: Config, shape: Shape, taken: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    """Median time of each variant, and the median of its ratio to the plain step's in the same round."""
    rows = []
    for name, kinds in taken.items():
        for clock, values in kinds.items():
            names = {"bench": "corruption", "method": name, "case": {"shape": shape, "batch": cfg.batch_size}}
            rows.append(
                Row(metric=clock, value=float(np.median(values)), n=len(values), unit="seconds a step", **names)
            )
            if name != "plain":
                ratios = values / taken["plain"][clock]
                rng = np.random.default_rng(0)
                medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
                low, high = np.percentile(medians, [2.5, 97.5])
                row = {"value": float(np.median(ratios)), "low": float(low), "high": float(high), "n": len(ratios)}
                rows.append(Row(metric=f"{clock}_ratio", unit="ratio to plain", **row, **names))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
