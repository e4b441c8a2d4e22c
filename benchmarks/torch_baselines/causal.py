"""ABIC's augmented Lagrangian for ancestral graphs (rbhatta8/dcd, `admg_discovery.py`), value and gradient: as published, and in covariance form.

The published code differentiates with `autograd`; these are the same operations on float64 tensors. As there, pseudo-variables are computed before a
descent and held fixed in it: they are no part of an evaluation. `published_descent` and `descent` are steps of Adam on either; the published code has
SciPy's L-BFGS-B, whose evaluations cost the same.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.torch_baselines.networks import whole
from benchmarks.torch_baselines.passes import Outcome, Run


@dataclasses.dataclass(frozen=True)
class Search:
    """Some steps of the guided search, from several starts.

    directed, bidirected: [R, V, V], of the starts. masks: [V, V] twice, where coefficients may be, the second a lower triangle.
    penalty: [V, V], of each edge. steps: of Adam, with new pseudo-variables every `refresh`, taken at the iterate before the last.
    """

    data: Any
    covariance: Any
    directed: Any
    bidirected: Any
    masks: tuple[Any, Any]
    penalty: Any
    rho: float
    alpha: float
    rate: float
    steps: int
    refresh: int


def published(data: Any, directed: Any, bidirected: Any, *, rho: float, alpha: float, penalty: float) -> Run:
    """One start after the other: [R, V, V] coefficients, rows [n, V]. A loop over variables with an inverse each, float64."""
    x, starts = whole(data).double(), list(zip(whole(directed).double(), whole(bidirected).double(), strict=True))
    held = [_published_pseudo(x, w1, w2) for w1, w2 in starts]

    def run() -> Outcome:
        values, gradients = [], []
        for (w1, w2), z in zip(starts, held, strict=True):
            theta = w1.clone().requires_grad_(), w2.tril(-1).requires_grad_()
            value = _published_value(x, theta, z, rho, alpha, penalty)
            gradients.append(torch.autograd.grad(value, theta))
            values.append(value.detach())
        return _outcome(values, gradients)

    return run


def published_descent(search: Search) -> Run:
    """One start after the other, as `published` evaluates."""
    x, penalty = whole(search.data).double(), whole(search.penalty).double()
    masks = [whole(mask).double() for mask in search.masks]
    starts = list(zip(whole(search.directed).double(), whole(search.bidirected).double().tril(-1), strict=True))

    def one(w1, lower):
        theta = [w1.clone().requires_grad_(), lower.clone().requires_grad_()]
        optimiser, last = torch.optim.Adam(theta, lr=search.rate), [w1, lower]
        for i in range(search.steps):
            if i % search.refresh == 0:
                z = _published_pseudo(x, last[0], last[1] + last[1].T)
            last = [part.detach().clone() for part in theta]
            edges = [part * mask for part, mask in zip(theta, masks, strict=True)]
            optimiser.zero_grad()
            _published_value(x, edges, z, search.rho, search.alpha, penalty).backward()
            optimiser.step()
        return [part.detach() for part in theta]

    def run() -> Outcome:
        found = [torch.stack(parts).float() for parts in zip(*(one(*start) for start in starts), strict=True)]
        return {"directed": found[0].numpy, "bidirected": found[1].numpy}

    return run


def _published_pseudo(x, w1, w2):
    rows, size = x.shape
    errors = x - x @ w1
    omega = w2 + torch.diag(_lifted(errors.square().mean(dim=0), w2))
    found = []
    for i in range(size):
        others = [j for j in range(size) if j != i]
        z = torch.zeros(rows, size, dtype=x.dtype)
        z[:, others] = errors[:, others] @ torch.linalg.inv(omega[others][:, others])
        found.append(z)
    return found


def _published_value(x, theta, z, rho, alpha, penalty):
    rows, size = x.shape
    w1, w2 = theta[0], theta[1] + theta[1].T
    loss = torch.zeros((), dtype=x.dtype)
    for i in range(size):
        residual = x[:, i] - x @ w1[:, i] - z[i] @ w2[:, i]
        loss = loss + 0.5 / rows * residual.square().sum()
    eye = torch.eye(size, dtype=x.dtype)
    power = torch.linalg.matrix_power(
        eye + w1 * w1 / size, 2 ** math.ceil(math.log2(size))
    )  # published: size; so both search the same
    series, term = eye, eye
    for k in range(1, size):
        term = term @ (w1 * w1) / k
        series = series + term
    h = torch.trace(power) - size + (series * w2 * w2).sum()
    return _whole(loss, h, (w1, w2.tril(-1)), rows, rho, alpha, penalty)


def covariance_form(
    covariance: Any, rows: int, directed: Any, bidirected: Any, *, rho: float, alpha: float, penalty: float, how: str
) -> Run:
    """All starts at once, float32: one inverse and no rows; powers by squaring."""
    s, w1, w2 = whole(covariance), whole(directed), whole(bidirected)
    total = _covariance_value(s, rows, rho, alpha, penalty)
    objective = torch.compile(total, dynamic=False) if how == "compiled" else total
    held = _covariance_pseudo(s, w1, w2)

    def run() -> Outcome:
        theta = w1.clone().requires_grad_(), w2.tril(-1).requires_grad_()
        values = objective(*theta, *held)
        gradients = torch.autograd.grad(values.sum(), theta)
        return _outcome(list(values.detach()), list(zip(*gradients, strict=True)))

    return run


def descent(search: Search, *, how: str) -> Run:
    """All starts at once, as `covariance_form` evaluates; gradient and Adam are one function, which is compiled or not."""
    s, masks, rate = whole(search.covariance), [whole(mask) for mask in search.masks], search.rate
    value = _covariance_value(s, len(search.data), search.rho, search.alpha, whole(search.penalty))
    gradient = torch.func.grad(lambda theta, held: value(*_masked(theta, masks), *held).sum())
    start = [whole(search.directed), whole(search.bidirected).tril(-1)]

    def step(theta, first, second, held, corrections):
        moved = gradient(theta, held)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, moved, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, moved, strict=True)]
        scale = lambda m, v: (m / corrections[0]) / ((v / corrections[1]).sqrt() + 1e-8)
        new = [w - rate * scale(m, v) for w, m, v in zip(theta, first, second, strict=True)]
        return new, first, second

    step = torch.compile(step, dynamic=False) if how == "compiled" else step
    pseudo = lambda w1, lower: _covariance_pseudo(s, w1, lower + lower.mT)
    corrections = [torch.tensor([1 - 0.9**i, 1 - 0.999**i]) for i in range(1, search.steps + 1)]

    def run() -> Outcome:
        theta, last = start, start
        first, second = ([torch.zeros_like(part) for part in start] for _ in range(2))
        for i in range(search.steps):
            if i % search.refresh == 0:
                held = pseudo(*last)
            last = theta
            theta, first, second = step(theta, first, second, held, corrections[i])
        return {"directed": theta[0].numpy, "bidirected": theta[1].numpy}

    return run


def _masked(theta, masks):
    return [part * mask for part, mask in zip(theta, masks, strict=True)]


def _covariance_pseudo(s, w1, w2):
    residual = torch.eye(s.shape[-1]) - w1
    noise = _lifted((residual * (s @ residual)).sum(dim=-2), w2)
    return w1, torch.linalg.inv(w2 + torch.diag_embed(noise))


def _covariance_value(s, rows: int, rho: float, alpha: float, penalty: Any) -> Callable:
    """The objective [R] of coefficients at pseudo-variables."""
    size = s.shape[-1]
    eye, doublings = torch.eye(size), max(6, math.ceil(math.log2(size)))

    def total(w1, lower, at, precision):
        w2 = lower + lower.mT
        regressed = precision @ w2
        ratio = regressed.diagonal(dim1=-2, dim2=-1) / precision.diagonal(dim1=-2, dim2=-1)
        regressed = regressed - precision * ratio[:, None, :]
        residual = eye - w1 - (eye - at) @ regressed
        loss = (residual * (s @ residual)).sum(dim=(-2, -1)) / 2
        squares = w1 * w1
        cycles = _power(squares / size, math.ceil(math.log2(size)))
        paths = _power(squares / 2**doublings, doublings)
        h = cycles.diagonal(dim1=-2, dim2=-1).sum(-1) + (paths * w2 * w2).sum(dim=(-2, -1))
        return _whole(loss, h, (w1, lower), rows, rho, alpha, penalty)

    return total


def _power(matrix, doublings):
    for _ in range(doublings):
        matrix = 2 * matrix + matrix @ matrix
    return matrix


def _lifted(noise, w2):
    """Variances for which Omega is positive definite, as in `causal.mag`; the published code inverts whatever it meets, at the same cost."""
    return torch.maximum(noise, 1.01 * w2.abs().sum(dim=-1))


def _whole(loss, h, theta, rows, rho, alpha, penalty):
    smooth = sum((penalty * torch.tanh(math.log(rows) / 2 * part.abs())).sum(dim=(-2, -1)) for part in theta)
    return loss + smooth + rho / 2 * h**2 + alpha * h


def _outcome(values, gradients) -> Outcome:
    return {
        "value": lambda: torch.stack(values).float().numpy(),
        "directed": lambda: (
            torch.stack([first - torch.diag(first.diagonal()) for first, _ in gradients]).float().numpy()
        ),
        "bidirected": lambda: torch.stack([second.tril(-1) for _, second in gradients]).float().numpy(),
    }
