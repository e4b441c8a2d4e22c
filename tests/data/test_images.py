import hashlib
import io
import os
import resource
import struct
import zlib

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from dmsec_jax.data import decode as decoding
from dmsec_jax.data.images import from_uint8, grid, read_folder, save_png, to_uint8, ungrid

RED, WHITE = [255, 0, 0], [255, 255, 255]


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def plain(colour="red", size=(8, 8), mode="RGB"):
    return Image.new(mode, size, colour)


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else encoded(content))
    return tmp_path


def test_pictures_are_sorted_scaled_and_hashed(tmp_path):
    pixels = noise((8, 8, 3))
    folder_of(tmp_path, b__png=Image.fromarray(pixels), a__png=plain("black"), B__png=plain("white"))
    found = read_folder(tmp_path, 8)
    assert found.names == ("B.png", "a.png", "b.png")
    assert found.images.dtype == np.float32
    assert found.images.shape == (3, 8, 8, 3)
    assert (found.images[0] == 1).all()
    assert (found.images[1] == -1).all()
    np.testing.assert_allclose(found.images[2], pixels / 127.5 - 1, atol=1e-6)
    assert found.sha256[2] == hashlib.sha256((tmp_path / "b.png").read_bytes()).hexdigest()
    assert (len(found), found.notes, found.captions) == (3, (), (None, None, None))


def test_one_picture_is_enough(tmp_path):
    assert len(read_folder(folder_of(tmp_path, a__png=plain()), 8)) == 1


def test_captions_are_the_texts_beside_the_pictures(tmp_path):
    folder_of(tmp_path, a__png=plain(), b__png=plain("blue"), c__png=plain("green"))
    folder_of(tmp_path, a__txt="\ufeffa red\n  square \u00e9\n".encode(), c__txt=b"", orphan__txt=b"ignored")
    assert read_folder(tmp_path, 8).captions == ("a red square \u00e9", None, "")
    folder_of(tmp_path, b__txt=b"\xff")
    with pytest.raises(ValueError, match=r"'b.png': its caption b.txt is not UTF-8"):
        read_folder(tmp_path, 8)


def test_documents_and_hidden_files_are_passed_over_and_folders_noted(tmp_path):
    junk = {
        name: b"text" for name in ("LICENSE", "README__md", "labels__csv", "meta__json", "__DS_Store", "Thumbs__db")
    }
    folder_of(tmp_path, a__png=plain(), **junk)
    (tmp_path / "holdout").mkdir()
    found = read_folder(tmp_path, 8)
    assert found.names == ("a.png",)
    assert found.notes == ("holdout is a folder and was not read",)


def test_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one picture, got none; put pictures in it"):
        read_folder(tmp_path, 8)
    (tmp_path / "member").mkdir()
    with pytest.raises(ValueError, match="name one of the folders in it: member"):
        read_folder(tmp_path, 8)
    with pytest.raises(ValueError, match="a folder of pictures, got nothing"):
        read_folder(tmp_path / "absent", 8)
    with pytest.raises(ValueError, match="a folder of pictures, got a file"):
        read_folder(folder_of(tmp_path, a__png=plain()) / "a.png", 8)
    with pytest.raises(ValueError, match="size must be at least 1"):
        read_folder(tmp_path, 0)


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    folder_of(
        tmp_path,
        good__png=plain(),
        empty__png=b"",
        page__pdf=b"%PDF-1.7",
        fake__jpg=b"<html>",
        cut__png=encoded(Image.fromarray(noise((32, 32, 3))))[:-700],
    )
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match="a folder of readable pictures, got 6 bad; remove or replace them:") as error:
        read_folder(tmp_path, 8)
    text = str(error.value)
    assert "'empty.png': is empty (0 bytes)" in text
    assert "'page.pdf': is no picture" in text
    assert "'fake.jpg': is no picture" in text
    assert "'cut.png': is truncated, damaged" in text
    assert "pipe.png must be a regular file" in text
    assert "'dangling.png': [Errno 2] No such file" in text
    assert "good.png" not in text


def test_long_lists_of_bad_files_are_shortened(tmp_path):
    folder_of(tmp_path, **{f"x{i}__png": b"" for i in range(25)})
    with pytest.raises(ValueError, match="got 25 bad; remove or replace them:") as error:
        read_folder(tmp_path, 8)
    assert str(error.value).count("is empty") == 20
    assert str(error.value).endswith("\n  and 5 more")


