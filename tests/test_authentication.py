"""The membership audit on a random tiny model: what is shared, what is saved, and that batching changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from dmsec_jax import authentication, pipeline
from dmsec_jax.authentication import METHODS, RECOVERING, Settings
from dmsec_jax.diffusion import draws
from dmsec_jax.methods import cgi_dm, membership

# the same settings as in the tests of the command: one compilation serves all
SMALL = Settings(
    num_draws=4,
    num_steps=50,
    cgi_draws=1,
    tile=2,
    batch_size=2,
    chunk=2,
    secmi_timestep=20,
    pfami_timesteps=(100,),
    gradient_timesteps=(100, 200),
)
KEY = jax.random.key(0)
OF_ONE_KIND = ("secmi", "pia", "pfami", "gradient-norm", "loss-difference")
"""One test of each way to compute a score; the others share it with one of these."""


def noise(count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def subject(tiny_pipeline):
    tuned = jax.tree.map(lambda leaf: leaf * 1.05, tiny_pipeline.params["unet"])
    return pipeline.Subject(tiny_pipeline, {**tiny_pipeline.params, "unet": tuned}, "a red dog")


@pytest.fixture(scope="module")
def losses(subject):
    names = list(authentication.LOSSES)
    return authentication.statistics(KEY, subject, noise(3), names, SMALL)


@pytest.mark.slow  # the command's tests run the same, compiled once
def test_losses_are_those_of_the_methods(subject, losses):
    base = subject.base
    z0 = authentication.latents(subject, noise(3))
    empty, prompt = pipeline.contexts(base, ["", subject.prompt])[:, None]

    def fn(params, context):
        bound, tree = pipeline.single(base, params["unet"], context)
        return lambda z_t, t: bound(tree, z_t, t)

    tuned, before, alone = (
        fn(subject.tuned, prompt),
        fn(base.params, prompt),
        fn(subject.tuned, empty),
    )
    options = {"num_draws": 4, "draw": draws.stratified_draw}
    at = lambda key, model: np.asarray(membership.losses(key, model, z0, base.schedule, **options), np.float64)
    own = at(KEY, tuned)
    expected = {
        "loss": -own,
        "base-loss": -at(KEY, before),
        "loss-difference": at(KEY, before) - own,
        "loss-difference-independent": at(KEY, before) - at(membership.apart(KEY), tuned),
        "clid": at(KEY, alone) - own,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(losses[name], values.mean(axis=1), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow  # the command's tests run the same, compiled once
def test_one_call_for_all_is_a_call_for_each(subject, losses):
    alone = authentication.statistics(KEY, subject, noise(3), ["loss-difference"], SMALL)
    np.testing.assert_array_equal(alone["loss-difference"], losses["loss-difference"])


@pytest.mark.slow  # compiles every test twice
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in OF_ONE_KIND else pytest.mark.long) for name in METHODS if name not in RECOVERING
])  # fmt: skip
def test_batches_and_chunks_change_nothing(subject, name):
    at = lambda images, **changes: authentication.statistics(
        KEY, subject, images, [name], dataclasses.replace(SMALL, **changes)
    )[name]
    whole = at(noise(3), batch_size=3, chunk=1)
    np.testing.assert_allclose(at(noise(3)), whole, rtol=1e-3, atol=1e-5)
    assert np.ptp(whole) > 0


@pytest.mark.slow  # the command's tests run the same, compiled once
def test_interrupted_recovery_ends_as_an_uninterrupted_one(subject):
    seen = []

    class Stop(Exception):
        pass

    def stop(state):
        seen.append(state)
        if len(seen) == 3:  # in the middle of the second batch
            raise Stop

    whole = authentication.recover(KEY, subject, noise(3), SMALL)
    with pytest.raises(Stop):
        authentication.recover(KEY, subject, noise(3), SMALL, on_chunk=stop)
    assert seen[-1].done.tolist() == [50, 50, 25]
    assert seen[0].done.tolist() == [25, 25, 0], "what was handed out must not change afterwards"
    resumed = authentication.recover(KEY, subject, noise(3), SMALL, resume=seen[-1])
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert whole.images.shape == whole.partial.shape == (3, 16, 16, 3)
    assert (whole.error > 0).all()
    assert (whole.skipped == 0).all()


def test_pictures_that_batches_of_another_size_left_at_different_steps_all_end(subject, monkeypatch):
    def advance(key, state, known, start, mask, params, cfg, *, num_steps, **options):
        finite = np.ones((num_steps, len(state.index)), bool)
        return state._replace(delta=state.delta + num_steps, i=state.i + num_steps), cgi_dm.Info(None, None, finite)

    monkeypatch.setattr(authentication, "_advance", advance)
    done, seen = np.array([50, 25, 0]), []
    delta = np.ones((3, *subject.base.latent_shape), np.float32) * done[:, None, None, None]
    left = authentication.Unfinished(delta.astype(np.float32), done, np.zeros(3, int))
    authentication.recover(KEY, subject, noise(3), SMALL, resume=left, on_chunk=seen.append)
    assert [state.done.tolist() for state in seen] == [[50, 50, 0], [50, 50, 25], [50, 50, 50]]
    np.testing.assert_array_equal(seen[-1].delta, 50)


@pytest.mark.slow  # the command's tests run the same, compiled once
def test_recovery_does_not_depend_on_the_batch(subject):
    whole = authentication.recover(KEY, subject, noise(3), SMALL)
    pair = authentication.recover(KEY, subject, noise(3)[:2], SMALL)
    np.testing.assert_allclose(whole.error[:2], pair.error, rtol=1e-4)


@pytest.mark.slow  # the command's tests run the same, compiled once
@pytest.mark.parametrize("mask", ["blocks", "blur", pytest.param("half", marks=pytest.mark.long)])
def test_each_mask_keeps_what_it_says(subject, mask):
    settings = dataclasses.replace(SMALL, mask=mask, num_steps=1)
    found = authentication.recover(KEY, subject, noise(3), settings)
    assert (np.abs(found.error - 1) > 1e-4).all(), "something is hidden, and moves"
    masks = authentication._masks(KEY, settings, authentication.latents(subject, noise(3)))
    assert len(np.unique(np.asarray(masks), axis=0)) == (3 if mask == "blocks" else 1)
    np.testing.assert_allclose(masks.mean(), 0.5, atol=0.26 if mask == "blur" else 0)


@pytest.mark.slow  # the command's tests run the same, compiled once
def test_a_model_of_nan_is_named(subject):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, subject.tuned["unet"])
    ill = subject._replace(tuned={**subject.tuned, "unet": broken})
    with pytest.raises(ValueError, match="scores of loss-difference must be finite, got 3 of 3 that are not"):
        authentication.statistics(KEY, ill, noise(3), ["loss-difference"], SMALL)
    found = authentication.recover(KEY, ill, noise(3), SMALL)
    assert (found.skipped == 50).all()
    np.testing.assert_allclose(found.error, 1)


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: authentication.statistics(KEY, s, noise(1), ["magic"]), "method must be one of loss-difference"),
    (lambda s: authentication.statistics(KEY, s, noise(1), ["cgi-dm"]), "method must be one of loss-difference"),
    (lambda s: authentication.statistics(KEY, s, 255 * noise(1), ["loss"]), r"images must be in \[-1, 1\]"),
    (lambda s: authentication.recover(KEY, s, noise(1), name="loss"), "method must be one of cgi-dm"),
    (lambda s: authentication.recover(KEY, s, noise(1), Settings(num_steps=30, tile=2)), "from 1 to 25, or a multiple of 25, got 30"),
    (lambda s: authentication.recover(KEY, s, noise(1), Settings(tile=3)), "tile must be even and a divisor"),
])  # fmt: skip
def test_bad_requests_are_named(subject, call, message):
    with pytest.raises(ValueError, match=message):
        call(subject)


def test_costs_are_those_of_the_settings():
    cost = {name: method.evaluations(SMALL) for name, method in METHODS.items()}
    assert cost["loss-difference"] == 8
    assert cost["loss"] == cost["base-loss"] == 4
    assert cost["cgi-dm"] == cost["cgi-dm-faithful"] == 200  # two models, forth and back
    assert METHODS["cgi-dm"].evaluations(dataclasses.replace(SMALL, cgi_draws=4)) == 800
    assert (cost["secmi"], cost["pia"], cost["pfami"], cost["gradient-norm"]) == (4, 2, 5, 6)
