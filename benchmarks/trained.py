"""Models for benchmarks: the embedded model after several numbers of steps on N0 pictures of a set, the others kept as hold-outs."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np

from dmsec_jax import pipeline, tuning
from dmsec_jax.commands.demo import PICTURES
from dmsec_jax.core import config
from dmsec_jax.core.checks import require
from dmsec_jax.data import images
from dmsec_jax.data.images import ImageSet

LORA = ("lora.rank=64", "lora.alpha=64", "lora.targets=attention+ff+conv", "tune.learning_rate=0.001")
TUNERS = {"full": (), "lora": LORA, "oft": ("oft.blocks=4", "oft.targets=attention", "tune.learning_rate=0.003")}
"""Tuner -> its overrides of the recipe."""
SPLIT = {"member", "holdout"}


@functools.lru_cache(maxsize=8)  # a benchmark asks for the same few sets with many seeds
def read_set(name: str, pixels: int, seed: int = 0) -> ImageSet:
    """All pictures of a set: `openmoji`, the shipped animals; or every picture of a folder and of the folders `member` and `holdout` in it.

    A folder of other folders is a collection of subjects; `seed` then chooses one of them.
    """
    root = PICTURES if name == "openmoji" else Path(name)
    require(root.is_dir(), "set", "openmoji or a folder of pictures", name, "correct the path")
    inside = sorted(path for path in root.iterdir() if path.is_dir())
    if inside and not SPLIT.issuperset(path.name for path in inside):
        inside = [inside[seed % len(inside)]]
    parts = [images.read_folder(folder, pixels) for folder in inside or [root]]
    fields = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(ImageSet)}
    joined = {name: tuple(itertools.chain(*values)) for name, values in fields.items() if name != "images"}
    return ImageSet(images=np.concatenate(fields["images"]), **joined)


class Training:
    """One training: its pictures and hold-outs drawn by the seed, and the models after each of `steps`, trained when first asked for."""

    def __init__(
        self,
        base: pipeline.Pipeline,
        name: str,
        tuner: str,
        n0: int,
        seed: int,
        steps: tuple[int, ...],
        overrides: tuple[str, ...] = (),
    ):
        everything = read_set(name, base.pixels, seed)
        short = f"{len(everything)} pictures"
        require(len(everything) > n0, name, f"a set of more than {n0} pictures", short, "lower n0")
        order = np.random.default_rng(seed).permutation(len(everything)).tolist()
        self.pictures, self.holdout = images.split(images.reorder(everything, order), n0)
        self.base, self.name, self.tuner, self.n0, self.seed, self.steps = base, Path(name).name, tuner, n0, seed, steps
        self.prompt = "an openmoji icon of an animal" if name == "openmoji" else "a picture in sks style"
        overrides = (*TUNERS[tuner], f"tune.num_steps={max(steps)}", *overrides)
        self.recipe = tuning.read(None, overrides)
        odd = [count for count in steps if count % self.recipe.chunk_steps]
        require(not odd, "steps", f"multiples of {self.recipe.chunk_steps}", odd, "round them")

    def identity(self, holdouts: int) -> list:
        """What decides the answers of a model about its pictures and so many hold-outs, but for its number of steps; for what is kept of them."""
        asked = (*self.pictures.sha256, *self.holdout.sha256[:holdouts])
        recipe = config.to_dict(self.recipe)
        del recipe["tune"]["num_steps"]
        return [self.base.sha256, self.prompt, asked, recipe]

    @property
    def folder(self) -> str:
        """A name for what is kept of this training."""
        return f"{self.name}_{self.tuner}_{self.n0}_seed{self.seed}"

    def case(self, steps: int) -> dict:
        return {"set": self.name, "tuner": self.tuner, "n0": self.n0, "steps": steps}

    @functools.cached_property
    def models(self) -> dict[int, dict]:
        """Parameters after each of `steps` steps; with a constant learning rate they do not depend on how long the training goes on."""
        kept = {}

        def keep(done, info, state):
            if done in self.steps:
                kept[done] = jax.device_get(tuning.merged(self.base, self.recipe, tuning.mean(self.recipe, state)))

        prompts = [self.prompt] * len(self.pictures)
        key = jax.random.key(self.seed)
        tuned = tuning.tune(key, self.base, self.pictures.images, prompts, self.recipe, on_chunk=keep)
        if not tuned.finished:  # some models are missing, so nothing may be concluded
            raise KeyboardInterrupt
        return kept
