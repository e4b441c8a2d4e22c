"""Single networks: forward passes and gradients. Tensors are made once, outside of what is timed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.torch_baselines.networks import gradients, nchw, nhwc, prepared, whole

Outcome = dict[str, Callable[[], np.ndarray]]
"""Name -> what gives the array."""
Run = Callable[[], Outcome]


def forward(module: torch.nn.Module, z_t: Any, t: Any, context: Any, *, how: str) -> Run:
    """The UNet without gradients."""
    network, z_t, t, context = prepared(module, how), nchw(z_t, how), whole(t), whole(context)

    def run() -> Outcome:
        with torch.inference_mode():
            out = network(z_t, t, context, return_dict=False)[0]
        return {"prediction": lambda: nhwc(out)}

    return run


def input_gradient(module: torch.nn.Module, z_t: Any, t: Any, context: Any, cotangent: Any, *, how: str) -> Run:
    """Of sum(prediction * cotangent) with respect to the latents; weights are frozen."""
    network, z_t, t, context = prepared(module, how), nchw(z_t, how), whole(t), whole(context)
    cotangent, z_t = nchw(cotangent, how), z_t.requires_grad_()

    def run() -> Outcome:
        out = network(z_t, t, context, return_dict=False)[0]
        (found,) = torch.autograd.grad(out, z_t, cotangent)
        return {"gradient": lambda: nhwc(found)}

    return run


def weight_gradient(module: torch.nn.Module, z_t: Any, t: Any, context: Any, cotangent: Any, *, how: str) -> Run:
    """Of the same sum with respect to every weight, by name."""
    network, z_t, t, context = prepared(module, how, frozen=False), nchw(z_t, how), whole(t), whole(context)
    cotangent = nchw(cotangent, how)
    names, weights = zip(*module.named_parameters(), strict=True)

    def run() -> Outcome:
        out = network(z_t, t, context, return_dict=False)[0]
        found = torch.autograd.grad(out, weights, cotangent)
        return {"state": lambda: gradients(module, dict(zip(names, found, strict=True)))}

    return run


def encode_gradient(module: torch.nn.Module, image: Any, cotangent: Any, *, how: str) -> Run:
    """Of sum(mean * cotangent) of the autoencoder's posterior with respect to the pixels."""
    module.requires_grad_(False)
    image, cotangent = nchw(image, how).requires_grad_(), nchw(cotangent, how)
    if how != "plain":
        module.to(memory_format=torch.channels_last)
    moments = _moments(module)
    moments = torch.compile(moments, dynamic=False) if how == "compiled" else moments

    def run() -> Outcome:
        mean, _ = moments(image)
        (found,) = torch.autograd.grad(mean, image, cotangent)
        return {"gradient": lambda: nhwc(found)}

    return run


def _moments(vae: torch.nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def moments(image):
        mean, logvar = vae.quant_conv(vae.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    return moments


def text(module: torch.nn.Module, ids: Any, *, how: str) -> Run:
    """Hidden states after the final norm."""
    module.requires_grad_(False)
    network = torch.compile(module, dynamic=False) if how == "compiled" else module
    ids = whole(ids)

    def run() -> Outcome:
        with torch.inference_mode():
            out = network(ids)[0]
        return {"hidden": lambda: out.numpy()}

    return run
