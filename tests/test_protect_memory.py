"""Large and odd pictures are protected in little memory, measured in a process of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone"),
]
LIMIT = 6 * 2**30


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "scale"), [((4000, 3000), "model"), ((37, 5000), "source"), ((4000, 3000), "source")])
def test_a_photo_and_a_strip_are_protected_within_six_gigabytes(tmp_path, size, scale):
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    waves = np.stack([np.sin(40 * x), np.cos(30 * y), np.sin(20 * (x + y))], axis=-1)
    pixels = np.uint8(127.5 * (1 + waves))
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "large.png")
    options = ["--scale", scale, "--method", "photoguard", "--steps", "10", "--purifiers", "jpeg"]
    command = [
        sys.executable,
        "-m",
        "dmsec_jax",
        "protect",
        "--images",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    (saved,) = (tmp_path / "out" / "pictures").iterdir()
    change = np.abs(np.asarray(Image.open(saved), np.int16) - pixels)
    assert 0 < change.max() <= 8
    assert usage.ru_maxrss * 1024 < LIMIT, f"{usage.ru_maxrss / 2**20:.1f} GiB"
