"""Blocks at their full size, and the whole UNet of Stable Diffusion 1.5: what tiny widths could hide (heads, groups, depth, text of width 2048)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.checkpoints import configs, mapping
from dmsec_jax.core import trees
from dmsec_jax.models import presets, unet

pytestmark = pytest.mark.torch
FORWARD, GRADIENT = 1e-4, 1e-3  # largest absolute difference; relative error in the Euclidean norm


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(array):
    """NHWC, or [B, L, D], as PyTorch has it."""
    torch = pytest.importorskip("torch")
    array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
    return torch.tensor(np.ascontiguousarray(array), requires_grad=True)


def to_numpy(tensor):
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def assert_alike(ours, theirs):
    """Outputs and gradients of the inputs of both sides."""
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert np.max(np.abs(np.asarray(one) - to_numpy(other))) < FORWARD
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert np.linalg.norm(np.asarray(one) - to_numpy(other)) < GRADIENT * np.linalg.norm(to_numpy(other))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "level", "size"), [("SD15", 1, 36_818_560), ("SDXL", 1, 60_105_600)])
def test_a_block(preset, level, size):
    """Two residual blocks, two transformers (of one layer with a convolution before it; of two with a linear layer), halving."""
    torch = pytest.importorskip("torch")
    blocks = pytest.importorskip("diffusers.models.unets.unet_2d_blocks")
    cfg = getattr(presets, preset).unet
    widths = cfg.block_out_channels
    heads, depths = unet.per_level(cfg.attention_head_dim, cfg), unet.per_level(cfg.transformer_layers_per_block, cfg)
    torch.manual_seed(0)
    network = blocks.CrossAttnDownBlock2D(
        in_channels=widths[level - 1],
        out_channels=widths[level],
        temb_channels=4 * widths[0],
        num_layers=cfg.layers_per_block,
        transformer_layers_per_block=depths[level],
        resnet_eps=cfg.norm_eps,
        resnet_act_fn="silu",
        num_attention_heads=heads[level],
        cross_attention_dim=cfg.cross_attention_dim,
        use_linear_projection=cfg.use_linear_projection,
    ).eval()
    x, time, context = (
        draw(1, 8, 8, widths[level - 1]),
        draw(1, 4 * widths[0], seed=1),
        draw(1, 5, cfg.cross_attention_dim),
    )
    inputs = [to_torch(array) for array in (x, time, context)]
    out, skips = network(*inputs)
    theirs = (out, *skips)
    cotangents = [draw(*to_numpy(part).shape, seed=i) for i, part in enumerate(theirs)]
    sum((part * to_torch(weight).detach()).sum() for part, weight in zip(theirs, cotangents, strict=True)).backward()

    module = unet.DownBlock(cfg, widths[level], heads[level], depths[level], True)
    target = jax.eval_shape(module.init, jax.random.key(0), x, time, context)["params"]
    params = mapping.to_tree({name: t.numpy() for name, t in network.state_dict().items()}, mapping.UNET, target)
    assert trees.count(params) == size

    @jax.jit
    def run(params, cotangents, *inputs):
        apply = lambda *inputs: (lambda out, skips: (out, *skips))(*module.apply({"params": params}, *inputs))
        outputs, pullback = jax.vjp(apply, *inputs)
        return outputs, pullback(cotangents)

    assert_alike(run(params, tuple(cotangents), x, time, context), (theirs, [tensor.grad for tensor in inputs]))


@pytest.mark.long
def test_the_whole_unet_of_sd15():
    """860 million parameters on a latent of 8 x 8; takes 8 GB."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    cfg = presets.SD15.unet
    values = configs.write_config(cfg, configs.UNET)
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**{key: value for key, value in values.items() if not key.startswith("_")})
    for parameter in network.eval().parameters():
        parameter.requires_grad_(False)
    z_t, context, cotangent = draw(1, 8, 8, 4), draw(1, 5, 768, seed=1), draw(1, 8, 8, 4, seed=2)
    their_z, their_context = to_torch(z_t), to_torch(context)
    out = network(their_z, torch.tensor([301]), encoder_hidden_states=their_context).sample
    (out * to_torch(cotangent).detach()).sum().backward()
    target = jax.eval_shape(functools.partial(unet.init, cfg=cfg), jax.random.key(0))
    params = mapping.to_tree({name: t.numpy() for name, t in network.state_dict().items()}, mapping.UNET, target)
    del network

    @jax.jit
    def run(params, z_t, context):
        apply = lambda z_t, context: unet.apply(cfg, params, z_t, jnp.array([301.0]), context)
        output, pullback = jax.vjp(apply, z_t, context)
        return (output,), pullback(cotangent)

    assert_alike(run(params, z_t, context), ((out,), [their_z.grad, their_context.grad]))
