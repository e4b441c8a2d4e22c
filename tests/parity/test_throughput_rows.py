"""Rows of the throughput benchmark at tiny sizes: both sides compute the same. The others are compared whenever they are measured."""

import numpy as np
import pytest

pytestmark = pytest.mark.torch


def largest(case):
    """The largest difference of the baselines that need no compiler."""
    from benchmarks.throughput import cases

    ours = case.named(cases.build(case).run())
    peers = [build() for name, build in case.peers.items() if name != cases.COMPILED]
    return max(error for run in peers for error in cases.differences(case, ours, run()).values())


def test_spots_posterior_objective_and_steps_are_those_of_their_baselines():
    from benchmarks.throughput import discovery

    assert largest(discovery.posterior(10, 2)) < 1e-5
    assert largest(discovery.lagrangian(8, 2)) < 1e-5
    assert largest(discovery.steps(8, 2)) < 2e-3


def test_rows_are_chosen_by_pattern_and_can_be_named_again():
    from benchmarks.throughput import rows

    names = list(rows.chosen((), (1, 8)))
    assert len(names) == len(set(names))
    assert not any("sd15" in name or " " in name for name in names)
    assert {"unet-forward/sd15/1", "unet-forward/sd15/2"} <= set(rows.chosen(("*/sd15/*",), (1,)))
    for name in np.random.default_rng(0).permutation(names)[:5]:
        assert list(rows.chosen((name,), (1, 8))) == [name]


@pytest.mark.slow
def test_compiled_baselines_have_the_gradient_of_doubling():
    """With the module's own `interpolate` Inductor 2.13 gives zero here."""
    import torch
    from diffusers.models.unets.unet_2d_blocks import UpBlock2D

    from benchmarks.torch_baselines import networks

    torch.manual_seed(0)
    block = networks.compilable(UpBlock2D(384, 384, 384, 512, num_layers=1, resnet_groups=32)).requires_grad_(False)
    x, skipped, time = torch.randn(1, 384, 8, 8), torch.randn(1, 384, 8, 8), torch.randn(1, 512)
    cotangent = torch.randn(1, 384, 16, 16)

    def gradient(run):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(run(leaf, (skipped,), time), leaf, cotangent)[0].numpy()

    np.testing.assert_allclose(gradient(torch.compile(block, dynamic=False)), gradient(block), rtol=1e-3, atol=1e-3)
