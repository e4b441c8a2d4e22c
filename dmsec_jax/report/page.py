"""Building blocks of one self-contained HTML page: no external resource, no script needed to read it.

Everything that goes into a template is escaped unless it is `Markup` made here: file names and prompts come from
strangers. The page's own policy also forbids every load and every script but the one written here.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dmsec_jax.core.files import write_atomically
from dmsec_jax.core.types import AnyArray
from dmsec_jax.data.images import from_uint8, grid, to_uint8

FOLDER = Path(__file__).parent
CRISP = 128
"""Pictures of at most this many pixels are enlarged without smoothing: their pixels are what was measured."""
LONGEST = 256
"""Larger pictures are reduced to this in the page."""
TILE = 96
"""The same for samples in a row."""
DASH = "\N{EN DASH}"
SCRIPT = (
    "document.querySelectorAll('button.copy').forEach(b=>{b.hidden=false;b.onclick=()=>navigator.clipboard"
    ".writeText(b.parentNode.querySelector('code').innerText).then(()=>{b.textContent='copied'})})"
)
"""The only script: buttons that copy the command beside them; without it they stay hidden."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture inside a page, for the macro `picture` of `macros.html.j2`."""

    uri: str
    width: int
    height: int
    alt: str
    crisp: bool


def picture(image: Float[AnyArray, "H W 3"], alt: str, longest: int = LONGEST) -> Picture:
    """A picture in [-1, 1] as an inline PNG, reduced to `longest` pixels where larger; one with NaN or infinity becomes a
    hatched tile that says so."""
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        alt = f"{alt} (not finite, cannot be shown)"
    crisp = max(image.shape) <= CRISP
    shown = _reduced(image, longest)
    stream = io.BytesIO()
    shown.save(stream, format="PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    return Picture(uri=uri, width=shown.width, height=shown.height, alt=alt, crisp=crisp)


def tiles(images: Float[AnyArray, "N H W 3"], alt: str) -> list[Picture]:
    """Many small pictures, for the macro `tiles` of `macros.html.j2`; reduced to `TILE` where larger."""
    return [picture(image, f"{alt}, {i + 1}", TILE) for i, image in enumerate(images)]


def contact(images: Float[AnyArray, "N H W 3"], columns: int) -> UInt8[np.ndarray, "R S 3"]:
    """One sheet on white, for a file of its own, made as `tiles` but with pictures of up to `LONGEST` pixels."""
    reduced = [np.asarray(_reduced(image, LONGEST)) for image in np.asarray(images, np.float32)]
    return to_uint8(grid(from_uint8(np.stack(reduced)), columns))


def render(template: str, **values: Any) -> str:
    """A page from `<template>.html.j2`; a name that is missing in `values` is an error.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not given.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = _environment().get_template(f"{template}.html.j2").render(script=SCRIPT, script_hash=digest, **values)
    return page.encode("utf-8", "backslashreplace").decode()


def write(path: str | Path, page: str) -> None:
    """Writes a page, all of it or nothing.

    Raises:
        OSError: if it cannot be written; an older file then stays as it was.
    """
    write_atomically(path, page.encode())


def command_line(argv: Sequence[str], program: str = "dmsec") -> str:
    """The command for a shell, quoted where needed."""
    return shlex.join([program, *argv])


def printable(text: str) -> str:
    """`text` on one line, with control, formatting and unassigned characters shown as U+FFFD: safe for a terminal."""
    return _visible(" ".join(text.split()))


def cut(text: str, width: int) -> str:
    """`text`, its end left out where it is longer than `width`."""
    return text if len(text) <= width else text[: width - 1] + "…"


def rarity(p_value: float) -> str:
    """How often something of this small probability happens."""
    if p_value < 1e-3:
        return "less than once in 1,000 audits"
    return f"about once in {float(f'{1 / p_value:.2g}'):.0f} audits"


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash where there is none."""
    return DASH if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def between(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval for people; empty where there is none."""
    known = low is not None and high is not None and np.isfinite([low, high]).all()
    return f"{low:.{digits}f}{DASH}{high:.{digits}f}" if known else ""


def duration(seconds: float) -> str:
    """A time for people: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    if not np.isfinite(seconds):
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=lambda value: _visible(value) if type(value) is str else value,  # not `Markup`, which was made here
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, duration=duration)
    return environment


def _visible(text: str) -> str:
    return "".join("\ufffd" if unicodedata.category(char)[0] == "C" and char not in "\n\t" else char for char in text)


def _reduced(image: np.ndarray, longest: int) -> Image.Image:
    """[H, W, 3] in [-1, 1] as a picture of at most `longest` pixels a side; hatched if it is not finite."""
    shown = Image.fromarray(to_uint8(image if np.isfinite(image).all() else _hatched(*image.shape[:2])))
    shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return shown


def _hatched(height: int, width: int) -> np.ndarray:
    """Diagonal stripes [H, W, 3]."""
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // 6) % 2
    return np.repeat(np.where(stripes, 0.55, 0.75)[..., None], 3, axis=-1).astype(np.float32)
