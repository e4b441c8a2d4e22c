"""The networks against diffusers and transformers on random weights: every layer, the output, every gradient."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.checkpoints import configs, mapping
from dmsec_jax.core import trees
from dmsec_jax.models import clip, conditioning, presets, unet, vae

pytestmark = pytest.mark.torch

SMALL = 0.02
FORWARD, GRADIENT = 1e-4, 1e-3  # largest absolute difference; relative error in the Euclidean norm of each leaf

SD1 = presets.TINY.unet
SD2 = dataclasses.replace(
    SD1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    layers_per_block=2,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
)
XL = presets.TINY_XL.unet
TEXT = presets.TINY.text
ACTIVATED = re.compile(r"(resnets_\d+/norm\d|conv_norm_out)$")


# ---------------------------------------------------------------------------------------------- the PyTorch side


def foreign(class_name, cfg, fmt, device="cpu", gain=1.0):
    """The diffusers or transformers network that our config describes; all parameters random.

    A small `gain` makes activations so small that the epsilon of every normalisation shows.
    """
    torch = pytest.importorskip("torch")
    is_text = class_name.startswith("CLIP")
    library = pytest.importorskip("transformers" if is_text else "diffusers")
    kind, values = getattr(library, class_name), configs.write_config(cfg, fmt)
    torch.manual_seed(0)
    with torch.device(device):
        if is_text:
            network = kind(library.CLIPTextConfig(**values))
        else:
            network = kind(**{key: value for key, value in values.items() if not key.startswith("_")})
    if device == "cpu":
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                fan_in = np.prod(parameter.shape[1:]) if parameter.ndim > 1 and "embedding." not in name else 25
                mean = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                is_norm = parameter.ndim == 1 and "norm" in name
                parameter.normal_(mean, float(fan_in) ** -0.5 * (1.0 if is_norm else gain))
    return network.eval()


def record_layers(network):
    """Path of each module -> what it returned in the last forward pass (the first output where there are several)."""
    outputs = {}

    def hook(name, _module, _inputs, output):
        several = isinstance(output, tuple) or hasattr(output, "to_tuple")
        first = output[0] if several else output
        if hasattr(first, "detach"):
            outputs[mapping.path_of(name)] = first.detach().numpy()

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(functools.partial(hook, name))
    return outputs


def to_nchw(array):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1), requires_grad=True)


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def gradients_of(network, rules, target):
    """The parameters' gradients as our tree."""
    return mapping.to_tree({name: p.grad.numpy() for name, p in network.named_parameters()}, rules, target)


def params_of(network, rules, init, cfg):
    target = jax.eval_shape(functools.partial(init, cfg=cfg), jax.random.key(0))
    return mapping.to_tree({name: t.numpy() for name, t in network.state_dict().items()}, rules, target), target


# ----------------------------------------------------------------------------------------------- the comparisons


@functools.cache
def run_with_layers(module, method=None):
    """jitted (params, inputs, cotangents) -> outputs, {path: layer output}, gradients of (params, inputs)."""

    @jax.jit
    def run(params, inputs, cotangents):
        def forward(params, inputs):
            out, state = module.apply(
                {"params": params}, *inputs, method=method, capture_intermediates=True, mutable=["intermediates"]
            )
            return out, state["intermediates"]

        out, pullback, layers = jax.vjp(forward, params, inputs, has_aux=True)
        return out, layers, pullback(cotangents)

    return run


def check_layers(ours, theirs):
    """Every layer that both sides have; each of our layers must be there."""
    outputs = {path.removesuffix("/__call__"): leaf for path, leaf in trees.flatten(ours).items() if "__call__" in path}
    outputs.pop("__call__", None)
    assert outputs.keys() <= theirs.keys(), sorted(outputs.keys() - theirs.keys())
    for path, value in outputs.items():
        value = value[0]
        value = np.asarray(value[0] if isinstance(value, tuple) else value)
        peer = theirs[path]
        if ACTIVATED.search(path):  # our normalisation includes the activation that follows it
            peer = peer / (1 + np.exp(-peer))
        if peer.ndim == 4 or path.endswith("group_norm"):
            peer = np.moveaxis(peer, 1, -1)
        error = np.max(np.abs(value - peer.reshape(value.shape)))
        assert error < FORWARD, f"{path}: {error}"
    return len(outputs)


