"""Picture files of people, read and written so that all but the pixels stays: size, transparency, colour profile, metadata, format.

The pixels are 8-bit samples, grey or RGB, upright. What cannot be kept is refused or said in a note.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dmsec_jax.core.checks import require
from dmsec_jax.core.files import read_bounded, write_atomically
from dmsec_jax.data import metadata
from dmsec_jax.data.decode import BACKGROUND, MAX_BYTES, MAX_PIXELS, from_16_bit, open_bounded

LOSSLESS = {
    "PNG": (".png", {"optimize": False}),
    "TIFF": (".tiff", {"compression": "tiff_adobe_deflate"}),
    "WEBP": (".webp", {"lossless": True, "exact": True}),
    "BMP": (".bmp", {}),
    "PPM": (".ppm", {}),
}
"""Format -> suffix and how it is written without loss; files of others become PNG."""
WITH_ALPHA = {"PNG", "TIFF", "WEBP"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Original:
    """A picture file taken apart.

    Attributes:
        pixels: [H, W, 1] or [H, W, 3], 0..255, upright.
        alpha: [H, W, 1], 0 (clear) to 255, or None.
        format: what it is written as, a key of `LOSSLESS`.
        metadata: options for writing, see `metadata.options`.
        notes: what was changed in it, one sentence each.
    """

    pixels: UInt8[np.ndarray, "H W C"]
    alpha: UInt8[np.ndarray, "H W 1"] | None
    format: str
    metadata: dict
    notes: tuple[str, ...]

    @property
    def shown(self) -> UInt8[np.ndarray, "H W C"]:
        """The pixels on white, as a viewer or a trainer sees them."""
        if self.alpha is None:
            return self.pixels
        opacity = self.alpha.astype(np.float32) / 255
        return np.rint(self.pixels * opacity + BACKGROUND[0] * (1 - opacity)).astype(np.uint8)

    @property
    def suffix(self) -> str:
        """Of the file that `save` writes."""
        return LOSSLESS[self.format][0]


def read(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Original:
    """Takes a picture file apart.

    Palette and CMYK become RGB, 16 bit becomes 8, the EXIF orientation is applied, each with a note; formats that lose are written as PNG.

    Raises:
        ValueError: with the name, if the file is no picture, damaged, too large, animated, of several pages or of floating point.
        OSError: if it cannot be read.
    """
    path = Path(path)
    content = read_bounded(path, MAX_BYTES)
    try:
        return _take_apart(content, max_pixels)
    except ValueError as error:
        raise ValueError(f"{path.name!a} {error}") from error


def save(path: str | Path, original: Original, pixels: UInt8[np.ndarray, "H W C"]) -> None:
    """Writes `pixels` with everything else of the original, all of it or nothing; what a reader gets back is `pixels` exactly.

    Raises:
        ValueError: if the size differs, or the file would not give the pixels back.
        OSError: if it cannot be written.
    """
    same = pixels.shape == original.pixels.shape
    require(same, "pixels", f"of shape {original.pixels.shape}", pixels.shape, "change the values, not the size")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if original.alpha is not None:
        image.putalpha(Image.fromarray(original.alpha[..., 0]))
    stream = io.BytesIO()
    image.save(stream, format=original.format, **LOSSLESS[original.format][1], **original.metadata)
    again = np.asarray(Image.open(io.BytesIO(stream.getvalue())))
    kept = np.array_equal(again.reshape(*pixels.shape[:2], -1)[..., : pixels.shape[-1]], pixels)
    require(kept, str(path), "read back as it was written", "other pixels", "choose another format")
    write_atomically(path, stream.getvalue())


class _Refused(ValueError):
    """The reason alone; `read` puts the name in front."""


def _take_apart(content: bytes, max_pixels: int) -> Original:
    image = open_bounded(content, max_pixels)
    try:
        if getattr(image, "n_frames", 1) > 1:
            raise _Refused(f"holds {image.n_frames} pictures (animation or pages); save the one to protect on its own")
        image.load()
        return _parts(image, content)
    except _Refused:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on malformed pixels
        raise _Refused(f"is truncated, damaged or of an unknown pixel type ({error})") from error


def _parts(image: Image.Image, content: bytes) -> Original:
    notes, kind, upright = [], image.format, image
    if image.getexif().get(0x0112, 1) != 1:
        upright = ImageOps.exif_transpose(image)
        notes.append("was turned upright as its EXIF data say")
    said = metadata.found(image, upright)
    upright = _eight_bit(upright, content, notes, said)
    alpha = upright.getchannel("A") if upright.mode in ("RGBA", "LA") else None
    if kind not in LOSSLESS or (alpha is not None and kind not in WITH_ALPHA):
        notes.append(f"is {kind}, written as PNG, whose pixels lose nothing")
        kind = "PNG"
    pixels = np.asarray(upright.convert("L" if upright.mode in ("L", "LA") else "RGB"))
    options, lost = metadata.options(said, kind, LOSSLESS[kind][1])
    return Original(
        pixels=pixels.reshape(*pixels.shape[:2], -1).copy(),
        alpha=None if alpha is None else np.asarray(alpha)[..., None].copy(),
        format=kind,
        metadata=options,
        notes=(*notes, *lost),
    )


def _eight_bit(image: Image.Image, content: bytes, notes: list[str], said: dict) -> Image.Image:
    """The picture in mode L, LA, RGB or RGBA."""
    if image.mode == "F":
        raise _Refused("has floating-point samples; save it with 8 bit")
    if image.mode.startswith("I"):
        try:
            image = from_16_bit(np.asarray(image))
        except ValueError as error:
            raise _Refused(f"has {error}; save it with 8 bit") from error
        notes.append("has 16 bit per sample, rounded to 8")
        return image
    if content[:8] == b"\x89PNG\r\n\x1a\n" and content[24] == 16:
        notes.append("has 16 bit per sample, cut to 8")
    if image.mode in ("L", "RGB", "LA", "RGBA") and not (image.mode in ("L", "RGB") and image.has_transparency_data):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode not in ("P", "L", "RGB", "PA"):
        said.pop("icc_profile", None)  # it describes colours that are no longer there
        notes.append(f"has {image.mode} colours, converted to RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
