"""Settings of every test run: eight virtual CPU devices, of which most tests use one; a persistent compilation cache; checked annotations."""

import dataclasses
import gc
import importlib.metadata
import importlib.util
import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache/jax" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{os.uname().machine}"

# Before jax is imported; whoever sets one of these keeps it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jaxtyping.install_import_hook("dmsec_jax", "typecheck.checked")

hypothesis.settings.register_profile("local", max_examples=25, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

MAPS, MANY_MAPS = Path("/proc/self/maps"), 15_000

NEEDS = {  # marker: (modules, how to get them)
    "torch": (("torch", "diffusers", "transformers"), "the torch extra, run `make parity`"),
    "aot": (("libtpu",), "the aot extra, run `pip install -e .[aot]`"),
}


def pytest_collection_modifyitems(items):
    """Files of the top folder first: they run whole commands and take longest, and two processes end together only if these are not last."""
    items.sort(key=lambda item: len(item.path.relative_to(Path(__file__).parent).parts))


def pytest_runtest_setup(item):
    """Skips, with the reason, a marked test whose packages or devices are not here."""
    for marker, (modules, cure) in NEEDS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if item.get_closest_marker(marker) and missing:
            pytest.skip(f"{', '.join(missing)} not installed; needs {cure}")
    if item.get_closest_marker("device") and jax.default_backend() == "cpu":
        pytest.skip("no GPU or TPU in use; set JAX_PLATFORMS to one")


@pytest.fixture(autouse=True, scope="module")
def bounded_programs():
    """Forgets compiled programs after a file once there are many: each maps memory, and a Linux process that has used up its maps (65,530 by
    default) crashes while it compiles."""
    yield
    if MAPS.is_file() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict():
    """Refuses implicit rank and dtype promotion; for tests of our own code, not through flax or numpyro."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A diffusers folder of the TINY preset with random weights and a byte-level tokenizer."""
    from dmsec_jax.checkpoints import diffusers
    from dmsec_jax.data.tokens import Tokenizer
    from dmsec_jax.models import clip, presets, unet, vae

    place = tmp_path_factory.mktemp("tiny")
    words = Tokenizer.train(["a red dog", "a blue cat"], vocab_size=530, max_length=16)
    words.save(place / "tokenizer")
    marks = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    text = dataclasses.replace(presets.TINY.text, vocab_size=len(words.vocab), **marks)
    preset = dataclasses.replace(presets.TINY, text=text)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "unet": unet.init(keys[0], preset.unet),
        "vae": vae.init(keys[1], preset.vae),
        "text_encoder": clip.init(keys[2], preset.text),
    }
    model = diffusers.Model(configs=preset, params=params, tokenizer=place / "tokenizer")
    diffusers.write_model(place / "model", model, "float32")
    return place / "model"


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_folder):
    """That folder, loaded."""
    from dmsec_jax import pipeline

    return pipeline.load(tiny_folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of four pictures of noise, as large as those of the TINY preset."""
    import numpy as np

    from dmsec_jax.data.images import save_png

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(4):
        save_png(folder / f"{i}.png", rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory):
    """A diffusers folder of the TINY_XL preset with random weights and tokenizers that differ in their padding, as those of Stable Diffusion XL."""
    import numpy as np

    from dmsec_jax.checkpoints import diffusers
    from dmsec_jax.core.trees import map_paths
    from dmsec_jax.data.tokens import Tokenizer
    from dmsec_jax.models import presets

    place, draw = tmp_path_factory.mktemp("tiny_xl"), np.random.default_rng(0)
    words = Tokenizer.train(["a red dog", "a blue cat"], vocab_size=530, max_length=16)
    words.save(place / "tokenizer")
    dataclasses.replace(words, pad="!").save(place / "tokenizer_2")
    marks = {"vocab_size": len(words.vocab), "bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    texts = {name: dataclasses.replace(getattr(presets.TINY_XL, name), **marks) for name in ("text", "text_2")}
    preset = dataclasses.replace(presets.TINY_XL, **texts)

    def fill(path, leaf):
        values = 0.2 * draw.normal(size=leaf.shape) + (1.0 if path.endswith("scale") else 0.0)
        return values.astype(np.float32)

    shapes = lambda name, component: diffusers.shapes(name, getattr(preset, component.field))
    params = {name: map_paths(fill, shapes(name, part)) for name, part in diffusers.components(preset).items()}
    tokenizers = {"tokenizer": place / "tokenizer", "tokenizer_2": place / "tokenizer_2"}
    diffusers.write_model(place / "model", diffusers.Model(configs=preset, params=params, **tokenizers), "float32")
    return place / "model"
