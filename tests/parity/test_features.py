"""PyTorch files and SSCD networks: the same tensors and the same descriptors as PyTorch's."""

import re

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints import torch_archive
from dmsec_jax.models import sscd

pytestmark = pytest.mark.torch


def various():
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    return {
        **{kind: (base[0] % 3).to(getattr(torch, kind)) for kind in kinds},
        "base": base,
        "part": base[:, 1:, ::2],
        "turned": base.permute(2, 0, 1),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.full((2,), 7.0)),
    }


def as_numpy(tensor):
    torch = pytest.importorskip("torch")
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_saved_tensors_read_back_equal(tmp_path, modern):
    torch = pytest.importorskip("torch")
    tensors = various()
    saved = {"state": tensors, "epoch": 3, "rate": 0.5, "more": [tensors["base"], (None, "text", -(2**40))]}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
    got = torch_archive.read(tmp_path / "x.pt")
    assert got.keys() == {f"state.{name}" for name in tensors} | {"more.0"}
    for name, tensor in tensors.items():
        value = got[f"state.{name}"]
        assert str(value.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert not value.flags.writeable
        value = value.astype(np.float32) if name == "bfloat16" else value
        np.testing.assert_array_equal(value, as_numpy(tensor), strict=True)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_reads_back_under_its_names(tmp_path, modern):
    torch = pytest.importorskip("torch")
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()  # an OrderedDict
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=modern)
    got = torch_archive.read(tmp_path / "x.pt")
    assert got.keys() == state.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, as_numpy(state[name]), strict=True)


def test_a_negated_view_is_refused_rather_than_read_with_the_wrong_sign(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch._neg_view(torch.ones(2))}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="must be"):
        torch_archive.read(tmp_path / "x.pt")


def test_a_scripted_module_reads_back_equal(tmp_path):
    torch = pytest.importorskip("torch")
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    module = torch.nn.Sequential(inner, torch.nn.Conv2d(4, 2, 1)).eval()
    torch.jit.save(torch.jit.script(module), str(tmp_path / "x.pt"))
    got, state = torch_archive.read(tmp_path / "x.pt"), module.state_dict()
    assert got.keys() == state.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, as_numpy(state[name]), strict=True)


def test_constants_of_a_traced_module_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    constant = torch.tensor([1.5, 2.5])
    torch.jit.save(torch.jit.trace(lambda x: x + constant, torch.zeros(2)), str(tmp_path / "x.pt"))
    got = torch_archive.read(tmp_path / "x.pt")
    np.testing.assert_array_equal(got["constants.0"], [1.5, 2.5])


