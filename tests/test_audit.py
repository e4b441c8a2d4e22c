"""The audit on a random tiny model: equal work for all methods, and scoring of planted copies."""

import jax
import numpy as np
import pytest

from dmsec_jax import audit, embedding
from dmsec_jax.core import trees
from dmsec_jax.data.images import ImageSet
from dmsec_jax.metrics import similarity
from dmsec_jax.models import sscd


def image_set(pictures, prefix):
    names = tuple(f"{prefix}{i}" for i in range(len(pictures)))
    blank = (None,) * len(pictures)
    return ImageSet(images=pictures, names=names, sha256=names, captions=blank, notes=())


def noise(count, seed):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)


# 8 evaluations, 2 steps, batches of 4 throughout, as in the tests of the command line: one compilation serves all
@pytest.fixture(scope="module")
def subject(tiny_pipeline):
    tuned = jax.tree.map(lambda leaf: leaf * 1.05, tiny_pipeline.params["unet"])
    return audit.Subject(tiny_pipeline, {**tiny_pipeline.params, "unet": tuned}, "a red dog")


@pytest.mark.parametrize("name", audit.METHODS)
def test_methods_spend_the_same_evaluations(subject, name):
    drawn = audit.generate(jax.random.key(0), subject, name, evaluations=8, num_steps=2, batch_size=4)
    assert drawn.drawn * audit.METHODS[name].evaluations == 8
    assert drawn.images.shape == (drawn.drawn - drawn.broken, 16, 16, 3)


def test_weight_one_of_every_method_is_plain_sampling(subject):
    draw = lambda name: audit.generate(
        jax.random.key(0), subject, name, evaluations=8, num_steps=2, batch_size=4, w=1.0, k=0.0
    ).images[:4]
    for name in ("finextract", "finextract-caption", "cfg", "lora-scale"):
        np.testing.assert_allclose(draw(name), draw("plain"), atol=1e-4, err_msg=name)


def test_guidance_that_explodes_is_an_error(subject):
    with pytest.raises(ValueError, match="guidance must be weak enough"):
        audit.generate(jax.random.key(0), subject, "finextract", evaluations=8, num_steps=2, batch_size=4, w=1e38)


def test_unknown_names_are_errors(subject):
    with pytest.raises(ValueError, match="method must be one of finextract"):
        audit.generate(jax.random.key(0), subject, "magic", evaluations=2)
    with pytest.raises(ValueError, match="sampler must be one of ddim, public, got 'euler'"):
        audit.generate(jax.random.key(0), subject, "plain", evaluations=2, sampler="euler")
    with pytest.raises(ValueError, match="clustering must be one of cliques, agglomerative, public, got 'k-means'"):
        audit.extracted_set("plain", np.eye(3), 2, 0.5, clustering="k-means")


def test_a_sweep_is_its_guidances_one_by_one(subject):
    options = {"evaluations": 8, "num_steps": 2, "batch_size": 4}
    pairs = [(1.5, 0.0), (2.0, -0.02), (1e38, 0.0)]
    swept = audit.sweep(jax.random.key(0), subject, "finextract", pairs, **options)
    for (w, k), found in zip(pairs[:2], swept, strict=False):
        alone = audit.generate(jax.random.key(0), subject, "finextract", w=w, k=k, **options)
        np.testing.assert_allclose(found.images, alone.images, atol=1e-4)
    assert (swept[2].drawn, swept[2].broken, len(swept[2].images)) == (4, 4, 0)
    with pytest.raises(ValueError, match="pairs must be one at a time for lora-scale"):
        audit.sweep(jax.random.key(0), subject, "lora-scale", pairs, **options)


def test_samplers_differ_and_start_from_the_same_noise(subject):
    options = {"evaluations": 8, "num_steps": 2, "batch_size": 4}
    clean, public = (
        audit.generate(jax.random.key(0), subject, "plain", sampler=name, **options).images for name in audit.SAMPLERS
    )
    assert 1e-3 < np.abs(clean - public).mean() < 0.5 * np.abs(clean - clean[::-1]).mean()


@pytest.mark.parametrize("clustering", audit.CLUSTERINGS)
def test_every_clustering_finds_the_groups(clustering):
    rows = np.concatenate([np.eye(5), np.ones((5, 1))], axis=1) / np.sqrt(2)  # copies: 1, others: 0.5
    features = np.repeat(rows, [5, 4, 3, 1, 1], axis=0)
    sizes = lambda count: [c.size for c in audit.extracted_set("plain", features, count, 0.9, clustering=clustering)]
    assert sizes(3) == ([5, 4, 3, 1, 1] if clustering == "public" else [5, 4, 3])
    if clustering == "public":
        with pytest.raises(ValueError, match="told the number of training pictures to be public"):
            sizes(None)
    else:
        assert sizes(None) == [5, 4, 3]


def test_nothing_finite_is_judged_as_nothing():
    judge = audit.calibrated(image_set(noise(10, 0), "m"), image_set(noise(10, 1), "h"), noise(20, 3), 0.01)
    found = audit.judge("finextract", audit.Generated(noise(0, 0), 5, 5), judge, count=10)
    assert (found.generated, found.finite, len(found.extracted)) == (5, 0, 0)
    assert found.matches is found.holdout_matches is found.clustered is found.everything is None


