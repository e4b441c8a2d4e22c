"""`python -m benchmarks.bayes_overhead`: what a posterior adds to a training step, in time and in compiled memory."""

import dataclasses
import itertools
import time

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import harness
from benchmarks.trained import Training
from dmsec_jax import pipeline, tuning
from dmsec_jax.core import config
from dmsec_jax.finetune import examples
from dmsec_jax.report.result import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Overhead benchmark."""

    tuner: str = "full"
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
    base = pipeline.load()
    variants = {"plain": ()} | {
        f"bayes-{name}/{generator}": (f"bayes.selection={name}", f"bayes.generator={generator}")
        for name, generator in itertools.product(cfg.selections, cfg.generators)
    }
    variants |= {
        f"bayes-{name}/activations": (f"bayes.selection={name}", "bayes.noise=activations") for name in cfg.activations
    }
    console = Console(stderr=True)
    programs = {}
    for name, own in variants.items():
        programs[name] = _program(cfg, base, own)
        console.print(f"{name} compiled: {time.monotonic() - began:.0f} s", highlight=False)
    clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
    taken = {name: {clock: [] for clock in clocks} for name in programs}
    rng = np.random.default_rng(0)
    for _ in range(cfg.rounds + 1):
        for name in rng.permutation(list(programs)):
            before = {clock: read() for clock, read in clocks.items()}
            programs[name][0]()
            for clock, read in clocks.items():
                taken[name][clock].append((read() - before[clock]) / cfg.steps)
        console.print(f"a round done: {time.monotonic() - began:.0f} s", highlight=False)
    rows = _rows(cfg, {name: {c: np.array(v[1:]) for c, v in kinds.items()} for name, kinds in taken.items()})
    plain = programs["plain"][1]
    for name, (_, memory) in programs.items():
        case = {"tuner": cfg.tuner, "batch": cfg.batch_size}
        both = {"memory": (memory, "bytes"), "memory_ratio": (memory / plain, "ratio to plain")}
        for metric, (value, unit) in both.items():
            names = {"bench": "corruption", "method": name, "case": case, "unit": unit}
            rows.append(Row(metric=metric, value=value, n=1, **names))
    shown = ("seconds", "seconds_ratio", "cpu_seconds_ratio", "memory_ratio")
    found = {(row.method, row.metric): harness.figure(row) for row in rows}
    print(harness.table(["method", *shown], [[name, *(found.get((name, m), "1") for m in shown)] for name in programs]))
    notes = [
        "ratios are medians over rounds of variant over plain in the same round, with bootstrap intervals",
        *cfg.notes,
    ]
    harness.write(
        "corruption", rows, config.to_dict(cfg) | {"part": "overhead"}, {"all": time.monotonic() - began}, notes
    )


def _program(cfg: Config, base: pipeline.Pipeline, own: tuple[str, ...]):
    """(a function that runs `steps` compiled steps, bytes of arguments, results and temporaries of the compiled program)."""
    overrides = (f"tune.batch_size={cfg.batch_size}", *own)
    training = Training(base, "openmoji", cfg.tuner, 10, 0, (25,), overrides)
    recipe = training.recipe
    mean, logvar = pipeline.encode(base, training.pictures.images)
    data = examples.Data(examples.examples(mean, pipeline.contexts(base, [training.prompt]), logvar))
    method = tuning.method_of(recipe, base.functions.noisy_fn)
    settings, adapter = tuning.settings(recipe), tuning.adapter_of(recipe)
    network = {"eps_fn": base.functions.predict_fn, "adapter": adapter, "schedule": base.schedule, "text_fn": None}
    key, params = jax.random.key(0), base.params["unet"]
    state = method.init(key, params, settings, adapter=adapter)

    def advance(state, data, params, settings):
        return method.run(key, state, data, params, settings, num_steps=cfg.steps, **network)

    compiled = jax.jit(advance).lower(state, data, params, settings).compile()
    parts = compiled.memory_analysis()
    size = parts.argument_size_in_bytes + parts.output_size_in_bytes + parts.temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(state, data, params, settings)), size


def _rows(cfg: Config, taken: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    """Median time of each variant, and the median of its ratio to the plain step's in the same round."""
    rows = []
    for name, kinds in taken.items():
        for clock, values in kinds.items():
            names = {"bench": "corruption", "method": name, "case": {"tuner": cfg.tuner, "batch": cfg.batch_size}}
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
