"""CLIP, CLIP-IQA and DINO against transformers on random weights, through the files that it saves."""

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints import feature_networks
from dmsec_jax.metrics import perception
from dmsec_jax.models import clip_pair, vit
from dmsec_jax.models.preprocessing import preprocess

pytestmark = pytest.mark.torch

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
MARKS = {"bos_token_id": 28, "eos_token_id": 29, "pad_token_id": 29}
IDS = np.array([[28, 5, 7, 29, 29, 29], [28, 9, 2, 3, 8, 29]], np.int32)


def randomised(network):
    """All parameters random, norms near their usual values."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan = np.prod(parameter.shape[1:]) if parameter.ndim > 1 and "embedding" not in name else 25
            mean = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, float(fan) ** -0.5)
    return network.eval()


def pictures(count=3, height=40, width=52):
    return np.random.default_rng(0).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


def nchw(x):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(("method", "how"), [
    ("bicubic", vit.clip_preprocessing(vit.VisionConfig(image_size=28))),
    ("bicubic", vit.dino_preprocessing(vit.DINO_S16)),
])  # fmt: skip
def test_preprocessing(method, how):
    torch = pytest.importorskip("torch")
    x = (nchw(pictures()) + 1) / 2
    size = (how.resize, 52 * how.resize // 40)
    resized = torch.nn.functional.interpolate(x, size, mode=method, antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((side - how.crop) // 2 for side in size)
    cut = resized[:, :, top : top + how.crop, left : left + how.crop].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess(pictures(), how), (cut - how.mean) / how.std, atol=2e-4)


def test_clip_towers_and_quality(tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = SIZES | MARKS | {"vocab_size": 30, "max_position_embeddings": 6}
    vision = SIZES | {"image_size": 28, "patch_size": 7}
    network = randomised(
        library.CLIPModel(library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    )
    with torch.no_grad():
        network.logit_scale.fill_(np.log(perception.SCALE))
    network.save_pretrained(tmp_path)
    cfg, params = feature_networks.read_clip(tmp_path)
    x = nchw(preprocess(pictures(), vit.clip_preprocessing(cfg.vision)))
    with torch.no_grad():
        theirs = network(pixel_values=x, input_ids=torch.from_numpy(IDS).long())
        last = network.vision_model(x).last_hidden_state.numpy()
    image = jax.jit(clip_pair.image_features, static_argnums=0)(cfg, params, pictures())
    texts = jax.jit(clip_pair.text_features, static_argnums=0)(cfg, params, IDS)
    np.testing.assert_allclose(image, theirs.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(texts, theirs.text_embeds.numpy(), atol=1e-4)
    assert np.abs(image[0] - image[1]).max() > 1e-2
    shares = theirs.logits_per_image.softmax(dim=1)[:, 0].numpy()
    np.testing.assert_allclose(perception.quality(image, texts), shares, atol=2e-3)
    ours = vit.apply(cfg.vision, params["vision_model"], np.asarray(x).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(ours.last_hidden, last, atol=1e-4)


def test_dino_class_tokens_of_every_layer(tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = library.ViTConfig(**SIZES, image_size=28, patch_size=7)
    network = randomised(library.ViTModel(config, add_pooling_layer=False))
    network.save_pretrained(tmp_path)
    cfg, params = feature_networks.read_dino(tmp_path)
    x = nchw(preprocess(pictures(), vit.dino_preprocessing(cfg)))
    with torch.no_grad():
        states = network(x, output_hidden_states=True).hidden_states[1:]
        classes = torch.stack([network.layernorm(state)[:, 0] for state in states], dim=1).numpy()
        if len(states) != 3:
            pytest.fail(f"{len(states)} states of 3 layers")
    ours = vit.apply(cfg, params, np.asarray(x).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(ours.classes, classes, atol=1e-4)
    for last in (1, 2):
        joined = classes[:, -last:].reshape(3, -1)
        features = jax.jit(vit.dino_features, static_argnums=0, static_argnames="last")(
            cfg, params, pictures(), last=last
        )
        np.testing.assert_allclose(features, joined / np.linalg.norm(joined, axis=1, keepdims=True), atol=1e-4)


def test_published_sizes():
    torch, library = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    with torch.device("meta"):
        network = library.CLIPModel(library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    assert sum(parameter.numel() for parameter in network.parameters()) == 427_616_513
