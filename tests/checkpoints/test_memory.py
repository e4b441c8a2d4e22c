"""Loading takes little more memory than what is loaded, measured in a process of its own."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from dmsec_jax.checkpoints import configs, diffusers, weights
from dmsec_jax.checkpoints.mapping import to_state
from dmsec_jax.core.files import write_json
from dmsec_jax.core.trees import count, map_paths
from dmsec_jax.models import presets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEASURE = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from dmsec_jax import loading
from dmsec_jax.checkpoints import diffusers

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssFile")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}

folder, dtype, *parts = sys.argv[1:]
for part in parts:
    diffusers.shapes(part, diffusers.read_component_config(folder, part))  # tracing takes memory of its own
jax.block_until_ready(jnp.zeros(3))
before, peak, done = resident()["VmRSS"], [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], resident()["VmRSS"])

thread = threading.Thread(target=watch)
thread.start()
params = [diffusers.read_component(folder, part, None, loading._placer(part, dtype, None))[1] for part in parts]
done.set()
thread.join()
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), peak[0] - before)
"""


def broadcast(_, leaf):
    return np.broadcast_to(np.float16(0.01), leaf.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet of 310 million parameters in half precision, 620 MB."""
    cfg = dataclasses.replace(presets.SD15.unet, block_out_channels=(192, 384, 768, 768))
    place = tmp_path_factory.mktemp("large")
    target = diffusers.shapes("unet", cfg)
    assert count(target) > 3e8
    params = map_paths(broadcast, target)
    component = diffusers.COMPONENTS["unet"]
    weights.write_weights(place / "unet", component.stem, to_state(params, component.rules))
    write_json(place / "unet" / "config.json", configs.write_config(cfg, component.format))
    return place


def measured(folder, dtype, *parts):
    """Bytes of what was loaded, and by how much the process grew meanwhile."""
    command = [sys.executable, "-c", MEASURE, str(folder), dtype, *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    size, peak = map(int, done.stdout.split())
    print(f"{dtype}: {size / 1e6:.0f} MB loaded with a peak of {peak / 1e6:.0f} MB, {peak / size:.2f} times as much")
    return size, peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_peaks_below_1_3_of_its_size(folder, dtype):
    size, peak = measured(folder, dtype, "unet")
    assert size > 6e8
    assert peak < 1.3 * size


@pytest.mark.long
def test_the_whole_of_sdxl(tmp_path):
    """3.5 billion parameters in files of zeros that take no room on the disk; takes 8 GB of memory."""
    for name, component in diffusers.XL.items():
        cfg = getattr(presets.SDXL, component.field)
        header, position = {}, 0
        for key, leaf in to_state(map_paths(broadcast, diffusers.shapes(name, cfg)), component.rules).items():
            header[key] = {"dtype": "F16", "shape": leaf.shape, "data_offsets": (position, position + 2 * leaf.size)}
            position += 2 * leaf.size
        text = json.dumps(header).encode()
        write_json(tmp_path / name / "config.json", configs.write_config(cfg, component.format))
        with open(tmp_path / name / f"{component.stem}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    size, peak = measured(tmp_path, "bfloat16", *diffusers.XL)
    assert size > 7e9
    assert peak < 1.3 * size
