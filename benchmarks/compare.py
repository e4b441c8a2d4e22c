"""`python -m benchmarks.compare`: what a compiler counts in every method's program, against a committed file; fails where it grew.

Times vary from machine to machine, these do not: operations and bytes of the program as it is handed to XLA, how often the network is traced for
one executable and how often again when only numbers change, how many executables both calls need, and (with `--compiled`) temporary memory, which
may differ with another compiler. The programs are those of a tiny model, whose counts move with the same changes as a large one's.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import harness
from benchmarks.throughput import counters
from dmsec_jax import pipeline, tuning
from dmsec_jax.causal import skeleton
from dmsec_jax.causal.sem import Prior
from dmsec_jax.diffusion.schedule import from_scheduler_json
from dmsec_jax.finetune import examples
from dmsec_jax.functions import functions
from dmsec_jax.methods import advdm, cgi_dm, finextract, spot
from dmsec_jax.models import presets, unet, vae
from dmsec_jax.models.skeleton_net import EdgeMLP

FILE = Path(__file__).with_name("counters.json")
GROWTH = 0.05
BATCH, STEPS, VARIABLES, TOKENS = 2, 2, 8, 6

Counts = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Counters."""

    methods: tuple[str, ...] = ()
    """Names; none: all."""
    compiled: bool = False
    """Compile too, for temporary memory: seconds a method."""
    write: bool = False
    """Replace the committed counts of these methods by today's."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted method, its arguments as shapes, and the same arguments with other numbers."""

    fn: Callable
    args: tuple
    other: tuple
    calls: list
    """Grows by one whenever the network is traced."""


def main(cfg: Config) -> int:
    """Counts, compares, and returns 1 if something grew."""
    found = {name: count(PROGRAMS[name](), compiled=cfg.compiled) for name in cfg.methods or PROGRAMS}
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    print(harness.table(["method", "counter", "now", "committed"], _lines(found, known)))
    if cfg.write:
        merged = {name: {**known.get(name, {}), **counts} for name, counts in found.items()}
        FILE.write_text(json.dumps(dict(sorted({**known, **merged}.items())), indent=1) + "\n")
        return 0
    complaints = grown(found, known)
    print("\n".join(complaints) or "nothing grew")
    return 1 if complaints else 0


def count(program: Program, *, compiled: bool = False) -> Counts:
    """Counters of one method."""
    jitted = jax.jit(program.fn)
    program.calls.clear()
    traced = jitted.trace(*program.args)
    traces = len(program.calls)
    again = jitted.trace(*program.other)
    lowered = traced.lower()
    found = {
        "flops": counters.flops(traced.jaxpr),
        "bytes": float(lowered.cost_analysis()["bytes accessed"]),
        "network_traces": traces,
        "traces_again": len(program.calls) - traces,
        "executables": len({id(own.jaxpr) for own in (traced, again)}),
    }
    if compiled:
        found["temp_bytes"] = float(lowered.compile().memory_analysis().temp_size_in_bytes)
    return found


def grown(found: Mapping[str, Counts], known: Mapping[str, Counts]) -> list[str]:
    """One sentence for every counter that is more than `GROWTH` above the committed one, or is not committed."""
    complaints = []
    for name, counts in found.items():
        for counter, value in counts.items():
            old = known.get(name, {}).get(counter)
            if old is None:
                complaints.append(f"{name}: {counter} is not committed: run with --compiled --write --methods {name}")
            elif value > old * (1 + GROWTH):
                share = f"by {value / old - 1:.0%}" if old else ""
                complaints.append(f"{name}: {counter} grew from {old:g} to {value:g} {share}".rstrip())
    return complaints


def _lines(found, known):
    flat = [(name, counter, value) for name, counts in found.items() for counter, value in counts.items()]
    old = lambda name, counter: known.get(name, {}).get(counter)
    return [[name, counter, f"{value:g}", str(old(name, counter))] for name, counter, value in flat]


@functools.cache
def _model() -> SimpleNamespace:
    """Functions and shapes of the tiny model; its UNet notes when it is traced."""
    preset, calls = presets.TINY, []
    plain = functions(preset.unet, preset.vae, preset.text)

    def predict_fn(params, z_t, t, context):
        calls.append(None)
        return plain.predict_fn(params, z_t, t, context)

    key, side = jax.random.key(0), preset.unet.sample_size
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    return SimpleNamespace(
        functions=plain._replace(predict_fn=predict_fn),
        calls=calls,
        key=key,
        unet=jax.eval_shape(functools.partial(unet.init, cfg=preset.unet), key),
        vae=jax.eval_shape(functools.partial(vae.init, cfg=preset.vae), key),
        context=shape(1, TOKENS, preset.unet.cross_attention_dim),
        latent=shape(BATCH, side, side, preset.unet.in_channels),
        image=shape(BATCH, side * preset.vae.factor, side * preset.vae.factor, 3),
        mask=shape(1, 1, 1, 1),
        schedule=from_scheduler_json(dict(preset.scheduler)),
        index=jnp.arange(BATCH),
        shape=shape,
    )