def check_gradients(ours, theirs):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in theirs.values()))
    for path, peer in theirs.items():
        error, size = np.linalg.norm(ours[path] - peer), np.linalg.norm(peer)
        # biases before a softmax or a normalisation have zero gradient: rounding is judged against the whole gradient
        assert error < GRADIENT * size or error < 1e-6 * whole, f"{path}: {error} of {size}"


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("cfg", "gain"), [(SD1, 1.0), (SD1, SMALL), (SD2, 1.0)], ids=["sd1", "sd1-small", "sd2"])
def test_unet(cfg, gain):
    torch = pytest.importorskip("torch")
    network = foreign("UNet2DConditionModel", cfg, configs.UNET, gain=gain)
    params, target = params_of(network, mapping.UNET, unet.init, cfg)
    z_t, t, context, cotangent = draw(2, 8, 4, 4), np.array([7, 981]), draw(2, 5, 8, seed=1), draw(2, 8, 4, 4, seed=2)

    layers = record_layers(network)
    their_z, their_context = to_nchw(z_t), torch.tensor(context, requires_grad=True)
    out = network(their_z, torch.tensor(t), encoder_hidden_states=their_context).sample
    out.backward(to_nchw(cotangent).detach())

    run = run_with_layers(unet.UNet(cfg))
    forward = lambda params, inputs: run(params, inputs, cotangent)
    ours, our_layers, (grads, (grad_z, _, grad_context)) = forward(params, (z_t, t.astype(np.float32), context))
    assert check_layers(our_layers, layers) > 100
    assert np.max(np.abs(ours - nhwc(out))) < FORWARD
    assert np.max(np.abs(unet.apply(cfg, params, *map(jnp.asarray, (z_t, t, context))) - nhwc(out))) < FORWARD
    check_gradients(grads, gradients_of(network, mapping.UNET, target))
    assert relative(grad_z, nhwc(their_z.grad)) < GRADIENT
    assert relative(grad_context, their_context.grad.numpy()) < GRADIENT


def test_unet_of_xl():
    """The packed context here is what diffusers takes in three parts."""
    torch = pytest.importorskip("torch")
    network = foreign("UNet2DConditionModel", XL, configs.UNET)
    params, target = params_of(network, mapping.UNET, unet.init, XL)
    z_t, t, cotangent = draw(2, 8, 4, 4), np.array([7, 981]), draw(2, 8, 4, 4, seed=2)
    tokens, pooled = draw(2, 5, 20, seed=1), draw(2, 16, seed=3)
    sizes = np.array([[1024, 768, 0, 32, 1024, 1024], [512, 512, 8, 0, 64, 128]], np.float32)

    layers = record_layers(network)
    theirs = [torch.tensor(array, requires_grad=True) for array in (tokens, pooled)]
    their_z, told = to_nchw(z_t), {"text_embeds": theirs[1], "time_ids": torch.tensor(sizes)}
    out = network(their_z, torch.tensor(t), encoder_hidden_states=theirs[0], added_cond_kwargs=told).sample
    out.backward(to_nchw(cotangent).detach())

    context = conditioning.pack(*map(jnp.asarray, (tokens, pooled, sizes)))
    forward = lambda params, inputs: run_with_layers(unet.UNet(XL))(params, inputs, cotangent)
    ours, our_layers, (grads, (grad_z, _, grad_context)) = forward(params, (z_t, t.astype(np.float32), context))
    assert check_layers(our_layers, layers) > 100
    assert np.max(np.abs(ours - nhwc(out))) < FORWARD
    check_gradients(grads, gradients_of(network, mapping.UNET, target))
    assert relative(grad_z, nhwc(their_z.grad)) < GRADIENT
    for one, other in zip(conditioning.unpack(grad_context, 16)[:2], theirs, strict=True):
        assert relative(one, other.grad.numpy()) < GRADIENT


@pytest.mark.parametrize("gain", [1.0, SMALL])
def test_vae(gain):
    cfg = presets.TINY.vae
    network = foreign("AutoencoderKL", cfg, configs.VAE, gain=gain)
    params, target = params_of(network, mapping.VAE, vae.init, cfg)
    image, latent = draw(2, 16, 12, 3), draw(2, 8, 6, 4, seed=1)
    cotangents = (draw(2, 8, 6, 4, seed=2), draw(2, 8, 6, 4, seed=3))
    cotangent_picture = draw(2, 16, 12, 3, seed=4)

    layers = record_layers(network)
    their_image, their_latent = to_nchw(image), to_nchw(latent)
    posterior, picture = network.encode(their_image).latent_dist, network.decode(their_latent).sample
    parts = ((posterior.mean, cotangents[0]), (posterior.logvar, cotangents[1]), (picture, cotangent_picture))
    sum((part * to_nchw(weight)).sum() for part, weight in parts).backward()

    module = vae._Autoencoder(cfg)
    moments, encoder_layers, (grads, (grad_image,)) = run_with_layers(module, "encode")(params, (image,), cotangents)
    decoded, decoder_layers, (more, (grad_latent,)) = run_with_layers(module, "decode")(
        params, (latent,), cotangent_picture
    )
    assert check_layers(encoder_layers, layers) + check_layers(decoder_layers, layers) > 80
    for ours, theirs in zip((*moments, decoded), (posterior.mean, posterior.logvar, picture), strict=True):
        assert np.max(np.abs(ours - nhwc(theirs))) < FORWARD
    for ours, theirs in zip(vae.encode(cfg, params, image), moments, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=FORWARD)
    np.testing.assert_allclose(vae.decode(cfg, params, latent), decoded, atol=FORWARD)
    check_gradients(jax.tree.map(jnp.add, grads, more), gradients_of(network, mapping.VAE, target))
    assert relative(grad_image, nhwc(their_image.grad)) < GRADIENT
    assert relative(grad_latent, nhwc(their_latent.grad)) < GRADIENT


