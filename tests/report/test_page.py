import base64
import io
import shlex

import jinja2
import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from dmsec_jax.data.images import to_uint8
from dmsec_jax.report import page as html


def decoded(picture):
    kind, content = picture.uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_small_pictures_keep_every_pixel(made):
    image = made.pictures(1, side=64)[0]
    picture = html.picture(image, "a dot")
    np.testing.assert_array_equal(decoded(picture), to_uint8(image))
    assert picture.crisp
    assert (picture.width, picture.height, picture.alt) == (64, 64, "a dot")


def test_large_pictures_are_reduced_and_smoothed():
    picture = html.picture(np.zeros((300, 600, 3), np.float32), "wide")
    assert (picture.width, picture.height) == (256, 128)
    assert not picture.crisp


def test_a_broken_picture_says_so(made):
    broken, fine = np.full((8, 8, 3), np.nan, np.float32), made.pictures(1)[0]
    picture = html.picture(broken, "sample")
    assert "not finite" in picture.alt
    assert len(np.unique(decoded(picture))) == 2  # stripes
    shown = html.tiles(np.stack([fine, broken]), "sample")
    assert ["not finite" in tile.alt for tile in shown] == [False, True]
    sheet = html.contact(np.stack([fine, broken]), 2)
    np.testing.assert_array_equal(sheet[:, :8], to_uint8(fine))
    np.testing.assert_array_equal(sheet[:, 10:], decoded(picture))


def test_a_template_with_a_missing_name_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        html.render("training", written=None)


def test_command_line_survives_the_shell():
    argv = ["extract", "--prompt", "it's $HOME; rm *", "--out", "a b"]
    assert shlex.split(html.command_line(argv)) == ["dmsec", *argv]


def test_printable_disarms_the_terminal():
    assert html.printable("a\x1b[31mb\nc\u202ed é 猫") == "a\ufffd[31mb c\ufffdd é 猫"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (48.2, "48 s"), (59.9, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert html.duration(seconds) == text


def test_figures_without_a_value_are_dashes():
    assert [html.number(value) for value in (0.456, None, np.nan)] == ["0.46", html.DASH, html.DASH]
    assert html.between(-np.inf, np.inf) == html.between(None, None) == ""


def test_templates_show_no_control_characters():
    template = html._environment().from_string("{{ text }}{{ markup }}")
    shown = template.render(text="<b>\x1b[31m\u202ered\x00 dog</b>\n", markup=Markup("<i>kept</i>"))
    assert shown == "&lt;b&gt;\ufffd[31m\ufffdred\ufffd dog&lt;/b&gt;\n<i>kept</i>"
