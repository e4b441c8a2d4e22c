"""Pictures and captions for pre-training: three open icon styles, and natural pictures for the autoencoder.

Sources (licences in `assets/emoji-ldm/README.md`): npm `emoji-datasource-google` (Noto), `emoji-datasource-twitter` (Twemoji) and
`@lobehub/fluent-emoji-3d` (Fluent), joined on the code point; colour photographs of scikit-image; photo cut-outs of Tux Paint.
OpenMoji is never read here: it is the unseen artist of the few-shot experiments.
"""

import dataclasses
import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dmsec_jax.core.checks import fail, require

PACKAGES = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0")
STYLES = ("noto", "twemoji", "fluent")
CONCEPTS = (
    "animal-", "cat-face", "monkey-face", "plant-", "food-fruit", "food-vegetable", "food-prepared", "food-sweet", "drink",
    "face-smiling", "face-affection", "face-tongue", "face-concerned", "face-costume", "face-hat", "face-glasses",
    "heart", "transport-ground", "transport-air", "transport-water",
)  # fmt: skip
"""Subcategories (prefixes) that the denoiser learns; the autoencoder sees every icon."""


@dataclasses.dataclass(frozen=True)
class Icon:
    """One picture: `style`, lower-case `name`, Unicode `subcategory`, `code` point, `rgba` uint8 [S, S, 4], and its split."""

    style: str
    name: str
    subcategory: str
    code: str
    rgba: np.ndarray
    held_out: bool

    @property
    def captions(self) -> tuple[str, ...]:
        """The prompts that describe it, the full one first."""
        article = "an" if self.name[0] in "aeiou" else "a"
        return (
            f"a {self.style} icon of {article} {self.name}",
            f"an icon of {article} {self.name}",
            f"{self.style} {self.name}",
        )


