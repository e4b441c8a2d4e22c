"""AdvDM, SDS and Mist in PyTorch, written afresh on the embedded model's weights: the same gradients, steps that end in the same place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.core import pgd
from dmsec_jax.core.pgd import Budget
from dmsec_jax.data import images
from dmsec_jax.diffusion import draws
from dmsec_jax.methods import advdm

pytestmark = pytest.mark.torch
PROMPT = "a twemoji icon of a red heart"
PICTURES = pipeline.EMBEDDED.parent / "openmoji-animals"
STEPS = 5
ATTACK = pgd.Config(budget=Budget(8, "8bit"), step_size=Budget(2, "8bit"), num_steps=STEPS)
CFG = advdm.Config(attack=ATTACK, rate=600.0)
OBJECTIVES = {"advdm": advdm.denoising, "sds": advdm.distillation, "mist": advdm.fused}


@pytest.fixture(scope="module")
def case():
    """(pipeline, picture [1, H, W, 3], target latent, context)."""
    base = pipeline.load()
    picture = images.read_folder(PICTURES / "member", base.pixels).images[:1]
    target, _ = pipeline.encode(base, images.read_folder(PICTURES / "holdout", base.pixels).images[:1])
    return base, picture, target, pipeline.contexts(base, [PROMPT])


def nchw(x):
    import torch

    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def twin(case, name, cfg, key):
    """(delta, the gradient of the first step, L_DM of every step): one timestep, noise and posterior draw each, sign steps, ball, box."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    base, picture, target, context = case
    load = lambda kind, part: kind.from_pretrained(str(base.folder), subfolder=part).eval()
    net, vae = load(UNet2DConditionModel, "unet"), load(AutoencoderKL, "vae")
    alpha_bar = DDPMScheduler.from_pretrained(str(base.folder), subfolder="scheduler").alphas_cumprod
    x, target, context = nchw(picture), nchw(target), torch.from_numpy(np.array(context))
    radius, size = (part.to("pm1") for part in (cfg.attack.budget, cfg.attack.step_size))
    delta, losses, first = torch.zeros_like(x), [], None
    for i in range(cfg.attack.num_steps):
        own = jax.random.fold_in(jax.random.fold_in(key, i), 0)
        t, noise = draws.uniform_draw(own, jnp.int32(0), 1, base.latent_shape, (cfg.t_min, cfg.t_max))
        own_posterior = jax.random.fold_in(jax.random.fold_in(own, 1), 0)
        posterior = nchw(draws.standard_normal(own_posterior, base.latent_shape)[None])
        a, noise, adversarial = alpha_bar[int(t)], nchw(noise[None]), (x + delta).detach().requires_grad_()
        moments = vae.encode(adversarial).latent_dist
        z = (moments.mean + moments.std * posterior) * vae.config.scaling_factor
        with torch.set_grad_enabled(name != "sds"):
            z_t = a.sqrt() * z + (1 - a).sqrt() * noise
            velocity = net(z_t, torch.tensor([int(t)]), context).sample
            error = a.sqrt() * velocity + (1 - a).sqrt() * z_t - noise
        loss = (error**2).mean()
        if name == "sds":
            (gradient,) = torch.autograd.grad(z, adversarial, grad_outputs=error.detach())
        else:
            objective = cfg.rate * loss - ((z - target) ** 2).sum() if name == "mist" else loss
            (gradient,) = torch.autograd.grad(objective, adversarial)
        first = gradient if first is None else first
        losses.append(float(loss.detach()))
        moved = (delta + size * gradient.sign()).clamp(-radius, radius)
        delta = (x + moved).clamp(-1, 1) - x
    return np.moveaxis(delta.numpy(), 1, -1), np.moveaxis(first.numpy(), 1, -1), np.array(losses)


def prepared(base, context):
    """(encode_fn, eps_fn, params) as the method takes them."""
    eps_fn, params = pipeline.single(base, base.params["unet"], context)
    encode_fn = lambda params, image: base.functions.encode_fn(params["vae"], image)
    return encode_fn, eps_fn, {**params, "vae": base.params["vae"]}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_steps_agree(case, name):
    base, picture, target, context = case
    encode_fn, eps_fn, params = prepared(base, context)
    options = {"encode_fn": encode_fn, "eps_fn": eps_fn, "schedule": base.schedule, "objective_fn": OBJECTIVES[name]}
    key, mask = jax.random.key(4), jnp.ones((1, 1, 1, 1))
    run = jax.jit(lambda params: advdm.run(key, picture, mask, target, jnp.arange(1), params, CFG, **options))
    state, info = run(params)
    delta, gradient, losses = twin(case, name, CFG, key)
    np.testing.assert_allclose(info.value[0, 0], losses[0], rtol=1e-4)
    np.testing.assert_allclose(info.value[:, 0], losses, rtol=0.02)
    np.testing.assert_allclose(info.gradient_norm[0, 0], np.linalg.norm(gradient), rtol=1e-3)
    # a sign flips where the gradient is near zero; such pixels are few, and elsewhere the paths are the same
    ours = np.asarray(state.attack.delta)
    assert (np.abs(ours - delta) > 1e-4).mean() < 0.02
    assert np.abs(delta).mean() > 4 / 255
