"""Folders of pictures -> [N, H, W, 3] float32 in [-1, 1], and back to PNG."""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, Float32, Shaped, UInt8
from PIL import Image

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import read_bounded, write_atomically
from dmsec_jax.data.decode import MAX_BYTES, MAX_PIXELS, decode

SIDECARS = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".html"}
DOCUMENTS = {"license", "licence", "copying", "notice", "readme", "thumbs.db", "desktop.ini"}
MAX_CAPTION_BYTES = 2**16
MAX_LISTED = 20  # bad files named in one error


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Pictures of one folder, sorted by file name.

    Attributes:
        images: [N, size, size, 3] in [-1, 1].
        names: file names, with suffix.
        sha256: hexadecimal digests of the files.
        captions: text of `<stem>.txt` beside each picture on one line, None where there is no such file.
        notes: what was changed or deserves attention, one sentence each.
    """

    images: Float32[np.ndarray, "N H W 3"]
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    captions: tuple[str | None, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def inputs(self, kind: str) -> dict[str, str]:
        """Digests by name, for `result.json`; `kind` is what each picture is to the run."""
        return {f"{kind} {name}": digest for name, digest in zip(self.names, self.sha256, strict=True)}


def read_folder(folder: str | Path, size: int, *, max_pixels: int = MAX_PIXELS) -> ImageSet:
    """Reads every picture directly in `folder`: decoded to RGB, cut to the central square, resized with antialiasing.

    Hidden files, texts, tables and licences are passed over; folders inside are named in the notes. See `decode.decode`
    for transparency, orientation, animations and the like; a picture smaller than `size` is enlarged, with a note.

    Args:
        folder: where the pictures are.
        size: height and width of the result, at least 1.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        ValueError: if `folder` is none or has no picture, or if any file in it cannot be read as one; all such files
            are named with the reason.
    """
    require(size >= 1, "size", "at least 1", size, "use the resolution of the model")
    folder = Path(folder)
    found = "a file" if folder.exists() else "nothing"
    require(folder.is_dir(), str(folder), "a folder of pictures", found, "correct the path")
    entries = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    inside = [path.name for path in entries if path.is_dir()]
    images, names, digests, captions, bad = [], [], [], [], []
    notes = [f"{name} is a folder and was not read" for name in inside]
    for path in entries:
        if path.is_dir() or is_document(path):
            continue
        try:
            name = _readable_name(path)
            content = read_bounded(path, MAX_BYTES)
            picture, remarks = decode(content, max_pixels=max_pixels)
            captions.append(_caption(path))
        except (ValueError, OSError) as error:
            bad.append(f"{path.name!a}: {error}")
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest in digests:
            remarks.append(f"is the same file as {names[digests.index(digest)]}")
        images.append(from_uint8(np.asarray(_square(picture, size, remarks))))
        names.append(name)
        digests.append(digest)
        notes += [f"{name} {remark}" for remark in remarks]
    if bad:
        more = [f"and {len(bad) - MAX_LISTED} more"] if len(bad) > MAX_LISTED else []
        listed = "\n  ".join(["remove or replace them:", *bad[:MAX_LISTED], *more])
        raise fail(str(folder), "a folder of readable pictures", f"{len(bad)} bad", listed)
    if not images:
        cure = f"name one of the folders in it: {', '.join(inside[:MAX_LISTED])}" if inside else "put pictures in it"
        raise fail(str(folder), "a folder with at least one picture", "none", cure)
    texts = {"names": names, "sha256": digests, "captions": captions, "notes": notes}
    return ImageSet(images=np.stack(images), **{field: tuple(values) for field, values in texts.items()})


def reorder(pictures: ImageSet, rows: Sequence[int]) -> ImageSet:
    """The pictures at `rows`, in that order; notes stay."""
    fields = {name: tuple(getattr(pictures, name)[i] for i in rows) for name in ("names", "sha256", "captions")}
    return ImageSet(images=pictures.images[list(rows)], notes=pictures.notes, **fields)


def split(pictures: ImageSet, count: int) -> tuple[ImageSet, ImageSet | None]:
    """The first `count` pictures, and the others (None if there are none)."""
    rest = range(count, len(pictures))
    return reorder(pictures, range(min(count, len(pictures)))), reorder(pictures, rest) if rest else None


def distinct(pictures: ImageSet, what: str) -> tuple[ImageSet, tuple[str, ...]]:
    """The pictures without further copies of a file, each of which would count as evidence of its own, and a note on those.

    Args:
        what: the name of the set, in the plural, for the note.
    """
    first = [i for i, digest in enumerate(pictures.sha256) if digest not in pictures.sha256[:i]]
    copies = [name for i, name in enumerate(pictures.names) if i not in first]
    note = f"{len(copies)} {what} are copies of others and were left out: {', '.join(copies)}"
    return (reorder(pictures, first), (note,)) if copies else (pictures, ())


def unseen(pictures: ImageSet, others: ImageSet | None, what: str) -> tuple[ImageSet | None, tuple[str, ...]]:
    """Those of `others` that are not among `pictures`, told by their files, and a note on the rest.

    Args:
        what: the name of `others`, in the plural, for the note and the error.

    Raises:
        ValueError: if none is left.
    """
    if others is None:
        return None, ()
    known = set(pictures.sha256)
    new = [i for i, digest in enumerate(others.sha256) if digest not in known]
    same = [others.names[i] for i in range(len(others)) if i not in new]
    cure = "name a folder of others, or leave it out"
    require(bool(new), what, "other pictures than those in question", f"{len(same)} of the same", cure)
    note = f"{len(same)} {what} are among the pictures in question and were left out: {', '.join(same)}"
    return (reorder(others, new), (note,)) if same else (others, ())


def from_uint8(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """0..255 -> [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - 1


def to_uint8(image: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> 0..255, rounded to nearest; values outside are clipped. The inverse of `from_uint8`.

    Raises:
        ValueError: on NaN or infinity, which no picture can show.
    """
    image = np.asarray(image, np.float32)
    broken = image.size - int(np.isfinite(image).sum())
    require(not broken, "image", "finite", f"{broken} values NaN or infinite", "find the step that diverged")
    return np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def save_png(path: str | Path, image: Shaped[Array | np.ndarray, "H W C"]) -> None:
    """Writes one picture, all of it or nothing; folders on the way are made.

    Args:
        path: ends in `.png`.
        image: [H, W, 3] or [H, W, 1], float in [-1, 1] or uint8.

    Raises:
        ValueError: on another shape, dtype or suffix, and on NaN or infinity.
        OSError: if it cannot be written, for instance because the disk is full; an older file then stays as it was.
    """
    path = Path(path)
    require(path.suffix.lower() == ".png", "path", "a name ending in .png", path.name, "correct the suffix")
    shown = image.shape[-1] in (1, 3) and image.size > 0
    require(shown, "image", "[H, W, 3] or [H, W, 1]", f"shape {image.shape}", "select the channels")
    pixels = np.asarray(image) if image.dtype == np.uint8 else to_uint8(image)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format="PNG")
    write_atomically(path, stream.getvalue())


def grid(
    images: Float[Array | np.ndarray, "N H W C"], columns: int, *, gap: int = 2, fill: float = 1.0
) -> Float32[np.ndarray, "R S C"]:
    """One sheet: rows of `columns` pictures, row by row, `gap` pixels of value `fill` between them and in empty places.

    Args:
        images: [N, H, W, C] in [-1, 1], N >= 1.
        columns: at least 1; more than N are not made.

    Raises:
        ValueError: if there is no picture, or `columns` < 1.
    """
    count, height, width, channels = images.shape
    require(
        count >= 1 and columns >= 1,
        "grid",
        "of at least one picture and column",
        f"{count} and {columns}",
        "pass pictures",
    )
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), fill, np.float32)
    for i, image in enumerate(np.asarray(images)):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def ungrid(
    sheet: Float[Array | np.ndarray, "R S C"], size: int, *, gap: int = 2
) -> Float[Array | np.ndarray, "N H W C"]:
    """The places [N, size, size, C] of a sheet that `grid` made of square pictures, row by row, empty ones included.

    Raises:
        ValueError: if the sheet is not made of such places.
    """
    fits = all((side + gap) % (size + gap) == 0 and side > 0 for side in sheet.shape[:2])
    contract = f"a grid of pictures of {size} pixels with gaps of {gap}"
    require(fits, "sheet", contract, f"shape {sheet.shape}", "pass what grid returned")
    starts = [range(0, side, size + gap) for side in sheet.shape[:2]]
    return np.stack([sheet[top : top + size, left : left + size] for top in starts[0] for left in starts[1]])


def _square(picture: Image.Image, size: int, remarks: list[str]) -> Image.Image:
    """The central square, resized by Lanczos, which averages over all pixels when it reduces."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if side < size:
        remarks.append(f"has a square of {side} pixels, enlarged to {size}")
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def is_document(path: Path) -> bool:
    """Whether a file that lies beside pictures is a text, a table or a licence by its name."""
    return path.suffix.lower() in SIDECARS or path.name.lower() in DOCUMENTS


def _readable_name(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise ValueError("has a name that is not UTF-8; rename it") from error
    return path.name


def _caption(path: Path) -> str | None:
    sidecar = path.with_suffix(".txt")
    if not sidecar.exists():
        return None
    try:
        return " ".join(read_bounded(sidecar, MAX_CAPTION_BYTES).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {sidecar.name} is not UTF-8") from error