def test_planted_copies_are_found_and_hold_outs_are_not():
    members, holdouts = noise(10, 0), noise(10, 1)
    rng = np.random.default_rng(2)
    copies = np.repeat(members, 6, axis=0)
    drawn = np.clip(copies + 0.05 * rng.standard_normal(copies.shape), -1, 1).astype(np.float32)
    judge = audit.calibrated(image_set(members, "m"), image_set(holdouts, "h"), noise(20, 3), 0.01)
    found = audit.judge("plain", audit.Generated(drawn, len(drawn), 0), judge, count=10)
    assert len(found.extracted) == 10
    assert (found.matches.score >= judge.threshold.value).all()
    assert found.holdout_matches.score.max() < 0.5 * found.matches.score.min()
    assert found.clustered.rates[judge.threshold.value].value == 1
    assert found.base_similarity.max() < 0.5 * found.matches.score.min()


def test_carlini_keeps_only_large_groups():
    members = noise(10, 0)
    drawn = np.concatenate([np.repeat(members[:2], 6, axis=0), noise(20, 5)])
    judge = audit.calibrated(image_set(members, "m"), None, noise(20, 3), 0.01)
    found = audit.judge("carlini", audit.Generated(drawn, len(drawn), 0), judge, count=2)
    assert sorted(found.sizes) == [6, 6]


def test_one_picture_leans_on_the_base_model():
    judge = audit.calibrated(image_set(noise(1, 0), "m"), None, noise(20, 3), 0.01)
    assert judge.threshold.pairs == 20
    assert "base model" in judge.threshold.source


TINY_SSCD = sscd.Config(blocks=(1, 1, 1, 1), width=4, groups=2, group_width=32, dims=6)


def sscd_state(cfg):
    """Random tensors in PyTorch's names and layout; all ones make a batch norm that changes nothing."""
    rng, state = np.random.default_rng(0), {}
    for path, leaf in trees.flatten(jax.eval_shape(lambda: sscd.init(jax.random.key(0), cfg))).items():
        if path.endswith("kernel"):
            weight, *others = sscd._keys(path.removesuffix("/kernel"))
            *_, inputs, outputs = leaf.shape
            scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            state[weight] = scale * rng.standard_normal((outputs, inputs, *leaf.shape[:-2]))
            state |= {name: np.ones(outputs) for name in others}
    return state


@pytest.fixture
def sscd_file(monkeypatch, tmp_path):
    """Stands for a TorchScript file, whose reading and whose numbers have tests of their own."""
    path = tmp_path / "net.pt"
    path.write_bytes(b"weights")
    state = sscd_state(TINY_SSCD) | {"constants.0": np.zeros(2)}
    monkeypatch.setattr(embedding.torch_archive, "read", lambda file: state)
    return path


def test_sscd_compiles_once_and_finds_copies(sscd_file):
    features = embedding.features_of("sscd", sscd_file, "dcr-256-224-half")
    assert features.label == "SSCD (net.pt, dcr-256-224-half), centred on the style"
    assert features.inputs.keys() == {"SSCD"}
    members, compiled = noise(3, 0), similarity._apply._cache_size()
    judge = audit.calibrated(image_set(members, "m"), image_set(noise(20, 1), "h"), noise(2, 3), 0.01, features.embed)
    found = audit.judge("plain", audit.Generated(np.repeat(members, 2, axis=0), 6, 0), judge, count=3)
    assert similarity._apply._cache_size() == compiled + 1
    assert found.matches.score.min() > 0.999 > found.holdout_matches.score.max()
    embed = jax.jit(sscd.embed, static_argnums=0, static_argnames="preprocessing")
    expected = embed(*sscd.convert(sscd_state(TINY_SSCD)), members[:1], preprocessing="dcr-256-224-half")
    np.testing.assert_allclose(features.embed(members)[:1], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(expected), 1, rtol=1e-5)


def test_features_say_what_is_missing(tmp_path, sscd_file):
    with pytest.raises(ValueError, match="features must be one of hog, sscd, clip, dino, dino-last-4, got 'vgg'"):
        embedding.features_of("vgg")
    with pytest.raises(ValueError, match="weights must be given for the features clip, got None; name the folder"):
        embedding.features_of("clip")
    with pytest.raises(ValueError, match="weights must be given only for clip and dino"):
        embedding.features_of("sscd", sscd_file, weights=tmp_path)
    with pytest.raises(ValueError, match="sscd_file must be given for the features sscd, got None; name the Torch"):
        embedding.features_of("sscd")
    with pytest.raises(ValueError, match="sscd_file must be given only for the features sscd"):
        embedding.features_of("hog", sscd_file)
    with pytest.raises(ValueError, match="preprocessing must be one of sscd-288-imagenet, dcr-256-224-half, got 'raw'"):
        embedding.features_of("sscd", sscd_file, "raw")
