"""The host's side of fine-tuning: chunks of jitted steps, progress, checkpoints, and a clean stop."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import spread
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.types import EpsFn, Key, Params
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import Adapter
from dmsec_jax.finetune.dreambooth import Config, Info, State, TextFn
from dmsec_jax.finetune.examples import Data

OnChunk = Callable[[int, Any, Any], None]

STOPPING = b"\nStopping after this chunk of steps; a second Ctrl-C ends it at once.\n"


class Method(NamedTuple):
    """What is driven: a way of training, as pure functions over a State and an Info of its own.

    init: `(key, params, cfg, *, adapter) -> State`
    run: `(key, state, data, params, cfg, *, eps_fn, adapter, schedule, text_fn, num_steps) -> (State, Info)`, `Info` with a leading axis of steps;
        pieces give what one run gives.
    tuned: `State -> dreambooth.State`, the part that holds the trainable tree and the step.
    info: type of Info, a NamedTuple of floats with `loss`, `grad_norm` and a boolean `finite`.
    """

    init: Callable[..., Any]
    run: Callable[..., tuple[Any, Any]]
    tuned: Callable[[Any], State]
    info: type


DREAMBOOTH = Method(dreambooth.init, dreambooth.run, lambda state: state, Info)


@partial(jax.jit, static_argnames=("method", "eps_fn", "adapter", "text_fn", "num_steps"), donate_argnames="state")
def _advance(key, state, data, params, cfg, *, method, eps_fn, adapter, schedule, text_fn, num_steps):
    network = {"eps_fn": eps_fn, "adapter": adapter, "schedule": schedule, "text_fn": text_fn}
    state, info = method.run(key, state, data, params, cfg, num_steps=num_steps, **network)
    return spread.cut(state), spread.whole(info)


@partial(jax.jit, static_argnames=("method", "adapter"))
def _init(key, params, cfg, *, method, adapter):
    return spread.cut(method.init(key, params, cfg, adapter=adapter))


class Past(NamedTuple):
    """How training went up to a checkpoint."""

    info: Any  # the method's Info, numpy arrays [steps]
    seconds: float


def no_past(method: Method = DREAMBOOTH) -> Past:
    """That of a training that has not begun."""
    kinds = {name: np.bool_ if name == "finite" else np.float32 for name in method.info._fields}
    return Past(method.info(**{name: np.zeros(0, kind) for name, kind in kinds.items()}), 0.0)


Save = Callable[[int, Any, Past], None]
Restore = Callable[[Any], tuple[Any, Past] | None]


class Outcome(NamedTuple):
    state: Any  # the method's State
    past: Past  # of all steps, those before an interruption included
    start: int  # step that this call went on from
    finished: bool  # False if a signal stopped it before `cfg.num_steps`


def on_disk(
    checkpoints: Checkpoints, origin: Mapping[str, Any] | None = None, method: Method = DREAMBOOTH
) -> tuple[Save, Restore]:
    """The `save` and `restore` of `fit` for checkpoints in a folder; close `checkpoints` afterwards.

    Args:
        origin: what the run is made from, as JSON values; checkpoints of another origin are refused.
        method: that of `fit`.
    """
    origin = {"origin": dict(origin or {})}

    def save(done: int, state: Any, past: Past) -> None:
        history = {name: values.tolist() for name, values in past.info._asdict().items()}
        checkpoints.save(done, spread.to_host(state), {**origin, "info": history, "seconds": past.seconds})

    def restore(like: Any) -> tuple[Any, Past] | None:
        found = checkpoints.restore(like, metadata=origin)
        if found is None:
            return None
        kinds = no_past(method).info._asdict()
        history = {name: np.array(found.metadata["info"][name], kind.dtype) for name, kind in kinds.items()}
        return found.tree, Past(method.info(**history), found.metadata["seconds"])

    return save, restore


def fit(
    key: Key,
    data: Data,
    params: Params,
    cfg: Config,
    *,
    eps_fn: EpsFn,
    adapter: Adapter,
    schedule: ScheduleConfig,
    text_fn: TextFn | None = None,
    method: Method = DREAMBOOTH,
    chunk_steps: int = 25,
    save_every: int = 0,
    on_chunk: OnChunk | None = None,
    enough: Callable[[int], bool] | None = None,
    save: Save | None = None,
    restore: Restore | None = None,
) -> Outcome:
    """Trains to `cfg.num_steps` in total, going on from a checkpoint where `restore` finds one.

    A run that was stopped by a signal and resumed with the same arguments equals an uninterrupted one bit for bit. Pass
    the same `eps_fn`, `adapter`, `text_fn` and `method` objects to train again without compiling again; a number of steps that
    `chunk_steps` does not divide compiles twice.

    Args:
        cfg: the method's, a `dreambooth.Config` or an extension of it.
        chunk_steps: steps per dispatch; between chunks the host looks at the loss, saves, reports and stops.
        save_every: steps between checkpoints, a multiple of `chunk_steps`; 0: only at the end and when stopped.
        on_chunk: called with (steps done, Info as numpy [steps], state), whose buffers are reused: copy what you keep.
        enough: called with the steps done, before every chunk; True ends the training there, finished.
        save: called with (steps done, state, Past); must have read the state when it returns.
        restore: called with a State of `jax.ShapeDtypeStruct`, with shardings if a mesh is in force; returns a State like it, which is ours then,
            and the Past that was saved with it, or None.

    SIGINT (Ctrl-C) and SIGTERM end it after the current chunk, saved, and are acknowledged on stderr; a second signal
    acts at once (main thread only; while a chunk compiles, both wait for the compiler). One that the process ignores
    stays ignored.

    Raises:
        ValueError: if the loss or gradient is not finite (that chunk is not saved), on a checkpoint of another shape or
            beyond the end, or on what the method's `init` and `run` refuse.
    """
    require_chunks(chunk_steps, save_every)
    key_init, key_run = jax.random.split(key)
    began = time.monotonic()
    enough = enough or (lambda done: False)
    state, past = _start(key_init, params, cfg, adapter, method, restore)
    start = done = saved = int(method.tuned(state).step)
    fixed = dataclasses.replace(cfg, num_steps=chunk_steps)  # so that the total is no part of what is compiled
    network = {"eps_fn": eps_fn, "adapter": adapter, "schedule": schedule, "text_fn": text_fn}
    advance = partial(_advance, key_run, data=data, params=params, cfg=fixed, method=method, **network)
    history = [past.info]

    def so_far() -> Past:
        info = jax.tree.map(lambda *parts: np.concatenate(parts), *history)
        return Past(info, past.seconds + time.monotonic() - began)

    with _stop_requests() as received:
        stopped = lambda: spread.on_any_host(received())
        chunks = _chunks(advance, state, range(start, cfg.num_steps), chunk_steps, lambda at: stopped() or enough(at))
        for done, info, state in chunks:
            _require_finite(info, done, saved if save else 0, cfg)
            history.append(info)
            if on_chunk:  # before it is saved: what is killed in between reports again
                on_chunk(done, info, state)
            if save and (done == cfg.num_steps or stopped() or (save_every and done % save_every == 0)):
                save(done, state, so_far())
                saved = done
        if save and saved < done:  # the signal came late, or the report was enough
            save(done, state, so_far())
    return Outcome(state, so_far() if done > start else past, start, done == cfg.num_steps or enough(done))


def require_chunks(chunk_steps: int, save_every: int) -> None:
    """Raises ValueError unless chunks are not empty and checkpoints fall between them."""
    require(chunk_steps >= 1, "chunk_steps", "at least 1", chunk_steps, "use for example 25")
    whole = save_every >= 0 and save_every % chunk_steps == 0
    require(whole, "save_every", f"a multiple of chunk_steps={chunk_steps}, or 0", save_every, "round it")


def _chunks(
    advance: Callable[..., tuple[Any, Any]], state: Any, steps: range, size: int, stopped: Callable[[int], bool]
) -> Iterator[tuple[int, Any, Any]]:
    """(steps done, Info on the host, state) after each chunk."""
    done = steps.start
    while done < steps.stop and not stopped(done):
        # up to the next multiple of `size`, so that a resumed run cuts where the first one would have
        count = min(size - done % size, steps.stop - done)
        state, info = advance(state, num_steps=count)
        done += count
        while not info.loss.is_ready():  # sleeping, unlike waiting for the device, lets signals in
            time.sleep(0.002)
        yield done, jax.device_get(info), state


def _start(
    key: Key, params: Params, cfg: Config, adapter: Adapter, method: Method, restore: Restore | None
) -> tuple[Any, Past]:
    init = partial(_init, cfg=dataclasses.replace(cfg, num_steps=1), method=method, adapter=adapter)
    if restore is not None:
        shapes = spread.cut_shapes(jax.eval_shape(init, key, params))
        found = restore(shapes)
        if found is not None:
            state = found[0]
            kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, shapes)]
            cure = "resume with the same adapter and config, or remove the checkpoint"
            same = kinds[0] == kinds[1]
            require(same, "checkpoint", "of the trainable tree and config in use", "another structure", cure)
            contract, cure = f"at most num_steps={cfg.num_steps} steps old", "raise num_steps or remove the checkpoint"
            step = int(method.tuned(state).step)
            require(step <= cfg.num_steps, "checkpoint", contract, f"step {step}", cure)
            return found
    return init(key, params), no_past(method)


def _require_finite(info: Any, done: int, saved: int, cfg: Config) -> None:
    if np.all(info.finite):
        return
    first = int(np.argmin(info.finite))
    step = done - len(info.finite) + first
    where = f"{float(info.loss[first])} (gradient norm {float(info.grad_norm[first])}) at step {step}"
    last = f"; the checkpoint of step {saved} is good" if saved else ""
    raise fail("loss", "finite", where, f"lower learning_rate={float(cfg.learning_rate):g} or check the pictures{last}")


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came; a second one acts as it would without us."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = []
    both = (signal.SIGINT, signal.SIGTERM)
    # a shell lets its background jobs ignore SIGINT, so that Ctrl-C in the terminal leaves them running
    before = {number: handler for number in both if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame) -> None:
        received.append(number)
        put_back()
        os.write(2, STOPPING)  # a handler may interrupt a print, and must not print then

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        put_back()