def install(folder: str | Path) -> Path:
    """Installs the icon packages with npm below `folder`; returns the `node_modules` path. A second call is instant.

    Raises:
        ValueError: if npm fails, or is not there.
    """
    folder = Path(folder)
    modules = folder / "node_modules"
    missing = [spec for spec in PACKAGES if not (modules / spec.rpartition("@")[0]).is_dir()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        # pictures need no scripts, and those of a package would run with our rights
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
        try:
            subprocess.run(["npm", "install", *options, *missing], check=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            raise fail(
                "npm install", "able to install the icons", error, "see its message above, or install npm"
            ) from error
    return modules


def read_icons(modules: str | Path, size: int = 64, hold_out: float = 0.06) -> list[Icon]:
    """All icons of the three styles at `size` pixels, without skin-tone variants and flags.

    A picture is held out by a hash of its code and style, so the split does not depend on order or on other settings; the same concept
    usually stays in training in the other two styles.

    Raises:
        ValueError: if the packages are not below `modules`.
    """
    modules = Path(modules)
    table = modules / "emoji-datasource-google" / "emoji.json"
    require(
        table.is_file(),
        "modules",
        "a node_modules folder with the icon packages",
        str(modules),
        "call install(folder) first",
    )
    icons = []
    for row in json.loads(table.read_text()):
        if row["category"] in ("Flags", "Component") or not row["name"]:
            continue
        stem, name = row["image"].removesuffix(".png"), _readable(row["name"])
        short = stem.replace("-fe0f", "")
        paths = {
            "noto": [modules / f"emoji-datasource-google/img/google/64/{stem}.png"],
            "twemoji": [modules / f"emoji-datasource-twitter/img/twitter/64/{stem}.png"],
            "fluent": [modules / f"@lobehub/fluent-emoji-3d/assets/{s}.webp" for s in (stem, short)],
        }
        for style, choices in paths.items():
            path = next((p for p in choices if p.is_file()), None)
            if path is not None:
                rgba = np.asarray(
                    Image.open(path).convert("RGBA").convert("RGBa").resize((size, size), Image.LANCZOS).convert("RGBA")
                )
                held_out = _hash01(f"{style}/{stem}") < hold_out
                icons.append(Icon(style, name, row["subcategory"], stem, rgba, held_out))
    return icons


def _readable(name: str) -> str:
    """`EMOJI NAME` of the Unicode table as a phrase: lower case, no colons or quotes, 'face' order kept."""
    words = name.lower().replace(":", " ").replace("“", "").replace("”", "").replace("-", " ").split()
    return " ".join(words)


def _hash01(text: str) -> float:
    """Stable pseudo-random number in [0, 1) of a string (FNV-1a with a final mix)."""
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (value ^ (value >> 16)) / 2**32


def concepts(icons: Iterable[Icon]) -> list[Icon]:
    """The icons whose subcategory the denoiser learns."""
    return [icon for icon in icons if icon.subcategory.startswith(CONCEPTS)]


def composite(rgba: np.ndarray, background=(255, 255, 255)) -> np.ndarray:
    """RGBA uint8 [..., 4] over a plain background -> RGB uint8 [..., 3]."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)).astype(np.uint8)


def outlined(rgba: np.ndarray, width: int, colour) -> np.ndarray:
    """The icon with its silhouette and its inner edges traced by a line, so that the autoencoder learns thin strokes."""
    alpha = rgba[..., 3].astype(np.float32) / 255
    padded = np.pad(alpha, width)
    size = alpha.shape[0]
    offsets = [(i, j) for i in range(2 * width + 1) for j in range(2 * width + 1)]
    windows = np.stack([padded[i : i + size, j : j + size] for i, j in offsets])
    line = windows.max(0) - windows.min(0)
    grey = composite(rgba).astype(np.float32).mean(-1) / 255
    edges = np.hypot(np.diff(grey, axis=0, append=grey[-1:]), np.diff(grey, axis=1, append=grey[:, -1:]))
    line = np.clip(np.maximum(line, np.where(edges > 0.15, 4 * edges, 0)), 0, 1)[..., None]
    out = rgba.astype(np.float32).copy()
    out[..., :3] = out[..., :3] * (1 - line) + np.asarray(colour, np.float32) * line
    out[..., 3] = 255 * np.maximum(alpha, line[..., 0])
    return np.round(out).astype(np.uint8)


def photographs(files: Iterable[Path], count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random square crops of photographs, each at a random scale, as uint8 [count, size, size, 3]."""
    pictures = [Image.open(f).convert("RGB") for f in files]
    crops = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        picture = pictures[rng.integers(len(pictures))]
        side = int(np.exp(rng.uniform(np.log(size), np.log(min(picture.size)))))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
        crops[i] = np.asarray(picture.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS))
    return crops


def autoencoder_corpus(
    icons: Sequence[Icon], photo_files: Sequence[Path], cutout_files: Sequence[Path], size: int, seed: int
):
    """Training pictures of the autoencoder, uint8 [N, size, size, 3]: icons on white, on colours and outlined, cut-outs, photographs.

    `photo_files` and `cutout_files` may be empty; held-out icons are left out.
    """
    rng = np.random.default_rng(seed)
    train = [icon.rgba for icon in icons if not icon.held_out]
    cutouts = [np.asarray(_square(Image.open(f).convert("RGBA"), size)) for f in cutout_files]
    colours = lambda n: rng.integers(0, 256, (n, 3))
    pictures = [composite(rgba) for rgba in train]
    for rgba, colour, kind in zip(train, colours(len(train)), rng.random(len(train)), strict=True):
        if kind < 0.25:
            pictures.append(composite(rgba, colour))
        elif kind < 0.65:
            line = (0, 0, 0) if rng.random() < 0.7 else rng.integers(0, 120, 3)
            ground = (255, 255, 255) if rng.random() < 0.7 else colour
            pictures.append(composite(outlined(rgba, int(rng.integers(1, 3)), line), ground))
    pictures += [composite(rgba, colour) for rgba in cutouts for colour in [(255, 255, 255), *colours(2)]]
    if photo_files:
        pictures += list(photographs(photo_files, len(pictures) // 3, size, rng))
    return np.stack(pictures)


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The picture fitted into a transparent square."""
    picture = picture.convert("RGBa")
    picture.thumbnail((size, size), Image.LANCZOS)
    canvas = Image.new("RGBa", (size, size))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return canvas.convert("RGBA")
