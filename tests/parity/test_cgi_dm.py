"""CGI-DM's public algorithm in PyTorch, written afresh, on the same weights, mask and noise: ten steps end in the same place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.data import images
from dmsec_jax.diffusion import draws
from dmsec_jax.methods import cgi_dm

pytestmark = pytest.mark.torch
PROMPT = "a twemoji icon of a red heart"
STEPS = 10
PICTURES = pipeline.EMBEDDED.parent / "openmoji-animals" / "member"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(pipeline, parameters of a second model, its folder, latent of a picture, mask)."""
    base = pipeline.load()
    leaves, tree = jax.tree.flatten(base.params["unet"])
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [w * (1 + 0.05 * jax.random.normal(key, w.shape)) for key, w in zip(keys, leaves, strict=True)]
    tuned = {**base.params, "unet": jax.tree.unflatten(tree, moved)}
    folder = tmp_path_factory.mktemp("tuned") / "model"
    pipeline.save(folder, dataclasses.replace(base, params=tuned))
    z, _ = pipeline.encode(base, images.read_folder(PICTURES, base.pixels).images[:1])
    side = base.latent_shape[0]
    return base, tuned, folder, z, cgi_dm.checkerboard(side, side)


def nchw(x):
    import torch

    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def twin(case, cfg, key, start):
    """The public loop: one timestep and two independent noises per step, one gradient divided by its norm, clamp, ball."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    base, _, folder, z, mask = case
    nets = [UNet2DConditionModel.from_pretrained(str(path), subfolder="unet").eval() for path in (folder, base.folder)]
    alpha_bar = DDPMScheduler.from_pretrained(str(base.folder), subfolder="scheduler").alphas_cumprod
    context = torch.from_numpy(np.array(pipeline.contexts(base, [PROMPT])))
    z, mask, start = nchw(z), nchw(mask), nchw(start)
    delta, contrasts = torch.zeros_like(start), []
    for i in range(cfg.num_steps):
        own = jax.random.fold_in(jax.random.fold_in(key, i), 0)
        t, noise_base = draws.uniform_draw(own, jnp.int32(0), 1, base.latent_shape, (cfg.t_min, cfg.t_max))
        other = jax.random.fold_in(own, 1)
        noise_tuned = draws.uniform_draw(other, jnp.int32(0), 1, base.latent_shape, (cfg.t_min, cfg.t_max))[1]
        a = alpha_bar[int(t)]
        delta = delta.detach().requires_grad_()
        w = z * mask + (start + delta) * (1 - mask)

        def loss(net, noise, w=w, a=a, t=int(t)):
            noise = nchw(noise[None])
            z_t = a.sqrt() * w + (1 - a).sqrt() * noise
            velocity = net(z_t, torch.tensor([t]), context).sample
            return ((a.sqrt() * velocity + (1 - a).sqrt() * z_t - noise) ** 2).mean()

        contrast = loss(nets[0], noise_tuned) - loss(nets[1], noise_base)
        (gradient,) = torch.autograd.grad(contrast, delta)
        contrasts.append(float(contrast.detach()))
        with torch.no_grad():
            moved = delta - cfg.alpha * gradient / gradient.norm()
            moved = (start + moved).clamp(-100, 100) - start
            delta = moved * min(1.0, cfg.eps / max(float(moved.norm()), 1e-4))
    return np.moveaxis(delta.detach().numpy(), 1, -1), np.array(contrasts)


@pytest.mark.parametrize("eps", [70.0, 3.0], ids=["free", "at the ball"])
def test_ten_public_steps_agree(case, eps):
    base, tuned, _, z, mask = case
    cfg = cgi_dm.Config(noise="independent", num_steps=STEPS, eps=eps, alpha=1.0)
    start = cgi_dm.kept(z, mask, cfg)
    context = pipeline.contexts(base, [PROMPT])[:, None][0]
    pair_fn, params = pipeline.pair(base, (base.params["unet"], context), (tuned["unet"], context))
    run = jax.jit(cgi_dm.run, static_argnames=("pair_fn", "schedule"))
    key = jax.random.key(4)
    state, info = run(
        key, z, start, jnp.asarray(mask), jnp.arange(1), params, cfg, pair_fn=pair_fn, schedule=base.schedule
    )
    delta, contrasts = twin(case, cfg, key, start)
    assert np.linalg.norm(np.asarray(state.delta) - delta) <= 1e-3 * np.linalg.norm(delta)
    np.testing.assert_allclose(info.contrast[:, 0], contrasts, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(delta) > 0.5
