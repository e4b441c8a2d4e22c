"""One picture file of any common kind -> 8-bit RGB. The file may be hostile: kinds, bytes and pixels are bounded."""

import io

import numpy as np
import PIL
from PIL import Image, ImageOps

# Only readers that decode pixels themselves: EPS starts a program, TGA accepts nearly any bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_BYTES = 2**28
MAX_PIXELS = 2**26  # a square of 8192
BACKGROUND = (255, 255, 255)


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, list[str]]:
    """Decodes to mode RGB, 8 bit, upright; colour profiles are ignored.

    Grey, palette and CMYK are converted, 16 bit is rounded to 8, transparency is laid on white, the EXIF orientation is
    applied, and of an animation or a file of several pages the first picture is taken.

    Args:
        content: the bytes of the file.
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        The picture, and notes for people on what was changed in it.

    Raises:
        ValueError: with the reason alone ("is empty (0 bytes)"), for the caller to put the name in front.
    """
    image = open_bounded(content, max_pixels)
    try:
        notes = _several(image)
        image.load()
        return _rgb(_upright(image, notes), notes), notes
    except Exception as error:  # Pillow's readers raise nearly anything on malformed pixels
        raise ValueError(f"is truncated, damaged or of an unknown pixel type ({error})") from error


def open_bounded(content: bytes, max_pixels: int) -> Image.Image:
    """A picture whose pixels are not decoded yet; raises ValueError as `decode`."""
    if not content:
        raise ValueError("is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"is no picture ({', '.join(FORMATS)}), or damaged at its start") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"has too many pixels ({error})") from error
    except Exception as error:  # Pillow's readers raise nearly anything on malformed headers
        raise ValueError(f"has a damaged header ({error!r})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"has {width} x {height} pixels, more than {max_pixels:,}; make it smaller")
    return image


def _several(image: Image.Image) -> list[str]:
    count = getattr(image, "n_frames", 1)
    return [f"holds {count} pictures (animation or pages), the first is used"] if count > 1 else []


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata around a sound picture
        notes.append("has unreadable EXIF data, its orientation is ignored")
        return image


def _rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating point of unknown range")
    if image.mode.startswith("I"):
        image = from_16_bit(np.asarray(image))
        notes.append("has 16 bit per sample, rounded to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("has transparency, laid on white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    return image.convert("RGB")


def from_16_bit(values: np.ndarray) -> Image.Image:
    """Grey [H, W] of 0..65535, rounded to 8 bit; Pillow's own conversion would clip at 255. Raises ValueError on other values."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integers of unknown range")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
