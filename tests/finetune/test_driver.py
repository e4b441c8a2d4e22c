import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.finetune.dreambooth import Config
from dmsec_jax.finetune.driver import fit, on_disk
from dmsec_jax.finetune.examples import Data

KEY = jax.random.key(0)
CFG = Config(num_steps=10, batch_size=2, learning_rate=1e-2, ema_decay=0.9)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Disk:
    """Checkpoints as copies in memory; `events` in the order of their coming."""

    def __init__(self):
        self.kept, self.events = None, []

    def save(self, step, state, past):
        self.kept = jax.tree.map(np.array, state), past
        self.events.append(("save", step))

    def restore(self, shapes):
        return self.kept


def train(flat, cfg=CFG, values=(1.0, 2.0, 4.0), **more):
    spread = jnp.zeros((len(values), 1, 1, 1))
    data = Data(flat.pictures(values, logvar=spread))
    return fit(KEY, data, flat.params, cfg, **flat.network, **({"chunk_steps": 4} | more))


@pytest.fixture(scope="module")
def uninterrupted(flat):
    return train(flat)


@pytest.fixture
def interruptible():
    """Python's own handling of SIGINT, which a process started in the background does not have: a shell lets it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_stopped_by_ctrl_c_saves_and_resumes_bit_for_bit(flat, uninterrupted, interruptible):
    disk = Disk()

    def on_chunk(done, info, state):
        disk.events.append(("chunk", done))
        if done == 4:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    first = train(flat, on_chunk=on_chunk, save=disk.save)
    assert disk.events == [("chunk", 4), ("save", 4)]
    assert not first.finished
    assert signal.getsignal(signal.SIGINT) is before
    second = train(flat, save=disk.save, restore=disk.restore)
    assert second.finished
    assert uninterrupted.finished
    equal(second.state, uninterrupted.state)
    assert len(np.unique(second.past.info.loss)) == 10  # random latents, so equality says that the keys agree
    equal(second.past.info, uninterrupted.past.info)
    assert second.past.seconds > first.past.seconds > 0
    assert (first.start, second.start) == (0, 4)


def test_resuming_in_the_middle_of_a_chunk_goes_on_to_its_end(flat, uninterrupted):
    disk, done = Disk(), []
    train(flat, dataclasses.replace(CFG, num_steps=6), save=disk.save)
    rest = train(flat, restore=disk.restore, on_chunk=lambda step, info, state: done.append((step, len(info.loss))))
    assert done == [(8, 2), (10, 2)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), rest.state, uninterrupted.state)


def test_saves_when_asked_and_at_the_end_after_reporting(flat):
    disk = Disk()
    outcome = train(
        flat, save=disk.save, save_every=4, on_chunk=lambda step, info, state: disk.events.append(("chunk", step))
    )
    numbers = [("chunk", 4), ("save", 4), ("chunk", 8), ("save", 8), ("chunk", 10), ("save", 10)]
    assert disk.events == numbers
    equal(disk.kept[0], outcome.state)
    assert outcome.past.info.loss.shape == (10,)
    again = train(flat, save=disk.save, restore=disk.restore)  # nothing left to do
    assert again.finished
    equal(again.past.info, outcome.past.info)
    assert again.past.seconds == disk.kept[1].seconds
    assert disk.events == numbers


def test_termination_request_stops_it_too_and_a_second_signal_acts_at_once(flat, interruptible, capfd):
    def twice(done, info, state):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    assert train(flat, on_chunk=lambda *_: signal.raise_signal(signal.SIGTERM)).state.step == 4
    assert "Stopping after this chunk of steps; a second Ctrl-C ends it at once." in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train(flat, on_chunk=twice)


def test_an_ignored_signal_stays_ignored(flat, interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    outcome = train(flat, on_chunk=lambda *_: signal.raise_signal(signal.SIGINT))
    assert outcome.finished
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_non_finite_loss_stops_with_a_clear_error_and_keeps_the_good_checkpoint(flat):
    disk = Disk()
    wild = dataclasses.replace(CFG, learning_rate=1e30, num_steps=8)
    train(flat, dataclasses.replace(wild, num_steps=4, learning_rate=0.0), save=disk.save)
    with pytest.raises(
        ValueError, match=r"loss must be finite, got (nan|inf).* at step \d; lower learning_rate=1e\+30.*step 4 is good"
    ):
        train(flat, wild, save=disk.save, restore=disk.restore)
    assert disk.events == [("save", 4)]
    with pytest.raises(ValueError, match=r"got nan .* at step 0; lower learning_rate=0\.01 or check the pictures$"):
        train(flat, values=(jnp.nan,) * 3)


def test_checkpoint_of_another_run_is_refused(flat):
    disk = Disk()
    train(flat, save=disk.save)
    with pytest.raises(ValueError, match="checkpoint must be of the trainable tree and config in use"):
        train(flat, dataclasses.replace(CFG, ema_decay=None), restore=disk.restore)
    with pytest.raises(ValueError, match="checkpoint must be at most num_steps=6 steps old, got step 10"):
        train(flat, dataclasses.replace(CFG, num_steps=6), restore=disk.restore)


@pytest.mark.parametrize(("option", "value"), [("chunk_steps", 0), ("save_every", 6), ("save_every", -4)])
def test_mistaken_options_are_named(flat, option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        train(flat, **{option: value})


def test_base_parameters_survive(flat):
    train(flat, dataclasses.replace(CFG, num_steps=4))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(flat.params))


def test_checkpoints_on_disk_hold_what_was_saved_while_training_went_on(flat, uninterrupted, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save, restore = on_disk(checkpoints)
        assert train(flat, save=save, restore=restore, save_every=4).finished
    (tmp_path / "10").rename(tmp_path / "removed")
    with Checkpoints(tmp_path) as checkpoints:
        _, restore = on_disk(checkpoints)
        resumed = train(flat, restore=restore)
    assert resumed.start == 8
    equal(resumed.state, uninterrupted.state)
    equal(resumed.past.info, uninterrupted.past.info)
    assert resumed.past.info.finite.dtype == np.bool_
    with Checkpoints(tmp_path) as checkpoints:
        _, restore = on_disk(checkpoints, {"seed": 1})
        with pytest.raises(ValueError, match=r"checkpoint 8 of .* must be one of this run, got another origin\.seed;"):
            train(flat, restore=restore)
