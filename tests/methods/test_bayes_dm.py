"""The Bayesian step on a small convolutional denoiser, its divergences in closed form, its shares of Stable Diffusion."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.finetune.lora import lora
from dmsec_jax.finetune.oft import oft
from dmsec_jax.methods import bayes_dm
from dmsec_jax.methods.bayes_dm import Config
from dmsec_jax.models import presets, unet

KEY = jax.random.key(0)
KERNELS = ("kernel",)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"mix": {"kernel": 0.3 * normal(0, 3, 3), "bias": jnp.zeros(3)}, "norm": {"scale": jnp.ones(3)}}
DATA = Data(examples(normal(1, 4, 2, 2, 3), normal(2, 4, 1, 3)), examples(normal(3, 2, 2, 2, 3), normal(4, 1, 1, 3)))
TUNE = dreambooth.Config(num_steps=3, batch_size=2, learning_rate=1e-2, sample_posterior=False)
CFG = Config(**vars(TUNE), selection=("kernel", "scale"), sigma0=0.1, sigma_rate=1e-2, kl_weight=0.1)


def eps_fn(params, z_t, t, context):
    h = jnp.tanh(z_t @ params["mix"]["kernel"] + params["mix"]["bias"] + 1e-3 * t[:, None, None, None])
    return params["norm"]["scale"] * (h + context.mean(1)[:, None, None, :])


NETWORK = {"eps_fn": eps_fn, "adapter": full(), "schedule": ScheduleConfig()}
step = jax.jit(partial(bayes_dm.step, **NETWORK))
init = partial(bayes_dm.init, KEY, PARAMS, adapter=NETWORK["adapter"])


def protocol_case():
    one = Data(examples(normal(1, 1, 2, 2, 3), normal(2, 1, 1, 3)))  # one picture: every batch is the same
    cfg = dataclasses.replace(CFG, batch_size=1)
    return {
        "cfg": cfg,
        "params": PARAMS,
        "init": (KEY, PARAMS),
        "step": (one,),
        "run": (one,),
        "options": NETWORK,
    }


def batch(i=0):
    return dreambooth.draw(KEY, i, DATA, TUNE)


def test_without_noise_it_is_dreambooth():
    cfg = Config(**vars(TUNE), selection=KERNELS, sigma0=0.0, sigma_min=0.0, sigma_rate=0.0)
    state, plain = init(cfg), dreambooth.init(KEY, PARAMS, TUNE, adapter=full())
    plain_step = jax.jit(partial(dreambooth.step, **NETWORK))
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        state, info = step(key, state, batch(i), PARAMS, cfg)
        plain, plain_info = plain_step(key, plain, batch(i), PARAMS, TUNE)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state.tuned.trainable, plain.trainable)
        np.testing.assert_allclose(info.loss, plain_info.loss, rtol=1e-6)
        np.testing.assert_allclose(info.grad_norm, plain_info.grad_norm, rtol=1e-6)
    drawn = bayes_dm.perturbed(KEY, state.tuned.trainable, state.raw)
    jax.tree.map(
        np.testing.assert_array_equal, drawn, state.tuned.trainable
    )  # so the forward pass is the same, bit for bit
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state.raw))


def test_weights_drawn_have_the_mean_and_deviation_of_the_posterior():
    mu = {"a": normal(5, 3), "b": jnp.zeros(2)}
    sigma = {"a": jnp.array([0.1, 1.0, 2.0])}
    drawn = jax.vmap(lambda key: bayes_dm.perturbed(key, mu, sigma))(jax.random.split(KEY, 10_000))
    error = 5 * sigma["a"] / 100  # 5 standard errors
    assert (jnp.abs(drawn["a"].mean(0) - mu["a"]) < error).all()
    np.testing.assert_allclose(drawn["a"].std(0), sigma["a"], rtol=5 / np.sqrt(2 * 10_000))
    assert (drawn["b"] == 0).all()
    assert abs(np.corrcoef(drawn["a"].T)[0, 1]) < 0.05


def test_noise_of_a_leaf_does_not_depend_on_the_other_leaves():
    mu = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    both = bayes_dm.perturbed(KEY, mu, {"a": jnp.ones(3), "b": jnp.ones(3)})
    alone = bayes_dm.perturbed(KEY, mu, {"b": jnp.ones(3)})
    np.testing.assert_array_equal(both["b"], alone["b"])
    assert (both["a"] != both["b"]).all()


def test_noise_of_the_other_generator_is_standard_normal_too():
    key = jax.random.key(0, impl="rbg")
    drawn = bayes_dm.perturbed(key, {"a": jnp.ones(100_000)}, {"a": jnp.full(100_000, 2.0)})["a"]
    assert abs(drawn.mean() - 1) < 5 * 2 / np.sqrt(1e5)
    np.testing.assert_allclose(drawn.std(), 2, rtol=5 / np.sqrt(2e5))
    other = dataclasses.replace(CFG, generator="rbg")
    infos = [step(KEY, init(cfg), batch(), PARAMS, cfg)[1] for cfg in (CFG, other)]
    assert infos[1].finite
    assert infos[0].loss != infos[1].loss


def integrated(mu, sigma, centre, sigma0):
    """KL(N(mu, sigma^2) || N(centre, sigma0^2)) by the trapezoid rule."""
    x = np.linspace(mu - 12 * sigma, mu + 12 * sigma, 20_001)
    log = lambda m, s: -((x - m) ** 2) / (2 * s**2) - np.log(s * np.sqrt(2 * np.pi))
    return np.trapezoid(np.exp(log(mu, sigma)) * (log(mu, sigma) - log(centre, sigma0)), x)


def test_divergences_have_their_closed_forms():
    cfg = dataclasses.replace(CFG, sigma0=0.5, kl_scale="sum")
    tree = lambda *values: {"a": jnp.array(values, jnp.float32)}
    mu, sigma, centre = (1.0, -0.5), (0.3, 0.9), (0.8, 0.0)
    found = bayes_dm.divergence(tree(*mu), tree(*sigma), tree(*centre), cfg)
    expected = sum(integrated(m, s, c, 0.5) for m, s, c in zip(mu, sigma, centre, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    other = bayes_dm.divergence(tree(*mu), tree(*sigma), tree(*centre), dataclasses.replace(cfg, kl="prior-posterior"))
    expected = sum(integrated(c, 0.5, m, s) for m, s, c in zip(mu, sigma, centre, strict=True))
    np.testing.assert_allclose(other, expected, rtol=1e-4)
    for kl in ("posterior-prior", "prior-posterior"):
        same = bayes_dm.divergence(tree(1.0), tree(0.5), tree(1.0), dataclasses.replace(cfg, kl=kl))
        np.testing.assert_allclose(same, 0, atol=1e-6)


def test_kl_does_not_depend_on_the_number_of_weights():
    one = lambda n: ({"a": jnp.full(n, 0.3)}, {"a": jnp.full(n, 0.2)}, {"a": jnp.zeros(n)})
    mean = [float(bayes_dm.divergence(*one(n), CFG)) for n in (1, 50)]
    total = [float(bayes_dm.divergence(*one(n), dataclasses.replace(CFG, kl_scale="sum"))) for n in (1, 50)]
    np.testing.assert_allclose(mean[1], mean[0], rtol=1e-5)
    np.testing.assert_allclose(total, [mean[0], 50 * mean[0]], rtol=1e-5)


@pytest.mark.slow  # compiles for long
def test_the_gradient_of_sigma_is_that_of_the_expected_loss():
    """Mean over many draws of the weights against finite differences of the expectation, at common draws."""
    cfg = dataclasses.replace(CFG, weight_samples=64, kl_weight=0.0)
    state = init(cfg)

    def expected_loss(shift):
        raw = jax.tree.map(lambda leaf: leaf + shift, state.raw)
        return step(KEY, state._replace(raw=raw), batch(), PARAMS, cfg)[1].loss

    numeric = (expected_loss(1e-2) - expected_loss(-1e-2)) / 2e-2

    def total_gradient(state):
        grads = {}

        def spy(both, found, norm, cfg):
            grads.update(found)
            return both

        keep, bayes_dm._update = bayes_dm._update, spy
        try:
            bayes_dm.step(KEY, state, batch(), PARAMS, cfg, **NETWORK)
        finally:
            bayes_dm._update = keep
        return sum(leaf.sum() for leaf in jax.tree.leaves(grads["raw"]))

    np.testing.assert_allclose(total_gradient(state), numeric, rtol=2e-2)


def test_sigma_has_its_own_rate_and_decay():
    moved, _ = step(KEY, init(CFG), batch(), PARAMS, CFG)
    change = np.concatenate([np.ravel(leaf) - 0.1 for leaf in jax.tree.leaves(moved.raw)])
    np.testing.assert_allclose(np.abs(change), 1e-2, rtol=1e-2)  # Adam's first step is its rate
    frozen, _ = step(KEY, init(CFG), batch(), PARAMS, dataclasses.replace(CFG, sigma_rate=0.0))
    assert all((leaf == np.float32(0.1)).all() for leaf in jax.tree.leaves(frozen.raw))
    decayed, _ = step(KEY, init(CFG), batch(), PARAMS, dataclasses.replace(CFG, sigma_decay=0.5))
    again = np.concatenate([np.ravel(leaf) - 0.1 for leaf in jax.tree.leaves(decayed.raw)])
    np.testing.assert_allclose(again, change - 1e-2 * 0.5 * 0.1, atol=1e-6)


def test_sigma_stays_above_its_bound_or_positive():
    small = dataclasses.replace(CFG, sigma0=1e-3, sigma_min=5e-4, sigma_rate=1e-2)
    soft = dataclasses.replace(small, parameterisation="softplus", sigma_rate=1.0)
    for cfg, floor in ((small, 5e-4), (soft, 0.0)):
        state = init(cfg)
        np.testing.assert_allclose(jax.tree.leaves(bayes_dm.deviations(state.raw, cfg))[0], 1e-3, rtol=1e-4)
        for i in range(3):
            state, info = step(jax.random.fold_in(KEY, i), state, batch(i), PARAMS, cfg)
        sigma = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(bayes_dm.deviations(state.raw, cfg))])
        assert (sigma >= np.float32(floor)).all()
        assert (sigma > 0).all()
        assert info.finite


def test_kl_pulls_towards_the_prior():
    far = dataclasses.replace(CFG, kl_weight=1e4, sigma_rate=1e-3)
    state = init(far)
    wide = state._replace(raw=jax.tree.map(lambda leaf: 3 * leaf, state.raw))
    moved, info = step(KEY, wide, batch(), PARAMS, far)
    assert info.kl > 0
    assert all((new < old).all() for new, old in zip(*map(jax.tree.leaves, (moved.raw, wide.raw)), strict=True))


@pytest.mark.slow  # compiles for long
def test_halves_can_have_weights_of_their_own():
    shared, separate = CFG, dataclasses.replace(CFG, halves="separate")
    frozen = dict(sigma0=0.0, sigma_min=0.0, sigma_rate=0.0, kl_weight=0.0)
    losses = {}
    for name, cfg in (("shared", shared), ("separate", separate)):
        losses[name] = step(KEY, init(cfg), batch(), PARAMS, cfg)[1]
        still = dataclasses.replace(cfg, **frozen)
        losses[name, "still"] = step(KEY, init(still), batch(), PARAMS, still)[1]
    np.testing.assert_allclose(losses["shared"].instance_loss, losses["separate"].instance_loss, rtol=1e-5)
    assert losses["shared"].prior_loss != losses["separate"].prior_loss
    for part in ("instance_loss", "prior_loss"):  # without noise of the weights there is no difference
        kinds = [getattr(losses[name, "still"], part) for name in ("shared", "separate")]
        np.testing.assert_allclose(*kinds, rtol=1e-5)


@pytest.mark.slow  # compiles for long
def test_pieces_are_the_whole():
    options = {**NETWORK}
    whole, _ = jax.jit(partial(bayes_dm.run, **options))(KEY, DATA, PARAMS, CFG)
    advance = jax.jit(partial(bayes_dm.advance, **options), static_argnames="num_steps")
    state = bayes_dm.init(jax.random.fold_in(KEY, bayes_dm.START), PARAMS, CFG, adapter=full())
    for count in (1, 2):
        state, _ = advance(KEY, state, DATA, PARAMS, CFG, num_steps=count)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state, whole)


@pytest.mark.parametrize(
    ("adapter", "selection"), [(lora(1, targets=("mix/kernel",)), "lora-up"), (oft(1, ("mix/kernel",)), "oft")]
)
def test_any_trainable_tree_can_have_a_posterior(adapter, selection):
    cfg = dataclasses.replace(CFG, selection=selection)
    options = NETWORK | {"adapter": adapter}
    state, info = jax.jit(partial(bayes_dm.run, **options))(KEY, DATA, PARAMS, cfg)
    assert info.finite.all()
    (path,) = trees.flatten(state.raw)
    assert path.endswith("/up" if selection == "lora-up" else "/generator")
    other = bayes_dm.sample(KEY, state, cfg)
    assert not np.allclose(trees.flatten(other)[path], trees.flatten(bayes_dm.mean(state))[path])


def test_dropout_drops_what_was_learnt_and_keeps_its_mean():
    prior, mu = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([1.5, -2.0]), "b": jnp.ones(1)}
    drawn = jax.vmap(lambda key: bayes_dm.dropped(key, mu, prior, 0.25))(jax.random.split(KEY, 4000))
    values, counts = np.unique(drawn["a"][:, 0], return_counts=True)
    np.testing.assert_allclose(values, [1.0, 1.0 + 0.5 / 0.75])
    assert abs(counts[0] / 4000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    assert (drawn["a"][:, 1] == -2.0).all()
    assert (drawn["b"] == 1).all()


def test_a_step_with_dropout_leaves_sigma_alone():
    cfg = dataclasses.replace(CFG, noise="dropout", dropout=0.5, kl_weight=0.0)
    state = init(cfg)
    away = jax.tree.map(lambda leaf: leaf + 0.3, state.tuned.trainable)  # so that there is something to drop
    state = state._replace(tuned=state.tuned._replace(trainable=away))
    moved, info = step(KEY, state, batch(), PARAMS, cfg)
    _, other = step(KEY, state, batch(), PARAMS, dataclasses.replace(cfg, dropout=0.0))
    assert info.loss != other.loss
    jax.tree.map(np.testing.assert_array_equal, moved.raw, state.raw)


def test_activations_get_the_deviations_of_dense_layers_and_the_rest_is_drawn():
    """`noisy_fn` sees the kernel's sigma and the perturbed scale; here it draws what the layer's output would have."""
    seen = {}

    def noisy_fn(params, sigma, key, z_t, t, context):
        seen["sigma"], seen["scale"] = sigma, params["norm"]["scale"]
        h = z_t @ params["mix"]["kernel"] + params["mix"]["bias"] + 1e-3 * t[:, None, None, None]
        spread = jnp.sqrt(jnp.square(z_t) @ jnp.square(sigma["mix"]["kernel"]))
        h = jnp.tanh(h + spread * jax.random.normal(key, h.shape))
        return params["norm"]["scale"] * (h + context.mean(1)[:, None, None, :])

    cfg = dataclasses.replace(CFG, noise="activations", kl_weight=0.0)
    state = init(cfg)
    moved, info = bayes_dm.step(KEY, state, batch(), PARAMS, cfg, noisy_fn=noisy_fn, **NETWORK)
    assert list(trees.flatten(seen["sigma"])) == ["mix/kernel"]
    assert info.finite
    assert all((new != old).all() for new, old in zip(*map(jax.tree.leaves, (moved.raw, state.raw)), strict=True))
    with pytest.raises(ValueError, match="noise must be of weights unless .* got activations"):
        step(KEY, state, batch(), PARAMS, cfg)


def test_shares_of_stable_diffusion_are_the_papers():
    tree = jax.eval_shape(lambda: unet.init(KEY, presets.SD15.unet))
    share = lambda name: trees.count(bayes_dm.selected(tree, Config(selection=name)))
    total = trees.count(tree)
    assert total == 859_520_964
    for name, percent in {"linear": 23.08, "up": 12.02, "up+time": 13.83, "norm": 0.02}.items():
        assert round(100 * share(name) / total, 2) == percent, (name, share(name))


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="selection must be one of norm"):
        init(dataclasses.replace(CFG, selection="everything"))
    with pytest.raises(ValueError, match="weight_samples must be at least 1"):
        init(dataclasses.replace(CFG, weight_samples=0))
    with pytest.raises(ValueError, match="found in some parameter path, got 'absent'"):
        init(dataclasses.replace(CFG, selection=("absent",)))
