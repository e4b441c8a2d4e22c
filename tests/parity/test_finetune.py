"""Fine-tuning against PyTorch: clipping with AdamW, low-rank layers, and whole DreamBooth steps of a small network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion.schedule import ScheduleConfig, add_noise, alpha_bars
from dmsec_jax.finetune import dreambooth
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.dreambooth import Config, draw
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.finetune.lora import lora

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tensor(array):
    return torch.tensor(np.asarray(array))


def nchw(array):
    return tensor(array).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [0.01, 10.0], ids=["unclipped", "clipped"])
def test_forty_updates_equal_torch_adamw_with_clipping(size):
    cfg = Config(learning_rate=3e-3, weight_decay=0.05, beta1=0.8, beta2=0.95, adam_epsilon=1e-4, clip_norm=1.0)
    params = {"a": normal(1, 3, 4), "b": normal(2, 5)}
    state = dreambooth.init(KEY, params, cfg, adapter=full())
    twins = [torch.nn.Parameter(tensor(params[name])) for name in "ab"]
    optimizer = torch.optim.AdamW(twins, lr=3e-3, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.05)
    update = jax.jit(dreambooth.update)
    for i in range(40):
        grads = {"a": size * normal(100 + i, 3, 4), "b": size * normal(200 + i, 5)}
        for twin, name in zip(twins, "ab", strict=True):
            twin.grad = tensor(grads[name])
        norm = torch.nn.utils.clip_grad_norm_(twins, 1.0)
        optimizer.step()
        state = update(state, grads, jnp.float32(norm.item()), cfg)
    for twin, name in zip(twins, "ab", strict=True):
        np.testing.assert_allclose(state.trainable[name], twin.detach(), rtol=1e-5, atol=1e-6)


def test_default_constants_are_those_of_torch():
    cfg, theirs = Config(), torch.optim.AdamW([torch.zeros(1)]).defaults
    ours = [(cfg.beta1, cfg.beta2), cfg.adam_epsilon, cfg.weight_decay]
    assert ours == [theirs["betas"], theirs["eps"], theirs["weight_decay"]]


def test_low_rank_layers_equal_torch_modules():
    base = {
        "attn1": {"to_q": {"kernel": normal(1, 6, 5)}},
        "resnets_0": {"conv1": {"kernel": normal(2, 3, 3, 6, 5)}},
    }
    adapter = lora(2, 6, ("kernel",))
    trainable = jax.tree.map(lambda leaf: leaf + normal(leaf.size, *leaf.shape), adapter.init(KEY, base))
    merged = adapter.merge(base, trainable)

    x, low = normal(3, 7, 6), trainable["attn1"]["to_q"]
    side = torch.nn.functional.linear(torch.nn.functional.linear(tensor(x), tensor(low["down"].T)), tensor(low["up"].T))
    theirs = torch.nn.functional.linear(tensor(x), tensor(base["attn1"]["to_q"]["kernel"].T)) + 3 * side
    np.testing.assert_allclose(x @ merged["attn1"]["to_q"]["kernel"], theirs, rtol=1e-4, atol=1e-4)

    def oihw(kernel):
        return tensor(kernel).permute(3, 2, 0, 1)

    z, low = normal(4, 2, 5, 5, 6), trainable["resnets_0"]["conv1"]
    side = torch.nn.functional.conv2d(nchw(z), oihw(low["down"]), padding=1)
    side = torch.nn.functional.conv2d(side, oihw(low["up"][None, None]))
    kernel = base["resnets_0"]["conv1"]["kernel"]
    theirs = (torch.nn.functional.conv2d(nchw(z), oihw(kernel), padding=1) + 3 * side).permute(0, 2, 3, 1)
    dims = ("NHWC", "HWIO", "NHWC")
    ours = jax.lax.conv_general_dilated(
        z, merged["resnets_0"]["conv1"]["kernel"], (1, 1), "SAME", dimension_numbers=dims
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 48), (7, 48, 3, 3)], ids=["dense", "convolution"])
def test_initial_bound_is_that_of_kaiming_uniform(shape):
    torch.manual_seed(0)
    theirs = torch.empty(shape)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    kernel = jnp.zeros((*shape[2:], shape[1], 9))
    ours = lora(7, targets=("kernel",)).init(KEY, {"x": {"kernel": kernel}})["x"]["down"]
    np.testing.assert_allclose(np.abs(ours).max(), theirs.abs().max(), rtol=0.02)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.1)


def test_dreambooth_steps_equal_a_torch_loop():
    """Eight steps with class pictures and two microbatches; PyTorch is given the same latents, t and noise."""
    cfg = Config(num_steps=8, batch_size=2, accumulation=2, learning_rate=1e-2, prior_weight=0.7, clip_norm=0.5)
    params = {
        "up": {"kernel": normal(1, 3, 8)},
        "text": {"kernel": normal(2, 5, 8)},
        "down": {"kernel": normal(3, 8, 3)},
    }
    means = normal(4, 3, 4, 4, 3)
    data = Data(
        examples(means, normal(5, 3, 2, 5), 0 * means - 1), examples(means + 2, normal(6, 1, 2, 5), 0 * means - 3)
    )

    def eps_fn(params, z_t, t, context):
        h = jnp.tanh(z_t @ params["up"]["kernel"] + (context.mean(1) @ params["text"]["kernel"])[:, None, None])
        return h @ params["down"]["kernel"]

    schedule, adapter = ScheduleConfig(), full()
    state = dreambooth.init(KEY, params, cfg, adapter=adapter)
    run = jax.jit(dreambooth.run, static_argnames=("eps_fn", "adapter"))
    state, info = run(KEY, state, data, params, cfg, eps_fn=eps_fn, adapter=adapter, schedule=schedule)

    up, text, down = (torch.nn.Parameter(tensor(params[name]["kernel"])) for name in ("up", "text", "down"))
    optimizer = torch.optim.AdamW([up, text, down], lr=1e-2)
    alpha_bar = alpha_bars(schedule)
    for i in range(8):
        batch, key = draw(KEY, i, data, cfg), jax.random.fold_in(KEY, i)
        terms = []
        for own, rows in zip(jax.random.split(key), batch, strict=True):
            keys = jax.vmap(lambda j, own=own: jax.random.fold_in(own, j))(jnp.arange(4))
            z0, t, noise = dreambooth.corrupt(keys, rows, cfg, schedule)
            z_t = add_noise(alpha_bar, z0, noise, t)
            context = tensor(rows.prompt).mean(1)
            h = torch.tanh(tensor(z_t) @ up + (context @ text)[:, None, None])
            terms.append(torch.nn.functional.mse_loss(h @ down, tensor(noise)))
        loss = terms[0] + 0.7 * terms[1]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([up, text, down], 0.5)
        optimizer.step()
        ours = [info.instance_loss[i], info.prior_loss[i], info.loss[i], info.grad_norm[i]]
        theirs = [term.item() for term in (*terms, loss, norm)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert info.grad_norm.max() > 0.5  # clipping was at work
    for twin, name in ((up, "up"), (text, "text"), (down, "down")):
        np.testing.assert_allclose(state.trainable[name]["kernel"], twin.detach(), rtol=1e-4, atol=1e-5)
