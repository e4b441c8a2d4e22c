"""ABIC's augmented Lagrangian for ancestral graphs (rbhatta8/dcd, `admg_discovery.py`), value and gradient: as published, and in covariance form.

The published code differentiates with `autograd`; these are the same operations on float64 tensors. As there, pseudo-variables are computed before a
descent and held fixed in it: they are no part of an evaluation.
"""

import math
from typing import Any

import torch

from benchmarks.torch_baselines.networks import whole
from benchmarks.torch_baselines.passes import Outcome, Run


def published(data: Any, directed: Any, bidirected: Any, *, rho: float, alpha: float, penalty: float) -> Run:
    """One start after the other: [R, V, V] coefficients, rows [n, V]. A loop over variables with an inverse each, float64."""
    x, starts = whole(data).double(), list(zip(whole(directed).double(), whole(bidirected).double(), strict=True))
    rows, size = x.shape

    def pseudo(w1, w2):
        errors = x - x @ w1
        omega = w2 + torch.diag(_lifted(errors.square().mean(dim=0), w2))
        found = []
        for i in range(size):
            others = [j for j in range(size) if j != i]
            z = torch.zeros(rows, size, dtype=x.dtype)
            z[:, others] = errors[:, others] @ torch.linalg.inv(omega[others][:, others])
            found.append(z)
        return found

    def objective(w1, w2, z):
        loss = torch.zeros((), dtype=x.dtype)
        for i in range(size):
            residual = x[:, i] - x @ w1[:, i] - z[i] @ w2[:, i]
            loss = loss + 0.5 / rows * residual.square().sum()
        eye = torch.eye(size, dtype=x.dtype)
        power = torch.linalg.matrix_power(eye + w1 * w1 / size, size)
        series, term = eye, eye
        for k in range(1, size):
            term = term @ (w1 * w1) / k
            series = series + term
        h = torch.trace(power) - size + (series * w2 * w2).sum()
        return _whole(loss, h, (w1, w2.tril(-1)), rows, rho, alpha, penalty)

    held = [pseudo(w1, w2) for w1, w2 in starts]

    def run() -> Outcome:
        values, gradients = [], []
        for (w1, w2), z in zip(starts, held, strict=True):
            theta = w1.clone().requires_grad_(), w2.tril(-1).requires_grad_()
            value = objective(theta[0], theta[1] + theta[1].T, z)
            gradients.append(torch.autograd.grad(value, theta))
            values.append(value.detach())
        return _outcome(values, gradients)

    return run


def covariance_form(
    covariance: Any, rows: int, directed: Any, bidirected: Any, *, rho: float, alpha: float, penalty: float, how: str
) -> Run:
    """All starts at once, float32: one inverse and no rows; powers by squaring."""
    s, w1, w2 = whole(covariance), whole(directed), whole(bidirected)
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

    def both(w1, w2):
        residual = eye - w1
        noise = _lifted((residual * (s @ residual)).sum(dim=-2), w2)
        return w1, torch.linalg.inv(w2 + torch.diag_embed(noise))

    objective = torch.compile(total, dynamic=False) if how == "compiled" else total

    held = both(w1, w2)

    def run() -> Outcome:
        theta = w1.clone().requires_grad_(), w2.tril(-1).requires_grad_()
        values = objective(*theta, *held)
        gradients = torch.autograd.grad(values.sum(), theta)
        return _outcome(list(values.detach()), list(zip(*gradients, strict=True)))

    return run


def _power(matrix, doublings):
    for _ in range(doublings):
        matrix = 2 * matrix + matrix @ matrix
    return matrix


def _lifted(noise, w2):
    """Variances for which Omega is positive definite, as in `causal.mag`; the published code inverts whatever it meets, at the same cost."""
    return torch.maximum(noise, 1.01 * w2.abs().sum(dim=-1))


def _whole(loss, h, theta, rows, rho, alpha, penalty):
    smooth = sum(torch.tanh(math.log(rows) / 2 * part.abs()).sum(dim=(-2, -1)) for part in theta)
    return loss + penalty * smooth + rho / 2 * h**2 + alpha * h


def _outcome(values, gradients) -> Outcome:
    return {
        "value": lambda: torch.stack(values).float().numpy(),
        "directed": lambda: (
            torch.stack([first - torch.diag(first.diagonal()) for first, _ in gradients]).float().numpy()
        ),
        "bidirected": lambda: torch.stack([second.tril(-1) for _, second in gradients]).float().numpy(),
    }
