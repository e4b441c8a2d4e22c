"""Bayesian fine-tuning against PyTorch: ten steps at the same noise, and the divergences of torch.distributions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.methods import bayes_dm
from dmsec_jax.methods.bayes_dm import Config

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

KEY = jax.random.key(0)
SELECTED = ("kernel", "scale")
CFG = Config(
    num_steps=10,
    batch_size=2,
    learning_rate=1e-2,
    prior_weight=0.7,
    clip_norm=0.5,
    sample_posterior=False,
    selection=SELECTED,
    sigma0=0.1,
    sigma_min=0.097,  # reached by some weights
    sigma_rate=1e-3,
    sigma_decay=0.05,
    kl_weight=0.3,
    weight_samples=2,
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tensor(array):
    return torch.tensor(np.asarray(array))


PARAMS = {
    "kernel": 0.3 * normal(1, 3, 3),
    "text": normal(2, 5, 3),  # trained without a posterior
    "scale": jnp.ones(3),
}
MEANS = normal(3, 3, 4, 4, 3)
DATA = Data(examples(MEANS, normal(4, 3, 2, 5)), examples(MEANS + 2, normal(5, 1, 2, 5)))


def eps_fn(params, z_t, t, context):
    hidden = jnp.tanh(z_t @ params["kernel"] + (context.mean(1) @ params["text"])[:, None, None])
    return params["scale"] * hidden


def drawn(key, i, k):
    """Standard normal noise of the weights of draw k in step i."""
    own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, i), bayes_dm.WEIGHTS), k)
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in PARAMS.items()}
    noise = bayes_dm.perturbed(own, zeros, {name: jnp.ones_like(PARAMS[name]) for name in SELECTED})
    return {name: tensor(noise[name]) for name in SELECTED}


def denoising(weights, key, i, schedule):
    """Instance loss plus the weighted prior loss, at the latents, t and noise that our step draws."""
    batch, terms = dreambooth.draw(key, i, DATA, CFG), []
    for own, rows in zip(jax.random.split(jax.random.fold_in(key, i)), batch, strict=True):
        keys = jax.vmap(lambda j, own=own: jax.random.fold_in(own, j))(jnp.arange(2))
        z0, t, noise = dreambooth.corrupt(keys, rows, CFG, schedule)
        z_t = tensor(add_noise(alpha_bars(schedule), z0, noise, t))
        hidden = torch.tanh(z_t @ weights["kernel"] + (tensor(rows.prompt).mean(1) @ weights["text"])[:, None, None])
        terms.append(torch.nn.functional.mse_loss(weights["scale"] * hidden, tensor(noise)))
    return terms[0] + CFG.prior_weight * terms[1]


def divergence(mu, sigma, direction):
    """Mean over weights of KL by torch.distributions."""
    total, count = 0.0, 0
    for name in SELECTED:
        q = torch.distributions.Normal(mu[name], sigma[name])
        p = torch.distributions.Normal(tensor(PARAMS[name]), CFG.sigma0)
        pair = (q, p) if direction == "posterior-prior" else (p, q)
        total = total + torch.distributions.kl_divergence(*pair).sum()
        count += q.loc.numel()
    return total / count


@pytest.mark.parametrize("direction", ["posterior-prior", "prior-posterior"])
def test_ten_steps_equal_a_torch_loop(direction):
    cfg, schedule = dataclasses.replace(CFG, kl=direction), ScheduleConfig()
    ours, info = jax.jit(
        lambda state: bayes_dm.advance(
            KEY, state, DATA, PARAMS, cfg, num_steps=10, eps_fn=eps_fn, adapter=full(), schedule=schedule
        )
    )(bayes_dm.init(KEY, PARAMS, cfg, adapter=full()))

    mu = {name: torch.nn.Parameter(tensor(leaf)) for name, leaf in PARAMS.items()}
    sigma = {name: torch.nn.Parameter(torch.full_like(mu[name], cfg.sigma0)) for name in SELECTED}
    everything = [*mu.values(), *sigma.values()]
    optimizer = torch.optim.AdamW([
        {"params": list(mu.values()), "lr": cfg.learning_rate, "weight_decay": cfg.weight_decay},
        {"params": list(sigma.values()), "lr": cfg.sigma_rate, "weight_decay": cfg.sigma_decay},
    ])  # fmt: skip
    losses, divergences, norms = [], [], []
    for i in range(10):
        loss = 0.0
        for k in range(2):
            noise = drawn(KEY, i, k)
            weights = {name: mu[name] + sigma[name] * noise[name] if name in noise else mu[name] for name in mu}
            loss = loss + denoising(weights, KEY, i, schedule) / 2
        kl = divergence(mu, sigma, direction)
        optimizer.zero_grad()
        (loss + cfg.kl_weight * kl).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(everything, cfg.clip_norm).item())
        optimizer.step()
        with torch.no_grad():
            for leaf in sigma.values():
                leaf.clamp_(min=cfg.sigma_min)
        losses.append(loss.item())
        divergences.append(kl.item())
    assert max(norms) > cfg.clip_norm
    assert any((leaf == np.float32(cfg.sigma_min)).any() for leaf in ours.raw.values())
    np.testing.assert_allclose(info.loss, losses, rtol=1e-4)
    np.testing.assert_allclose(info.kl, divergences, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(info.grad_norm, norms, rtol=1e-3)
    for name, leaf in mu.items():
        np.testing.assert_allclose(ours.tuned.trainable[name], leaf.detach(), rtol=1e-3, atol=1e-5)
    for name, leaf in sigma.items():
        np.testing.assert_allclose(ours.raw[name], leaf.detach(), rtol=1e-3)