def test_name_that_is_no_unicode_is_an_error(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as stream:
        stream.write(encoded(plain()))
    with pytest.raises(ValueError, match="not UTF-8; rename it") as error:
        read_folder(tmp_path, 8)
    assert str(error.value).isascii()


def palette():
    return plain().convert("P")


def transparent_palette():
    image = palette()
    image.info["transparency"] = image.getpixel((0, 0))
    return image


def grey_16(value):
    return Image.fromarray(np.full((8, 8), value, np.uint16))


@pytest.mark.parametrize(
    ("content", "expected", "note"),
    [
        (encoded(plain()), RED, ""),
        (encoded(plain(200, mode="L")), [200] * 3, ""),
        (encoded(plain(1, mode="1")), WHITE, ""),
        (encoded(palette()), RED, ""),
        (encoded(transparent_palette()), WHITE, "transparency"),
        (encoded(plain((255, 0, 0, 255), mode="RGBA")), RED, ""),
        (encoded(plain((255, 0, 0, 0), mode="RGBA")), WHITE, "transparency"),
        (encoded(plain((255, 0, 0, 51), mode="RGBA")), [255, 204, 204], "transparency"),
        (encoded(plain((100, 0), mode="LA")), WHITE, "transparency"),
        (encoded(grey_16(65535)), WHITE, "16 bit"),
        (encoded(grey_16(128 * 257 + 100)), [128] * 3, "16 bit"),
        (encoded(grey_16(300)), [1] * 3, "16 bit"),
        (encoded(grey_16(65535), "TIFF"), WHITE, "16 bit"),
        (b"P5 8 8 65535\n" + b"\x80\x80" * 64, [128] * 3, "16 bit"),
        (encoded(plain((0, 255, 255, 0), mode="CMYK"), "TIFF"), RED, ""),
        (encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG"), RED, ""),
        (encoded(plain(), "GIF"), RED, ""),
        (encoded(plain(), "BMP"), RED, ""),
        (encoded(plain(), "WEBP", lossless=True), RED, ""),
        (encoded(plain(), "JPEG2000"), RED, ""),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(content, expected, note):
    image, notes = decoding.decode(content)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2  # JPEG rounds
    assert len(notes) == bool(note)
    assert note in "".join(notes)


@pytest.mark.parametrize(
    "image", [Image.fromarray(np.ones((4, 4), np.float32)), Image.fromarray(np.full((4, 4), 70_000, np.int32))]
)
def test_pixels_of_unknown_range_are_refused(image):
    with pytest.raises(ValueError, match="of unknown range"):
        decoding.decode(encoded(image, "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_picture_of_an_animation_is_taken_and_noted(kind):
    image, notes = decoding.decode(encoded(plain(), kind, save_all=True, append_images=[plain("blue"), plain("green")]))
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2
    assert notes == ["holds 3 pictures (animation or pages), the first is used"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(noise((4, 6, 3)))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> the transposition that a camera leaves out
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, _ = decoding.decode(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_truncated_file_is_refused(kind, share):
    content = encoded(Image.fromarray(noise((32, 32, 3))), kind)
    decoding.decode(content)
    with pytest.raises(ValueError, match=r"damaged|no picture"):
        decoding.decode(content[: int(len(content) * share)])


SEEDS = [
    encoded(Image.fromarray(noise((9, 7, 3))), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
]


@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=4)), max_size=6)
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_value_error(content, edits):
    content = bytearray(content)
    for place, new in edits:
        place %= len(content)
        content[place : place + len(new)] = new
    try:
        image, _ = decoding.decode(bytes(content), max_pixels=2**16)
    except ValueError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 2**16


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_too_many_pixels_or_none_are_refused_before_decoding(monkeypatch):
    small = encoded(plain())
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    idat = b"\x00\x00\x00\x00IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ValueError, match="too many pixels"):
        decoding.decode(png_header(100_000, 100_000) + idat)
    with pytest.raises(ValueError, match=r"has 9000 x 9000 pixels, more than 67,108,864; make it smaller"):
        decoding.decode(png_header(9000, 9000) + idat)
    with pytest.raises(ValueError, match=r"8 x 8 pixels, more than 63"):
        decoding.decode(small, max_pixels=63)
    with pytest.raises(ValueError, match=r"damaged|no picture"):
        decoding.decode(png_header(0, 8) + idat)


def test_central_square_is_resized_with_antialiasing(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = np.indices((16, 16)).sum(0)[..., None] % 2 * 255  # a checkerboard amid black
    found = read_folder(folder_of(tmp_path, a__png=Image.fromarray(wide)), 4)
    assert found.images.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(found.images, 0, atol=0.03)  # picking pixels would give -1 or 1
    assert found.notes == ()


def test_enlarging_and_doubles_are_noted(tmp_path):
    folder_of(tmp_path, a__png=plain(size=(20, 6)), b__png=plain(size=(20, 6)))
    found = read_folder(tmp_path, 8)
    assert (to_uint8(found.images) == RED).all()
    enlarged = "has a square of 6 pixels, enlarged to 8"
    assert found.notes == (f"a.png {enlarged}", "b.png is the same file as a.png", f"b.png {enlarged}")


def test_uint8_round_trip_is_exact():
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values)[[0, -1]].tolist() == [-1, 1]


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-3, 3, width=32)))
def test_to_uint8_rounds_to_nearest_and_clips(image):
    nearest = from_uint8(to_uint8(image))
    assert np.abs(nearest - image.clip(-1, 1)).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_never_written(tmp_path, value):
    image = np.zeros((4, 4, 3), np.float32)
    image[1, 2, 0] = value
    with pytest.raises(ValueError, match="1 values NaN or infinite"):
        save_png(tmp_path / "a.png", image)
    assert os.listdir(tmp_path) == []


def test_saved_png_is_read_back(tmp_path):
    pixels = noise((8, 8, 3))
    save_png(tmp_path / "new" / "a.png", from_uint8(pixels))
    save_png(tmp_path / "new" / "b.png", pixels)
    save_png(tmp_path / "new" / "c.png", pixels[..., :1])
    found = to_uint8(read_folder(tmp_path / "new", 8).images)
    assert np.array_equal(found[0], pixels)
    assert np.array_equal(found[1], pixels)
    assert np.array_equal(found[2], np.repeat(pixels[..., :1], 3, axis=-1))


def test_save_png_refuses_other_shapes_and_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"ending in \.png"):
        save_png(tmp_path / "a.jpg", noise((4, 4, 3)))
    with pytest.raises(ValueError, match=r"\[H, W, 3\] or \[H, W, 1\], got shape"):
        save_png(tmp_path / "a.png", noise((4, 4, 4)))
    with pytest.raises(ValueError, match=r"got shape \(0, 4, 3\)"):
        save_png(tmp_path / "a.png", noise((0, 4, 3)))
    with pytest.raises(jaxtyping.TypeCheckError):
        save_png(tmp_path / "a.png", noise((4, 4)))
    assert os.listdir(tmp_path) == []


def test_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    save_png(tmp_path / "a.png", noise((4, 4, 3)))
    before = (tmp_path / "a.png").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (500, limits[1])
    )  # the kernel then refuses further bytes, as on a full disk
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.png: File too large.*nothing was changed"):
            save_png(tmp_path / "a.png", noise((64, 64, 3)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_grid_places_pictures_row_by_row():
    images = from_uint8(noise((5, 4, 6, 3)))
    sheet = grid(images, 3, gap=1, fill=0.5)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    assert np.array_equal(sheet[:4, 7:13], images[1])
    assert np.array_equal(sheet[5:, :6], images[3])
    assert (sheet[4] == 0.5).all()
    assert (sheet[5:, 14:] == 0.5).all()
    assert np.array_equal(grid(images[:1], 3), images[0])
    for bad in ((images[:0], 3), (images, 0)):
        with pytest.raises(ValueError, match="at least one picture and column"):
            grid(*bad)


def test_ungrid_cuts_a_sheet_into_its_places():
    pictures = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 3)).astype(np.float32)
    places = ungrid(grid(pictures, 3), 4)
    np.testing.assert_array_equal(places[:5], pictures)
    np.testing.assert_array_equal(places[5:], np.ones((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="sheet must be a grid of pictures of 5 pixels with gaps of 2"):
        ungrid(grid(pictures, 3), 5)