@pytest.mark.parametrize(
    ("act", "eos", "gain"), [("quick_gelu", 2, 1.0), ("quick_gelu", 599, SMALL), ("gelu", 2, 1.0), ("gelu", 599, 1.0)]
)
def test_text_encoder(act, eos, gain):
    torch = pytest.importorskip("torch")
    cfg = dataclasses.replace(TEXT, hidden_act=act, eos_token_id=eos)
    network = foreign("CLIPTextModel", cfg, configs.TEXT_ENCODER, gain=gain)
    params, target = params_of(network, mapping.TEXT_ENCODER, clip.init, cfg)
    ids = np.array([[598, 5, 7, 599, 599, 599], [598, 9, 2, 3, 4, 599]])
    cotangents = (draw(2, 6, 8), draw(2, 6, 8, seed=1))

    layers = record_layers(network)
    out = network(torch.tensor(ids), output_hidden_states=True)
    parts = ((out.last_hidden_state, cotangents[0]), (out.hidden_states[-2], cotangents[1]))
    sum((part * torch.tensor(weight)).sum() for part, weight in parts).backward()

    _, our_layers, (grads, _) = run_with_layers(clip.TextModel(cfg))(params, (ids,), cotangents)
    assert check_layers(our_layers, layers) > 25
    ours = clip.apply(cfg, params, ids)
    for value, peer in zip(ours, (out.last_hidden_state, out.hidden_states[-2], out.pooler_output), strict=True):
        assert np.max(np.abs(value - peer.detach().numpy())) < FORWARD
    check_gradients(grads, gradients_of(network, mapping.TEXT_ENCODER, target))


def test_text_encoder_with_projection():
    torch = pytest.importorskip("torch")
    cfg = presets.TINY_XL.text_2
    network = foreign("CLIPTextModelWithProjection", cfg, configs.TEXT_ENCODER_2)
    params, target = params_of(network, mapping.TEXT_ENCODER_2, clip.init_projected, cfg)
    ids, weights = np.array([[598, 5, 7, 599, 0, 0], [598, 9, 2, 3, 4, 599]]), (draw(2, 16), draw(2, 6, 12, seed=1))
    out = network(torch.tensor(ids), output_hidden_states=True)
    theirs = (out.text_embeds, out.hidden_states[-2])
    sum((part * torch.tensor(weight)).sum() for part, weight in zip(theirs, weights, strict=True)).backward()

    def forward(params):
        output = clip.apply_projected(cfg, params, ids)
        return output.pooled, output.penultimate

    ours, pullback = jax.vjp(forward, params)
    for value, peer in zip(ours, theirs, strict=True):
        assert np.max(np.abs(value - peer.detach().numpy())) < FORWARD
    check_gradients(
        pullback(tuple(map(jnp.asarray, weights)))[0], gradients_of(network, mapping.TEXT_ENCODER_2, target)
    )


# ------------------------------------------------------------------------------------ full size, shapes alone


NETWORKS = [
    ("UNet2DConditionModel", "unet", unet.init, configs.UNET, mapping.UNET),
    ("AutoencoderKL", "vae", vae.init, configs.VAE, mapping.VAE),
    ("CLIPTextModel", "text", clip.init, configs.TEXT_ENCODER, mapping.TEXT_ENCODER),
    ("CLIPTextModelWithProjection", "text_2", clip.init_projected, configs.TEXT_ENCODER_2, mapping.TEXT_ENCODER_2),
]
THERE = [
    pytest.param(cfg, class_name, init, fmt, rules, id=f"{field}-{name}")
    for class_name, field, init, fmt, rules in NETWORKS
    for name in ("SD14", "SD21", "SDXL", "NANO")
    if (cfg := getattr(getattr(presets, name), field)) is not None
]


@pytest.mark.parametrize(("cfg", "class_name", "init", "fmt", "rules"), THERE)
def test_every_key_and_shape_of_the_presets(cfg, class_name, init, fmt, rules):
    network = foreign(class_name, cfg, fmt, device="meta")
    state = {key: np.broadcast_to(np.float32(0), p.shape) for key, p in network.named_parameters()}
    target = jax.eval_shape(functools.partial(init, cfg=cfg), jax.random.key(0))
    mapping.align(state, rules, target)  # raises on a missing, unused or mis-shaped key
    assert trees.count(target) == sum(p.size for p in state.values())