def _pair(model: SimpleNamespace) -> tuple[Callable, Any]:
    """(pair_fn, shapes of its parameters) of two networks, one after the other as large ones are."""
    twice = {"unet": (model.unet, model.unet), "context": (model.context, model.context)}
    return pipeline.in_turn(model.functions.predict_fn), twice


def _attack(objective_fn: Callable) -> Program:
    model = _model()
    eps_fn = lambda params, z_t, t: model.functions.predict_fn(
        params["unet"], z_t, t, jnp.broadcast_to(params["context"], (BATCH, *params["context"].shape[1:]))
    )
    encode_fn = lambda params, image: model.functions.encode_fn(params["vae"], image)
    options = {"eps_fn": eps_fn, "encode_fn": encode_fn, "schedule": model.schedule, "objective_fn": objective_fn}
    cfg, other = (advdm.Config(rate=rate) for rate in (1.0, 2.0))
    params = {"unet": model.unet, "vae": model.vae, "context": model.context}
    run = lambda params, image, mask, cfg: advdm.run(model.key, image, mask, 0.0, model.index, params, cfg, **options)
    args = (params, model.image, model.mask)
    return Program(run, (*args, cfg), (*args, other), model.calls)


def _contrast() -> Program:
    model = _model()
    pair_fn, params = _pair(model)
    options = {"pair_fn": pair_fn, "schedule": model.schedule}
    cfg, other = (cgi_dm.Config(num_steps=STEPS, alpha=alpha) for alpha in (1.0, 2.0))
    run = lambda params, known, start, mask, cfg: cgi_dm.run(
        model.key, known, start, mask, model.index, params, cfg, **options
    )
    args = (params, model.latent, model.latent, model.mask)
    return Program(run, (*args, cfg), (*args, other), model.calls)


def _extraction() -> Program:
    model = _model()
    pair_fn, params = _pair(model)
    options = {"pair_fn": pair_fn, "schedule": model.schedule}
    cfg, other = (finextract.Config(num_steps=STEPS, w=w) for w in (2.0, 3.0))
    run = lambda params, z_T, cfg: finextract.run(model.key, z_T, model.index, params, cfg, **options)
    return Program(run, (params, model.latent, cfg), (params, model.latent, other), model.calls)


def _tuning(*overrides: str) -> Program:
    model = _model()
    recipes = [
        tuning.read(None, (*overrides, f"tune.batch_size={BATCH}", f"tune.learning_rate={r}")) for r in (1e-4, 2e-4)
    ]
    method, adapter = tuning.method_of(recipes[0]), tuning.adapter_of(recipes[0])
    cfg, other = map(tuning.settings, recipes)
    state = jax.eval_shape(lambda params: method.init(model.key, params, cfg, adapter=adapter), model.unet)
    build = lambda mean, prompt: examples.Data(examples.examples(mean, prompt, mean))
    data = jax.eval_shape(build, model.latent, model.context)
    network = {"eps_fn": model.functions.predict_fn, "adapter": adapter, "schedule": model.schedule, "text_fn": None}
    run = lambda state, data, params, cfg: method.run(model.key, state, data, params, cfg, num_steps=STEPS, **network)
    args = (state, data, model.unet)
    return Program(run, (*args, cfg), (*args, other), model.calls)


def _search() -> Program:
    model, square = _model(), jax.ShapeDtypeStruct((VARIABLES, VARIABLES), jnp.float32)
    guide = jax.eval_shape(spot.guide_mag, square)
    cfg, other = (spot.Config(num_steps=STEPS, penalty=penalty) for penalty in (0.05, 0.1))
    run = lambda covariance, guide, cfg: spot.run(model.key, covariance, 1000.0, guide, cfg)
    return Program(run, (square, guide, cfg), (square, guide, other), [])


def _posterior() -> Program:
    """One update of the skeleton posterior."""
    cfg = skeleton.Config(num_steps=STEPS, pairs=BATCH * VARIABLES * (VARIABLES - 1) // 2)
    net, keys = EdgeMLP(), (jax.random.key(0), jax.random.key(1))
    state = jax.eval_shape(lambda: skeleton.init(keys[0], net, cfg))
    update = skeleton.updating(Prior(), net, cfg)
    return Program(lambda state, key: update(state, key, VARIABLES), (state, keys[0]), (state, keys[1]), [])


PROGRAMS: dict[str, Callable[[], Program]] = {
    "advdm": lambda: _attack(advdm.denoising),
    "sds": lambda: _attack(advdm.distillation),
    "cgi-dm": _contrast,
    "finextract": _extraction,
    "dreambooth": _tuning,
    "lora": lambda: _tuning("lora.rank=2"),
    "oft": lambda: _tuning("oft.blocks=2"),
    "bayes-norm": lambda: _tuning("bayes.selection=norm"),
    "bayes-linear": lambda: _tuning("bayes.selection=linear"),
    "bayes-lora": lambda: _tuning("lora.rank=2", "bayes.selection=lora-up"),
    "spot": _search,
    "spot-posterior": _posterior,
}

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
