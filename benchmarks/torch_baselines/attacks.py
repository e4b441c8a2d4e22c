"""AdvDM, SDS (Mist's code base, `mist_v3.py`) and CGI-DM (`Extractor.py`) as loops of gradient steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.torch_baselines.networks import Models, nchw, nhwc, noise_of, noisy, whole
from benchmarks.torch_baselines.passes import Outcome, Run


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers of one step for all pictures; `other` is the posterior's noise, or that of the second model."""

    t: torch.Tensor
    noise: torch.Tensor
    other: torch.Tensor

    def row(self, j: int) -> "Draws":
        """Those of picture j."""
        return Draws(*(getattr(self, field.name)[j : j + 1] for field in dataclasses.fields(self)))


DrawFn = Callable[[int], Draws]
"""Number of the step -> its draws."""


def given(t: Any, noise: Any, other: Any, how: str) -> DrawFn:
    """The caller's: [steps, B] and twice [steps, B, h, w, c]."""
    steps = [Draws(whole(a), nchw(b, how), nchw(c, how)) for a, b, c in zip(t, noise, other, strict=True)]
    return lambda i: steps[i]


def own(batch: int, shape: tuple[int, int, int], how: str, total: int = 1000) -> DrawFn:
    """New ones every time, for latents [h, w, c]."""
    height, width, channels = shape
    layout = torch.contiguous_format if how == "plain" else torch.channels_last

    def draw(_: int) -> Draws:
        normal = lambda: torch.randn(batch, channels, height, width).contiguous(memory_format=layout)
        return Draws(torch.randint(0, total, (batch,)), normal(), normal())

    return draw


def _frozen(models: Models, how: str) -> Models:
    for network in (models.unet, models.vae, models.text):
        network.requires_grad_(False)
    if how != "plain":
        models.unet.to(memory_format=torch.channels_last)
        models.vae.to(memory_format=torch.channels_last)
    return models


