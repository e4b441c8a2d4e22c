"""SPOT's skeleton posterior, data sets batched: features of all pairs of variables (`causal.features`), and the network (`models.skeleton_net`)."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.torch_baselines.networks import whole
from benchmarks.torch_baselines.passes import Outcome, Run

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
TOP = 6
"""Likely neighbours of a variable."""


def probabilities(corr: Any, rows: float, params: dict[str, dict[str, Any]], *, how: str) -> Run:
    """P [B, V, V] of correlations [B, V, V]; `params` are those of an `EdgeMLP`."""
    corr, layers = whole(corr), {name: (whole(p["kernel"]), whole(p["bias"])) for name, p in params.items()}
    off = ~torch.eye(corr.shape[-1], dtype=torch.bool)

    def posterior(corr):
        x = features(corr, rows)
        for i in range(len(layers) - 1):
            kernel, bias = layers[f"dense_{i}"]
            x = F.gelu(x @ kernel + bias, approximate="tanh")
        kernel, bias = layers["head"]
        logits = (x @ kernel + bias)[..., 0]
        return torch.sigmoid((logits + logits.mT) / 2) * off

    compiled = torch.compile(posterior, dynamic=False) if how == "compiled" else posterior

    def run() -> Outcome:
        with torch.inference_mode():
            found = compiled(corr)
        return {"probability": lambda: found.numpy()}

    return run


def features(corr: torch.Tensor, rows: float) -> torch.Tensor:
    """[B, V, V] -> [B, V, V, 22]."""
    batch, size, _ = corr.shape
    corr = _clipped(corr)
    off = ~torch.eye(size, dtype=torch.bool)
    order_0 = _strength(corr, rows, 0)

    partial = _partial(corr[:, :, :, None], corr[:, :, None, :], corr[:, None])  # [b, i, j, k]
    order_1 = _summary(_strength(partial, rows, 1), (off[:, None] & off[None]).expand(partial.shape))
    link = torch.where(off, torch.minimum(order_0, order_1[..., 2]), -torch.inf)

    count = min(TOP, size - 1)
    ranked, neighbours = link.topk(count, dim=-1)
    first, second = np.triu_indices(count, 1)
    pairs = lambda which: torch.cat(
        [
            neighbours[:, :, None, which].expand(-1, -1, size, -1),
            neighbours[:, None, :, which].expand(-1, size, -1, -1),
        ],
        dim=-1,
    )
    k, m = pairs(torch.from_numpy(first)), pairs(torch.from_numpy(second))  # [b, i, j, sets]
    b = torch.arange(batch)[:, None, None, None]
    i, j = torch.arange(size)[:, None, None], torch.arange(size)[None, :, None]
    r_ik, r_im, r_jk, r_jm, r_km = corr[b, i, k], corr[b, i, m], corr[b, j, k], corr[b, j, m], corr[b, k, m]
    left = _partial(corr[..., None], r_ik, r_jk)
    partial = _partial(left, _partial(r_im, r_ik, r_km), _partial(r_jm, r_jk, r_km))
    order_2 = _summary(_strength(partial, rows, 2), (k != i) & (k != j) & (m != i) & (m != j))

    rival = torch.where(ranked[..., :1] > link, ranked[..., :1], ranked[..., 1:2])
    rivals = torch.stack([torch.maximum(rival, rival.mT), torch.minimum(rival, rival.mT)], dim=-1)
    single = torch.stack([order_0, _strength(_given_all(corr, rows), rows, size - 2)], dim=-1)
    scale = torch.log(torch.tensor([rows, float(size)])).expand(batch, size, size, 2)
    return torch.cat([single, order_1, (order_2 + order_2.transpose(1, 2)) / 2, rivals, scale], dim=-1)


def _clipped(r):
    return r.clamp(-1 + 1e-6, 1 - 1e-6)


def _partial(r_ij, r_ik, r_jk):
    left = (1 - r_ik.square()) * (1 - r_jk.square())
    return _clipped((r_ij - r_ik * r_jk) * left.clamp_min(1e-12).rsqrt())


def _strength(r, rows, given):
    return torch.log1p(max(rows - given - 3, 1.0) ** 0.5 * torch.atanh(_clipped(r)).abs())


def _given_all(corr, rows):
    size = corr.shape[-1]
    shrink = min(0.5, size / (20 * rows))
    precision = torch.linalg.inv((1 - shrink) * corr + shrink * torch.eye(size))
    scale = precision.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt()
    return -precision / scale[..., :, None] / scale[..., None, :]


def _summary(values, usable):
    """[..., S] -> [..., 8] over the usable ones."""
    count = usable.sum(dim=-1, keepdim=True)
    some = count.clamp_min(1)
    mean = torch.where(usable, values, 0.0).sum(dim=-1, keepdim=True) / some
    deviation = (torch.where(usable, (values - mean).square(), 0.0).sum(dim=-1, keepdim=True) / some).sqrt()
    places = torch.round(torch.tensor(QUANTILES) * (some - 1)).long()
    quantiles = torch.where(usable, values, torch.inf).sort(dim=-1).values.gather(-1, places)
    return torch.where(count > 0, torch.cat([mean, deviation, quantiles], dim=-1), 0.0)
