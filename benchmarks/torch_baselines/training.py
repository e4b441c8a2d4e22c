"""Fine-tuning steps of the UNet: DreamBooth (`train_dreambooth.py`), LoRA through PEFT, and weights with a posterior (`bayesian.py`)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch

from benchmarks.torch_baselines.networks import Models, nchw, noisy, target_of, whole
from benchmarks.torch_baselines.passes import Outcome, Run


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is learnt: pictures [N, H, W, 3], the moments of their latents [N, h, w, c], token ids [1, L] of the prompt and its context."""

    image: Any
    mean: Any
    logvar: Any
    ids: Any
    context: Any


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers of one step: which pictures [B], t [B], noise and the posterior's noise [B, c, h, w]; the weights' by name."""

    rows: torch.Tensor
    t: torch.Tensor
    noise: torch.Tensor
    posterior: torch.Tensor
    weights: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


DrawFn = Callable[[int], Draws]


@dataclasses.dataclass(frozen=True)
class Settings:
    """AdamW's, and of the posterior (no names: none)."""

    rate: float
    decay: float
    clip: float
    sigma0: float = 0.0
    sigma_min: float = 0.0
    sigma_rate: float = 0.0
    names: tuple[str, ...] = ()


def given(rows: Any, t: Any, noise: Any, posterior: Any, weights: list[Mapping[str, Any]], how: str) -> DrawFn:
    """The caller's, one entry per step; `weights` may be empty."""
    steps = [
        Draws(whole(a), whole(b), nchw(c, how), nchw(d, how), {name: whole(x) for name, x in e.items()})
        for a, b, c, d, e in zip(rows, t, noise, posterior, weights, strict=True)
    ]
    return lambda i: steps[i]


def own(
    batch: int, shape: tuple[int, int, int], pictures: int, weights: Mapping[str, tuple[int, ...]], how: str
) -> DrawFn:
    """New ones every time, for latents [h, w, c]; `weights` are shapes of what has a posterior."""
    height, width, channels = shape
    layout = torch.contiguous_format if how == "plain" else torch.channels_last

    def draw(_: int) -> Draws:
        normal = lambda: torch.randn(batch, channels, height, width).contiguous(memory_format=layout)
        chosen = torch.randint(0, pictures, (batch,)), torch.randint(0, 1000, (batch,))
        return Draws(*chosen, normal(), normal(), {name: torch.randn(size) for name, size in weights.items()})

    return draw


def with_lora(unet: torch.nn.Module, rank: int, factors: Mapping[str, tuple[Any, Any]]) -> list[torch.nn.Parameter]:
    """Adds PEFT layers with the given starts (layer -> A [r, in], B [out, r]) to the attention's projections; returns what is trained."""
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    if layers.keys() != factors.keys():
        raise ValueError(f"layers differ: {sorted(layers.keys() ^ factors.keys())[:4]}")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(whole(factors[name][0]))
            layer.lora_B["default"].weight.copy_(whole(factors[name][1]))
    return [p for p in unet.parameters() if p.requires_grad]


def tune(
    models: Models, pictures: Pictures, draw: DrawFn, cfg: Settings, *, steps: int, batch: int, public: bool, how: str
) -> Run:
    """`steps` steps of `batch` pictures, from where the last call ended.

    `public`: one picture per forward pass, accumulated; it and its prompt are encoded in every pass; the optimiser goes through a list.
    """
    unet = models.unet
    models.vae.requires_grad_(False)
    models.text.requires_grad_(False)
    if not any(".lora_A." in name for name, _ in unet.named_parameters()):
        unet.requires_grad_(True)
    if how != "plain":
        unet.to(memory_format=torch.channels_last)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    sigma = {name: torch.nn.Parameter(torch.full_like(trained[name], cfg.sigma0)) for name in cfg.names}
    groups = [{"params": list(trained.values()), "lr": cfg.rate, "weight_decay": cfg.decay}]
    if sigma:
        groups.append({"params": list(sigma.values()), "lr": cfg.sigma_rate, "weight_decay": 0.0})
    speed = {"foreach": False} if public else {"fused": True}
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, **speed)
    everything = [*trained.values(), *sigma.values()]
    start = {name: trained[name].detach().clone() for name in cfg.names}
    images, ids, context = nchw(pictures.image), whole(pictures.ids), whole(pictures.context)
    mean, logvar = nchw(pictures.mean, how), nchw(pictures.logvar, how)
    forward = torch.compile(unet, dynamic=False) if how == "compiled" else unet

    def predict(z_t, t, text, noise):
        if not sigma:
            return forward(z_t, t, text, return_dict=False)[0]
        drawn = {name: trained[name] + sigma[name] * noise[name] for name in sigma}
        return torch.func.functional_call(forward, _named(forward, drawn), (z_t, t, text), {"return_dict": False})[0]

    def latent(rows, posterior):
        if not public:
            return mean[rows] + torch.exp(0.5 * logvar[rows]) * posterior
        with torch.no_grad():
            moments = models.vae.encode(images[rows]).latent_dist
            return (moments.mean + moments.std * posterior) * models.scale

    def loss_of(chosen: Draws, part: slice) -> torch.Tensor:
        t, noise = chosen.t[part], chosen.noise[part]
        z0 = latent(chosen.rows[part], chosen.posterior[part])
        with torch.no_grad():
            text = models.text(ids)[0] if public else context
        text = text.expand(len(t), -1, -1)
        prediction = predict(noisy(models, z0, noise, t), t, text, chosen.weights)
        return torch.nn.functional.mse_loss(prediction, target_of(models, z0, noise, t))

    def step(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, total = draw(i), torch.zeros(())
        optimiser.zero_grad(set_to_none=True)
        size = 1 if public else batch
        for j in range(0, batch, size):
            loss = loss_of(chosen, slice(j, j + size)) * (size / batch)
            loss.backward()
            total = total + loss.detach()
        if public and sigma:
            _divergence(trained, sigma, start, cfg)  # logged in every step, whatever its weight
        norm = torch.nn.utils.clip_grad_norm_(everything, cfg.clip, foreach=not public)
        optimiser.step()
        with torch.no_grad():
            for leaf in sigma.values():
                leaf.clamp_(min=cfg.sigma_min)
        return total, norm

    def run() -> Outcome:
        losses, norms = zip(*(step(i) for i in range(steps)), strict=True)
        return {"loss": lambda: torch.stack(losses).numpy(), "norm": lambda: torch.stack(norms).numpy()}

    return run


def _named(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """As a compiled module calls its parameters."""
    prefix = "_orig_mod." if hasattr(module, "_orig_mod") else ""
    return {prefix + name: value for name, value in values.items()}


def _divergence(mu, sigma, start, cfg: Settings) -> torch.Tensor:
    """KL from the prior to the posterior, summed, as `bayesian.py` computes it."""
    total = torch.zeros(())
    for name, scale in sigma.items():
        q = torch.distributions.Normal(mu[name].detach(), scale.detach())
        p = torch.distributions.Normal(start[name], cfg.sigma0)
        total = total + torch.distributions.kl_divergence(p, q).sum()
    return total