def _drawn_latent(models: Models, x: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
    mean, logvar = models.vae.quant_conv(models.vae.encoder(x)).chunk(2, dim=1)
    return (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * posterior) * models.scale


def _error(models: Models, z: torch.Tensor, context: torch.Tensor, t: torch.Tensor, noise: torch.Tensor):
    z_t = noisy(models, z, noise, t)
    return noise_of(models, models.unet(z_t, t, context, return_dict=False)[0], z_t, t) - noise


def _moved(delta, gradient, x, radius: float, size: float):
    moved = (delta + size * gradient.sign()).clamp(-radius, radius)
    return (x + moved).clamp(-1, 1) - x


def protect_public(
    models: Models, image: Any, ids: Any, draw: DrawFn, *, steps: int, radius: float, size: float, sds: bool
) -> Run:
    """One picture after the other; each step runs the text encoder on the constant prompt."""
    models, images, ids = _frozen(models, "plain"), nchw(image), whole(ids)

    def one(x: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        delta, first = torch.zeros_like(x), None
        for i in range(steps):
            own_draws = draw(i).row(j)
            context = models.text(ids)[0]
            adversarial = (x + delta).requires_grad_()
            z = models.scale * _sampled(models, adversarial, own_draws.other)
            with torch.set_grad_enabled(not sds):
                error = _error(models, z, context, own_draws.t, own_draws.noise)
            if sds:
                (gradient,) = torch.autograd.grad(z, adversarial, error)
            else:
                (gradient,) = torch.autograd.grad((error**2).mean(), adversarial)
            first = gradient if first is None else first
            delta = _moved(delta, gradient, x, radius, size)
        return delta, first

    def run() -> Outcome:
        deltas, firsts = zip(*(one(images[j : j + 1], j) for j in range(len(images))), strict=True)
        return {"delta": lambda: nhwc(torch.cat(deltas)), "gradient": lambda: nhwc(torch.cat(firsts))}

    return run


def _sampled(models: Models, x: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
    moments = models.vae.encode(x).latent_dist
    return moments.mean + moments.std * posterior


def protect_best(
    models: Models,
    image: Any,
    context: Any,
    draw: DrawFn,
    *,
    steps: int,
    radius: float,
    size: float,
    sds: bool,
    how: str,
) -> Run:
    """All pictures at once with the prompt's cached context."""
    models, x = _frozen(models, how), nchw(image, how)
    context = whole(context).expand(len(x), -1, -1).contiguous()
    compiled = (lambda fn: torch.compile(fn, dynamic=False)) if how == "compiled" else lambda fn: fn
    latent = compiled(lambda x, posterior: _drawn_latent(models, x, posterior))
    error = compiled(lambda z, t, noise: _error(models, z, context, t, noise))

    def value(x, t, noise, posterior):
        found = _error(models, _drawn_latent(models, x, posterior), context, t, noise)
        return found.square().mean(dim=(1, 2, 3)).sum()

    loss = compiled(value)

    def gradient_at(x: torch.Tensor, chosen: Draws) -> torch.Tensor:
        x = x.requires_grad_()
        if not sds:
            return torch.autograd.grad(loss(x, chosen.t, chosen.noise, chosen.other), x)[0]
        z = latent(x, chosen.other)
        with torch.no_grad():
            direction = error(z, chosen.t, chosen.noise)
        return torch.autograd.grad(z, x, direction)[0]

    def run() -> Outcome:
        delta, first = torch.zeros_like(x), None
        for i in range(steps):
            gradient = gradient_at(x + delta, draw(i))
            first = gradient if first is None else first
            delta = _moved(delta, gradient, x, radius, size)
        return {"delta": lambda: nhwc(delta), "gradient": lambda: nhwc(first)}

    return run


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What CGI-DM starts from: latents, what stands where they are hidden, and the mask of what is kept, NHWC."""

    known: Any
    start: Any
    mask: Any
    steps: int
    radius: float
    size: float
    bound: float


def _descended(delta, gradient, start, case: Contrast):
    size = gradient.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    moved = (start + delta - case.size * gradient / size).clamp(-case.bound, case.bound) - start
    length = moved.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    return moved * (case.radius / length).clamp_max(1.0)


def contrast_public(base: Models, tuned: Models, case: Contrast, ids: Any, draw: DrawFn, *, common: bool) -> Run:
    """One picture after the other, which encodes its prompt for both models; both passes of a step one after the other.

    The public code draws noise for each model on its own; `common` gives both the same, which costs as much.
    """
    base, tuned = _frozen(base, "plain"), _frozen(tuned, "plain")
    known, start, mask, ids = nchw(case.known), nchw(case.start), nchw(case.mask), whole(ids)

    def one(j: int) -> tuple[torch.Tensor, torch.Tensor]:
        contexts = [models.text(ids)[0] for models in (base, tuned)]
        at, delta, first = start[j : j + 1], torch.zeros_like(start[j : j + 1]), None
        for i in range(case.steps):
            own_draws = draw(i).row(j)
            delta = delta.detach().requires_grad_()
            w = known[j : j + 1] * mask + (at + delta) * (1 - mask)
            other = own_draws.noise if common else own_draws.other
            value = (_error(tuned, w, contexts[1], own_draws.t, other) ** 2).mean()
            value = value - (_error(base, w, contexts[0], own_draws.t, own_draws.noise) ** 2).mean()
            (gradient,) = torch.autograd.grad(value, delta)
            first = gradient if first is None else first
            delta = _descended(delta.detach(), gradient, at, case)
        return delta, first

    def run() -> Outcome:
        deltas, firsts = zip(*(one(j) for j in range(len(known))), strict=True)
        return {"delta": lambda: nhwc(torch.cat(deltas)), "gradient": lambda: nhwc(torch.cat(firsts))}

    return run


def contrast_best(base: Models, tuned: Models, case: Contrast, context: Any, draw: DrawFn, *, how: str) -> Run:
    """All pictures at once with a cached context and the same noise for both models."""
    base, tuned = _frozen(base, how), _frozen(tuned, how)
    known, start, mask = nchw(case.known, how), nchw(case.start, how), nchw(case.mask, how)
    context = whole(context).expand(len(known), -1, -1).contiguous()

    def value(delta, t, noise):
        w = known * mask + (start + delta) * (1 - mask)
        square = lambda models: _error(models, w, context, t, noise).square().mean(dim=(1, 2, 3))
        return (square(tuned) - square(base)).sum()

    loss = torch.compile(value, dynamic=False) if how == "compiled" else value

    def run() -> Outcome:
        delta, first = torch.zeros_like(start), None
        for i in range(case.steps):
            chosen, at = draw(i), delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(at, chosen.t, chosen.noise), at)
            first = gradient if first is None else first
            delta = _descended(at.detach(), gradient, start, case)
        return {"delta": lambda: nhwc(delta), "gradient": lambda: nhwc(first)}

    return run
