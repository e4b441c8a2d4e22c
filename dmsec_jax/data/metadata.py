"""What a picture file says besides its pixels, carried over to the file that replaces it: EXIF, XMP, texts, colour profile, resolution.

There stand the author, the copyright and the wish not to be trained on (IPTC's "plus:DataMining" in XMP). What the new file cannot hold is named.
"""

import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

XMP_KEY = "XML:com.adobe.xmp"
"""Of XMP among the texts of a PNG file."""
XMP_TAG = 700
"""Of XMP in a TIFF file."""
EXIF_TEXTS = ("Raw profile type exif", "Raw profile type APP1")
"""EXIF as older programs wrote it into PNG; it would bring back an orientation that was applied."""
IPTC = 0x0404
"""Of IPTC's captions and credits among Photoshop's resources in a JPEG file."""
LAYOUT_TAGS = {
    *range(254, 260),
    262,
    266,
    273,
    *range(277, 280),
    284,
    *range(317, 331),
    338,
    339,
    347,
    *range(529, 533),
    34675,
}
"""EXIF tags of a TIFF that say how its pixels lie in the file: the new file has its own."""


def found(image: Image.Image, upright: Image.Image) -> dict[str, Any]:
    """What a file says, for `options` to write.

    Args:
        image: as it was opened, with its pixels loaded: texts may follow them.
        upright: the same, turned as it says, so that it says so no longer.
    """
    said = {name: image.info[name] for name in ("icc_profile", "dpi") if image.info.get(name)}
    exif, xmp = upright.getexif(), upright.info.get("xmp")
    for tag in LAYOUT_TAGS & set(exif):
        del exif[tag]
    if XMP_TAG in exif and xmp:
        exif[XMP_TAG] = xmp
    texts = {key: text for key, text in getattr(image, "text", {}).items() if key not in (XMP_KEY, *EXIF_TEXTS)}
    if comment := image.info.get("comment"):
        texts["Comment"] = _decoded(comment)
    if IPTC in image.info.get("photoshop", {}):
        said["iptc"] = image.info["photoshop"][IPTC]
    return said | {name: part for name, part in (("exif", exif), ("xmp", xmp), ("texts", texts)) if part}


def options(said: dict[str, Any], kind: str, how: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options of `Image.save` for a file of a kind, and a note on what is lost.

    Args:
        said: as `found`.
        kind: PNG, TIFF, WEBP, or another, which holds none of it and becomes none of these.
        how: the options that its pixels are written with.
    """
    if kind not in ("PNG", "TIFF", "WEBP"):
        return {}, []
    chosen, lost = {name: said[name] for name in ("icc_profile", "dpi") if name in said}, []
    if "exif" in said:
        chosen["exif"], wrong = _writable(said["exif"], kind, how)
        lost += [f"EXIF tag {tag}" for tag in wrong]
    if "xmp" in said and kind == "WEBP":
        chosen["xmp"] = said["xmp"]
    if kind == "PNG" and ("xmp" in said or "texts" in said):
        chosen["pnginfo"] = _png_texts(said)
    lost += ["IPTC data"] * ("iptc" in said)
    return chosen, [f"has {', '.join(lost)}, which a {kind} file cannot hold: left out"] if lost else []


def _writable(exif: Image.Exif, kind: str, how: dict[str, Any]) -> tuple[bytes, list[int]]:
    """The EXIF data without the tags whose values the writer refuses, and those tags; the others are not lost with them."""
    wrong = [] if _writes(exif, kind, how) else [tag for tag in exif if not _writes(_only(exif, tag), kind, how)]
    for tag in wrong:
        del exif[tag]
    return exif.tobytes(), wrong


def _only(exif: Image.Exif, tag: int) -> Image.Exif:
    one = Image.Exif()
    one[tag] = exif[tag]
    return one


def _writes(exif: Image.Exif, kind: str, how: dict[str, Any]) -> bool:
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=kind, exif=exif.tobytes(), **how)
    except Exception:  # Pillow's writers raise nearly anything on values of another type than the tag's
        return False
    return True


def _png_texts(said: dict[str, Any]) -> PngInfo:
    info = PngInfo()
    for key, text in said.get("texts", {}).items():
        info.add_text(key, text)
    if "xmp" in said:
        info.add_itxt(XMP_KEY, said["xmp"])
    return info


def _decoded(comment: bytes | str) -> str:
    """A comment of JPEG, GIF or JPEG 2000, whose encoding nothing says."""
    if isinstance(comment, str):
        return comment
    try:
        return comment.decode()
    except UnicodeDecodeError:
        return comment.decode("latin-1")
