"""AlexNet, LPIPS and EfficientNet-Lite0 against small PyTorch versions with the names of their authors' files, on random weights."""

import jax
import numpy as np
import pytest

from benchmarks import efficientnet
from dmsec_jax.core import trees
from dmsec_jax.models import features

pytestmark = pytest.mark.torch

ALEX_LAYERS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")


def nchw(x):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def alexnet_state(widths, seed=0):
    rng = np.random.default_rng(seed)
    state, given = {}, 3
    for i, (layer, width, size) in enumerate(zip(ALEX_LAYERS, widths, features.KERNELS, strict=True)):
        weight = rng.normal(size=(width, given, size, size)) / np.sqrt(given * size**2 / 2)
        state[f"net.{layer}.weight"], state[f"net.{layer}.bias"] = weight, 0.1 * rng.normal(size=width)
        state[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, width, 1, 1))
        given = width
    return {key: value.astype(np.float32) for key, value in state.items()}


def alexnet(state, x):
    """The five outputs, written with PyTorch's functions."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def blur(x):
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (taps[:, None] * taps[None]).expand(x.shape[1], 1, 3, 3)
        return functional.conv2d(functional.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])

    x = (x - torch.tensor(features.SHIFT)[:, None, None]) / torch.tensor(features.SCALE)[:, None, None]
    outputs = []
    for i, layer in enumerate(ALEX_LAYERS):
        if i in (1, 2):
            x = blur(functional.max_pool2d(x, 3, 1))
        weight, bias = (torch.from_numpy(state[f"net.{layer}.{part}"]) for part in ("weight", "bias"))
        x = functional.conv2d(x, weight, bias, padding=features.PADDING[i])
        x = torch.relu(blur(x) if i == 0 else x)
        outputs.append(x)
    return outputs


def lpips(state, a, b):
    torch = pytest.importorskip("torch")
    unit = lambda x: x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
    total = 0
    for i, (f, g) in enumerate(zip(alexnet(state, a), alexnet(state, b), strict=True)):
        weights = torch.from_numpy(state[f"lin{i}.model.1.weight"])
        total = total + torch.nn.functional.conv2d((unit(f) - unit(g)).square(), weights).mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def pair():
    return np.random.default_rng(1).uniform(-1, 1, (2, 2, 45, 64, 3)).astype(np.float32)


def test_alexnet_outputs_distance_and_gradient(pair):
    cfg = features.FeaturesConfig(widths=(4, 6, 8, 6, 5))
    state = alexnet_state(cfg.widths)
    params = trees.unflatten(features.convert(state))
    a, b = nchw(pair[0]).requires_grad_(), nchw(pair[1])
    got = jax.jit(features.apply, static_argnums=0)(cfg, params, pair[0])
    for ours, theirs in zip(got, alexnet(state, a), strict=True):
        theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
        assert theirs.std() > 0.01
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    expected = lpips(state, a, b)
    expected.sum().backward()
    values = jax.jit(features.distance, static_argnums=0)(cfg, params, *pair)
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: features.distance(cfg, params, x, pair[1]).sum()))(pair[0])
    theirs = a.grad.numpy().transpose(0, 2, 3, 1)
    assert np.linalg.norm(gradient - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_shipped_weights_in_half_precision_change_little(pair):
    """The PyTorch version on the shipped numbers; that these are the published ones is checked where they are converted."""
    cfg, params = features.load()
    state = {}
    for i, layer in enumerate(ALEX_LAYERS):
        conv = params[f"conv{i + 1}"]
        state[f"net.{layer}.weight"] = np.ascontiguousarray(conv["kernel"].transpose(3, 2, 0, 1))
        state[f"net.{layer}.bias"] = conv["bias"]
        state[f"lin{i}.model.1.weight"] = params[f"lin{i + 1}"]["scale"].reshape(1, -1, 1, 1)
    values = jax.jit(features.distance, static_argnums=0)(cfg, params, *pair)
    np.testing.assert_allclose(values, lpips(state, nchw(pair[0]), nchw(pair[1])).numpy(), rtol=1e-4)


CFG = efficientnet.EfficientNetConfig(
    stages=(
        efficientnet.Stage(1, 3, 1, 1, 4),
        efficientnet.Stage(2, 5, 2, 2, 6),
        efficientnet.Stage(2, 3, 1, 3, 6),
    ),
    stem=5,
    head=7,
)


def efficientnet_state(cfg, seed=0):
    rng = np.random.default_rng(seed)
    state = {}

    def layer(conv, norm, inputs, outputs, size=1):
        state[f"{conv}.weight"] = rng.normal(size=(outputs, inputs, size, size)) / np.sqrt(inputs * size**2 / 2)
        state[f"{norm}.weight"], state[f"{norm}.bias"] = rng.uniform(0.5, 1.5, outputs), 0.3 * rng.normal(size=outputs)
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = (
            0.3 * rng.normal(size=outputs),
            rng.uniform(0.5, 1.5, outputs),
        )
        state[f"{norm}.num_batches_tracked"] = np.array(7)

    layer("_conv_stem", "_bn0", 3, cfg.stem, 3)
    given, index = cfg.stem, 0
    for stage in cfg.stages:
        for _ in range(stage.repeats):
            block, width = f"_blocks.{index}.", given * stage.expansion
            if stage.expansion > 1:
                layer(f"{block}_expand_conv", f"{block}_bn0", given, width)
            layer(f"{block}_depthwise_conv", f"{block}_bn1", 1, width, stage.size)
            layer(f"{block}_project_conv", f"{block}_bn2", width, stage.features)
            given, index = stage.features, index + 1
    layer("_conv_head", "_bn1", given, cfg.head)
    state["_fc.weight"], state["_fc.bias"] = np.zeros((10, cfg.head)), np.zeros(10)
    return {key: value.astype(np.float32) for key, value in state.items()}


def reference_efficientnet(state, cfg, x):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}

    def layer(x, conv, norm, stride=1, groups=1):
        weight = tensors[f"{conv}.weight"]
        pads = []
        for side in (x.shape[3], x.shape[2]):  # TensorFlow's SAME
            total = max((-(-side // stride) - 1) * stride + weight.shape[2] - side, 0)
            pads += [total // 2, total - total // 2]
        x = functional.conv2d(functional.pad(x, pads), weight, stride=stride, groups=groups)
        parts = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *parts, eps=1e-3)

    x = functional.relu6(layer(x, "_conv_stem", "_bn0", 2))
    outputs, index = [], 0
    for stage in cfg.stages:
        for repeat in range(stage.repeats):
            block, stride = f"_blocks.{index}.", stage.stride if repeat == 0 else 1
            hidden = functional.relu6(layer(x, f"{block}_expand_conv", f"{block}_bn0")) if stage.expansion > 1 else x
            hidden = functional.relu6(layer(hidden, f"{block}_depthwise_conv", f"{block}_bn1", stride, hidden.shape[1]))
            hidden = layer(hidden, f"{block}_project_conv", f"{block}_bn2")
            x = x + hidden if stride == 1 and x.shape[1] == hidden.shape[1] else hidden
            index += 1
        outputs.append(x)
    return [*outputs, functional.relu6(layer(x, "_conv_head", "_bn1"))]


@pytest.mark.parametrize("side", [32, 45])
def test_efficientnet_outputs(side):
    x = np.random.default_rng(2).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    state = efficientnet_state(CFG)
    got = jax.jit(efficientnet.apply, static_argnums=0)(CFG, efficientnet.convert(state, CFG), x)
    for ours, theirs in zip(got, reference_efficientnet(state, CFG, nchw(x)), strict=True):
        assert theirs.std() > 0.01
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)
