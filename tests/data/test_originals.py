"""Files of people: what is kept, what is converted with a note, what is refused by name."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dmsec_jax.data import originals

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), np.uint8)
PROFILE = b"not a real profile, but kept as it is"


def exif(orientation=1):
    tags = Image.Exif()
    tags[0x010F], tags[0x0112] = "A camera", orientation
    return tags


def image_of(mode):
    if mode == "CMYK":
        return Image.fromarray(RNG.integers(0, 256, (12, 17, 4), np.uint8), "CMYK")
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 65536, (12, 17), np.uint16))
    if mode == "F":
        return Image.fromarray(RNG.normal(size=(12, 17)).astype(np.float32))
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(RGB).convert(mode[:-1])
        image.putalpha(Image.fromarray(RNG.integers(0, 256, (12, 17), np.uint8)))
        return image
    return Image.fromarray(RGB).convert(mode)


def written(folder, mode, kind, **options):
    path = folder / f"{mode}.{kind}".replace(";", "")
    image_of(mode).save(path, format=kind, **options)
    return path


def changed(original):
    """Other pixels, as a protection would leave them."""
    return (original.pixels ^ 5).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "PNG") for mode in ("L", "RGB", "RGBA", "LA")]
    + [(mode, "TIFF") for mode in ("L", "RGB", "RGBA")]
    + [("RGB", "WEBP"), ("RGBA", "WEBP"), ("RGB", "BMP"), ("L", "BMP"), ("RGB", "PPM")],
)
def test_lossless_formats_keep_everything_but_the_pixels(tmp_path, mode, kind):
    extra = {"icc_profile": PROFILE, "exif": exif()} if kind not in ("BMP", "PPM") else {}
    if kind == "WEBP":
        extra |= {"lossless": True, "exact": True}
    path = written(tmp_path, mode, kind, **extra)
    original = originals.read(path)
    assert original.notes == ()
    np.testing.assert_array_equal(
        original.pixels.squeeze(), np.asarray(image_of(mode).convert("RGB" if "RGB" in mode else "L"))
    )
    out = tmp_path / f"out{original.suffix}"
    originals.save(out, original, changed(original))
    again = Image.open(out)
    assert again.format == kind
    assert again.info.get("icc_profile") == extra.get("icc_profile")
    if extra:
        assert again.getexif()[0x010F] == "A camera"
    back = originals.read(out)
    np.testing.assert_array_equal(back.pixels[..., : original.pixels.shape[-1]], changed(original))
    if original.alpha is not None:
        np.testing.assert_array_equal(back.alpha, original.alpha)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf plus:DataMining="DMI-PROHIBITED" tiff:Orientation="6"/></x:xmpmeta>'


def texts():
    info = PngInfo()
    info.add_text("Copyright", "(c) me")
    info.add_itxt("Author", "\u0141ukasz", lang="pl")
    info.add_itxt("XML:com.adobe.xmp", XMP)
    return info


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {"pnginfo": texts()}),
        ("TIFF", {"tiffinfo": {700: XMP, 33432: "(c) me"}}),
        ("WEBP", {"xmp": XMP, "lossless": True}),
        ("JPEG", {"xmp": XMP, "comment": "(c) me"}),
        ("AVIF", {"xmp": XMP}),
    ],
)
def test_copyright_and_the_wish_not_to_be_trained_on_stay_with_the_picture(tmp_path, kind, options):
    original = originals.read(written(tmp_path, "RGB", kind, **options))
    assert original.pixels.shape == (17, 12, 3)  # XMP says that it lies on its side
    for out in (tmp_path / "once", tmp_path / "twice"):
        originals.save(out, original, original.pixels)
        original = originals.read(out)
        assert original.pixels.shape == (17, 12, 3)
        again = Image.open(out)
        again.load()
        assert b"DMI-PROHIBITED" in again.info["xmp"]
        if kind == "TIFF":
            assert again.getexif()[33432] == "(c) me"
        if kind in ("PNG", "JPEG"):
            assert "(c) me" in (again.text.get("Copyright"), again.text.get("Comment"))
        if kind == "PNG":
            assert (again.text["Author"], again.text["Author"].lang) == ("\u0141ukasz", "pl")


def test_metadata_that_cannot_be_written_cost_only_themselves_and_a_note(tmp_path):
    tags = {296: 5, 33432: "(c) me"}  # 5 is no unit of resolution
    original = originals.read(written(tmp_path, "RGB", "TIFF", tiffinfo=tags))
    assert original.notes == ("has EXIF tag 296, which a TIFF file cannot hold: left out",)
    originals.save(tmp_path / "out.tiff", original, changed(original))
    assert Image.open(tmp_path / "out.tiff").getexif()[33432] == "(c) me"
    path = written(tmp_path, "RGB", "JPEG")
    resource = b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x00\x00\x08\x1c\x02\x74\x00\x03(c)"
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xed" + (len(resource) + 2).to_bytes(2) + resource + content[2:])
    assert "has IPTC data, which a PNG file cannot hold: left out" in originals.read(path).notes


@pytest.mark.parametrize(
    ("mode", "kind", "note"),
    [
        ("RGB", "JPEG", "is JPEG, written as PNG"),
        ("L", "JPEG", "is JPEG, written as PNG"),
        ("CMYK", "JPEG", "has CMYK colours"),
        ("CMYK", "TIFF", "has CMYK colours"),
        ("I;16", "PNG", "has 16 bit per sample"),
        ("P", "GIF", "is GIF, written as PNG"),
    ],
)
def test_other_files_are_converted_with_a_note(tmp_path, mode, kind, note):
    original = originals.read(written(tmp_path, mode, kind))
    assert any(note in line for line in original.notes), original.notes
    assert original.pixels.shape == (12, 17, 1 if mode in ("L", "I;16") else 3)
    out = tmp_path / f"out{original.suffix}"
    originals.save(out, original, changed(original))
    np.testing.assert_array_equal(originals.read(out).pixels, changed(original))


def test_palette_with_transparency_keeps_it(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    image.info["transparency"] = 3
    image.save(tmp_path / "p.png", transparency=3)
    original = originals.read(tmp_path / "p.png")
    clear = np.asarray(image) == 3
    np.testing.assert_array_equal(original.alpha[..., 0] == 0, clear)
    assert (original.shown[clear] == 255).all()


def test_rotated_photos_come_upright_and_only_once(tmp_path):
    tags = exif(orientation=6)
    Image.fromarray(RGB).save(tmp_path / "r.jpg", exif=tags, quality=95)
    original = originals.read(tmp_path / "r.jpg")
    assert original.pixels.shape == (17, 12, 3)
    assert "was turned upright as its EXIF data say" in original.notes
    originals.save(tmp_path / "r.png", original, original.pixels)
    again = Image.open(tmp_path / "r.png")
    assert again.getexif().get(0x0112, 1) == 1
    assert again.getexif()[0x010F] == "A camera"
    assert originals.read(tmp_path / "r.png").pixels.shape == (17, 12, 3)


def _next_page(content):
    """Where a little-endian TIFF says where its second page begins."""
    first = int.from_bytes(content[4:8], "little")
    return first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")


def test_refusals_name_the_file_and_the_reason(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    written(tmp_path, "F", "TIFF")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"hello, this is no picture")
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, format="PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:200])
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    content = bytearray((tmp_path / "pages.tiff").read_bytes())
    second = int.from_bytes(content[(at := _next_page(content)) : at + 4], "little")
    (tmp_path / "pages.tiff").write_bytes(content[: second + 20])
    for name, reason in {
        "moves.gif": "holds 2 pictures",
        "F.TIFF": "floating-point",
        "empty.png": "is empty",
        "text.png": "is no picture",
        "cut.png": "truncated",
        "pages.tiff": "truncated",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            originals.read(tmp_path / name)
    (tmp_path / "big.png").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="17 x 12 pixels, more than 100"):
        originals.read(tmp_path / "big.png", max_pixels=100)