def reference(cfg, seed=0):
    """The published architecture with torchvision's names, all values random, statistics of batch norms included."""
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, given, inner, outer, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(given, inner, 1, bias=False), nn.BatchNorm2d(inner)
            self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=cfg.groups, bias=False)
            self.bn2 = nn.BatchNorm2d(inner)
            self.conv3, self.bn3 = nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)
            self.downsample = nn.Identity()
            if stride > 1 or given != outer:
                self.downsample = nn.Sequential(nn.Conv2d(given, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

        def forward(self, x):
            hidden = torch.relu(self.bn1(self.conv1(x)))
            hidden = torch.relu(self.bn2(self.conv2(hidden)))
            return torch.relu(self.bn3(self.conv3(hidden)) + self.downsample(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, cfg.width, 7, 2, 3, bias=False), nn.BatchNorm2d(cfg.width)
            given = cfg.width
            for stage, count in enumerate(cfg.blocks):
                inner, outer = INNER[cfg][stage], 4 * cfg.width * 2**stage
                strides = [2 if stage and not i else 1 for i in range(count)]
                blocks = [Block(outer if i else given, inner, outer, stride) for i, stride in enumerate(strides)]
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
                given = outer
            self.fc = nn.Linear(given, cfg.dims)

        def forward(self, x):
            x = functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            x = x.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
            return functional.normalize(self.fc(x))

    network, generator = Network().eval(), torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.3
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
            if re.search(r"bn\d\.weight|downsample\.1\.weight|running_var", name):
                value.abs_().add_(0.5)
    return network


RESNET = sscd.Config(blocks=(2, 1, 1, 1), width=8, dims=6)
RESNEXT = sscd.Config(blocks=(1, 2, 1, 1), width=8, groups=4, group_width=32, dims=6)
INNER = {RESNET: (8, 16, 32, 64), RESNEXT: (16, 32, 64, 128)}
configs = pytest.mark.parametrize("cfg", [RESNET, RESNEXT], ids=["resnet", "resnext"])


def pictures(shape=(2, 3, 45, 64)):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@configs
@pytest.mark.parametrize("saved", ["zip", "legacy", "torchscript"])
def test_descriptors_equal_those_of_pytorch(tmp_path, cfg, saved):
    torch = pytest.importorskip("torch")
    network, x, path = reference(cfg), pictures(), tmp_path / "x.pt"
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
        if saved == "torchscript":
            torch.jit.save(torch.jit.trace(network, torch.from_numpy(x)), str(path))
        else:
            torch.save(network.state_dict(), path, _use_new_zipfile_serialization=saved == "zip")
    state = torch_archive.read(path)
    got_cfg, params = sscd.convert({key: value for key, value in state.items() if not key.startswith("constants.")})
    assert got_cfg == cfg
    got = jax.jit(sscd.apply, static_argnums=0)(cfg, params, x.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "the descriptors must depend on the picture"


def classy(name):
    """torchvision's name -> the one in the TorchScript files, which Classy Vision wrote."""
    if match := re.fullmatch(r"(conv1|bn1)\.(\w+)", name):
        return f"backbone.initial_block._module.{('conv1', 'bn1').index(match[1])}.{match[2]}"
    if name.startswith("fc."):
        return f"embeddings.1.{name[3:]}"
    stage, index, branch, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.+)", name).groups()
    places = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}
    branch = f"convolutional_block.{places[branch]}" if branch in places else {"bn3": "bn"}.get(branch, branch)
    return f"backbone.blocks.{int(stage) - 1}.block{int(stage) - 1}-{index}.{branch}.{rest}"


def test_names_of_classy_vision_mean_the_same():
    state = {name: value.numpy() for name, value in reference(RESNET).state_dict().items()}
    cfg, params = sscd.convert({classy(name): value for name, value in state.items()})
    assert cfg == RESNET
    jax.tree.map(np.testing.assert_array_equal, params, sscd.convert(state)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer2.0.bn2.bias"), r"missing: layer2\.0\.bn2\.bias"),
        (lambda s: s.update(extra=np.zeros(2)), r"unused: extra \[2\]"),
        (lambda s: s.update({"layer3.0.conv3.weight": np.zeros((128, 33, 1, 1))}), r"mis-shaped: layer3\.0\.conv3"),
        (lambda s: s.update({"layer3.0.conv3.weight": np.zeros((128, 32))}), r"mis-shaped: layer3\.0\.conv3"),
        (lambda s: s.update({"layer3.0.bn3.bias": np.zeros(5)}), r"mis-shaped: layer3\.0\.conv3"),
        (lambda s: s.update({"layer4.99999999.conv1.weight": np.zeros(2)}), r"unused: layer4\.99999999|missing"),
        (lambda s: s.pop("fc.weight"), r"fc\.weight"),
        (lambda s: s.update({"conv1.weight": np.zeros((0, 3, 7, 7))}), "conv1"),
    ],
)
def test_a_wrong_state_is_an_error_that_names_the_tensor(change, message):
    state = {name: value.numpy() for name, value in reference(RESNET).state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=r"SSCD weights must be[\s\S]*" + message):
        sscd.convert(state)


@pytest.mark.parametrize(("name", "size", "crop"), [("sscd-288-imagenet", 288, 0), ("dcr-256-224-half", 256, 224)])
@pytest.mark.parametrize("shape", [(400, 601), (50, 40)], ids=str)
def test_preprocessing_equals_that_of_pytorch(name, size, crop, shape):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(1).uniform(-1, 1, (1, *shape, 3)).astype(np.float32)
    scaled = [size * side // min(shape) for side in shape]
    x = torch.from_numpy(image.transpose(0, 3, 1, 2) / 2 + 0.5)
    x = torch.nn.functional.interpolate(x, scaled, mode="bilinear", antialias=True, align_corners=False).numpy()
    if crop:
        top, left = (round((side - crop) / 2) for side in scaled)
        x = x[:, :, top : top + crop, left : left + crop]
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if not crop else ((0.5,) * 3, (0.5,) * 3)
    expected = (x.transpose(0, 2, 3, 1) - mean) / std
    np.testing.assert_allclose(sscd.preprocess(image, name), expected, atol=1e-4)
