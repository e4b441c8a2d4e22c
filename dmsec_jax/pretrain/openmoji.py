"""The unseen artist: OpenMoji pictures (CC BY-SA 4.0) rendered at 64 px, split into members and hold-outs.

`python -m dmsec_jax.pretrain.openmoji NODE_MODULES OUT` wrote `assets/openmoji-animals`. Rendering needs the `pretrain` extra (cairosvg).
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dmsec_jax.core.checks import require
from dmsec_jax.core.files import write_atomically
from dmsec_jax.data.images import save_png
from dmsec_jax.pretrain.corpus import composite

PACKAGE = "openmoji@17.0.0"
# Re-colourings and parts of other pictures would make a "different picture" that is nearly the same. The black cat and the phoenix are such, too,
# but were candidates when the split was drawn, which fell on neither; without them the same seed would draw another.
NEAR_DUPLICATES = {
    "guide dog", "service dog", "polar bear", "two-hump camel", "pig nose", "paw prints",
    "feather", "wing", "spider web", "spiral shell", "coral", "microbe", "front-facing baby chick", "hatching chick", "black bird",
}  # fmt: skip
ATTRIBUTION = """# OpenMoji animals, 64 px

All emojis designed by [OpenMoji](https://openmoji.org/) - the open-source emoji and icon project.
License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). Rendered unchanged from the SVG files of the npm
package `{package}` on white at 64 x 64 pixels by `python -m dmsec_jax.pretrain.openmoji`.

`member/` is what the demonstration fine-tunes on, `holdout/` is never trained on; the base model saw none of them. The split is a
random permutation (seed 0) of the animals that are not recoloured copies of one another. Authors, by picture:

{authors}
"""


def render(modules: str | Path, subgroups: tuple[str, ...], size: int = 64) -> list[tuple[str, str, np.ndarray]]:
    """(annotation, author, RGB uint8 [size, size, 3] on white) of every picture of the subgroups, near duplicates left out.

    Raises:
        ValueError: if the package is not below `modules`.
    """
    import cairosvg  # an optional dependency that only this function needs

    root = Path(modules) / "openmoji"
    table = root / "data" / "openmoji.json"
    require(table.is_file(), "modules", f"a node_modules folder with {PACKAGE}", str(modules), f"npm install {PACKAGE}")
    pictures = []
    for row in json.loads(table.read_text()):
        if row["subgroups"] in subgroups and row["annotation"] not in NEAR_DUPLICATES:
            svg = root / "color" / "svg" / f"{row['hexcode']}.svg"
            png = cairosvg.svg2png(url=str(svg), output_width=size, output_height=size)
            rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
            pictures.append((row["annotation"], row["openmoji_author"], composite(rgba)))
    return pictures


def build(modules: str | Path, out: str | Path, members: int = 20, holdouts: int = 40) -> None:
    """Writes `out/member`, `out/holdout` and `out/README.md`."""
    groups = tuple(f"animal-{kind}" for kind in ("mammal", "bird", "marine", "reptile", "bug", "amphibian"))
    pictures = render(modules, groups)
    order = np.random.default_rng(0).permutation(len(pictures))[: members + holdouts]
    authors = []
    for place, index in enumerate(order):
        name, author, picture = pictures[index]
        split = "member" if place < members else "holdout"
        number = place if place < members else place - members
        file = f"{split}/{number:02d}-{name.replace(' ', '-').lower()}.png"
        (Path(out) / split).mkdir(parents=True, exist_ok=True)
        save_png(Path(out) / file, picture)
        authors.append(f"- `{file}`: {author}")
    text = ATTRIBUTION.format(package=PACKAGE, authors="\n".join(authors))
    write_atomically(Path(out) / "README.md", text.encode())


if __name__ == "__main__":
    build(*sys.argv[1:])
