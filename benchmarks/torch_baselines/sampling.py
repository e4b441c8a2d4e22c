"""FineXtract's guided sampling with two networks (`contrasted_sample.py`), deterministic DDIM."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.torch_baselines.networks import Models, nchw, nhwc, prepared, whole
from benchmarks.torch_baselines.passes import Outcome, Run

PUBLIC_BATCH = 5


def two_models(
    base: Models,
    tuned: Models,
    z_T: Any,
    contexts: Sequence[Any],
    visited: Any,
    *,
    w: float,
    k: float,
    final_alpha_bar: float,
    batch: int,
    how: str,
) -> Run:
    """All steps for all latents, `batch` at a time, both networks one after the other.

    Args:
        contexts: of the base and of the tuned model, [1, L, D] each.
        visited: timesteps, descending; after the last comes `final_alpha_bar`.
    """
    networks = [prepared(models.unet, how) for models in (base, tuned)]
    starts = nchw(z_T, how).split(batch)
    texts, steps = [whole(context) for context in contexts], [int(t) for t in visited]
    kind, levels = base.prediction_type, [base.alpha_bar[t] for t in steps] + [torch.tensor(final_alpha_bar)]

    def noise(network, z, t, text, a):
        out = network(z, torch.full((len(z),), t), text.expand(len(z), -1, -1), return_dict=False)[0]
        return out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z

    def one(z: torch.Tensor) -> torch.Tensor:
        for i, t in enumerate(steps):
            a, there = levels[i], levels[i + 1]
            first, second = (noise(net, z, t, text, a) for net, text in zip(networks, texts, strict=True))
            guided = (1 - w + k) * first + w * second
            clean = (z - (1 - a).sqrt() * guided) / a.sqrt()
            z = there.sqrt() * clean + (1 - there).sqrt() * guided
        return z

    def run() -> Outcome:
        with torch.inference_mode():
            found = [one(z) for z in starts]
        return {"latent": lambda: nhwc(torch.cat(found))}

    return run
