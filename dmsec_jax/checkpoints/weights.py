"""The weight files of one component: one file, or shards with an index, under diffusers' names; safetensors or, if there are none, PyTorch's.

`<stem>.safetensors`, or `<stem>-00001-of-00002.safetensors`, ... and `<stem>.safetensors.index.json`; for the variant
"fp16" `<stem>.fp16.safetensors`, or `<stem>.fp16-00001-of-00002.safetensors`, ... and
`<stem>.safetensors.index.fp16.json`. PyTorch's end in `.bin`, transformers calls them `pytorch_model`; tensors alone are taken from them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.checkpoints import torch_archive
from dmsec_jax.checkpoints.io import INTACT, read_tensors, stored_dtype, write_tensors
from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import read_json, write_json

SHARD_BYTES = 5 * 10**9
READERS = {".safetensors": read_tensors, ".bin": torch_archive.read}


def read_weights(folder: str | Path, stem: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """All tensors of a component, mapped from its file or shards.

    Args:
        folder: the component's folder, `unet/` for example.
        stem: "diffusion_pytorch_model" or "model".
        variant: "fp16" reads the files with that infix; None those without, or the fp16 ones if there are no others.

    Raises:
        ValueError: if there is no file of that name, it is damaged or holds more than tensors, or index and shards disagree.
    """
    folder = Path(folder)
    for suffix in READERS:
        name = "pytorch_model" if suffix == ".bin" and stem == "model" else stem
        for infix in (f".{variant}",) if variant else ("", ".fp16"):
            if (single := folder / f"{name}{infix}{suffix}").is_file():
                return READERS[suffix](single)
            if (index := folder / f"{name}{suffix}.index{infix}.json").is_file():
                return _read_shards(index, suffix)
    wanted = f"a folder with {stem}{f'.{variant}' if variant else ''}.safetensors"
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    raise fail(str(folder), wanted, ", ".join(there) or "nothing", "download the missing file or name another variant")


def write_weights(
    folder: str | Path,
    stem: str,
    tensors: Mapping[str, Any],
    *,
    dtype: str | None = None,
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a component's tensors: one file, or an index and shards of at most `shard_bytes` (or one tensor) each.

    Args and Raises as `write_tensors`; every header gets `metadata` beside the `format: pt` that transformers wants.
    """
    folder, infix = Path(folder), f".{variant}" if variant else ""
    metadata = {"format": "pt"} | dict(metadata or {})
    sizes = {name: np.size(t) * stored_dtype(name, t, dtype).itemsize for name, t in tensors.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name in tensors:
        if shards[-1] and used + sizes[name] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += sizes[name]
    if len(shards) == 1:
        write_tensors(folder / f"{stem}{infix}.safetensors", tensors, dtype=dtype, metadata=metadata)
        return
    places = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}{infix}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names}, dtype=dtype, metadata=metadata)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index{infix}.json", index, sort_keys=True)


def _read_shards(index: Path, suffix: str) -> dict[str, np.ndarray]:
    """The union of the shards that the index names; the index must tell exactly what each of them holds."""
    places = read_json(index).get("weight_map")
    ok = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
    require(ok, f"weight_map of {index}", "a table of tensor to file name", repr(places)[:200], INTACT)
    files = sorted(set(places.values()))
    for file in files:
        plain, contract = (
            Path(file).name == file and file.endswith(suffix),
            f"made of {suffix} files beside it",
        )
        require(plain, f"weight_map of {index}", contract, repr(file)[:200], INTACT)
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        path = index.with_name(file)
        require(path.is_file(), f"{file}, named by {index},", "a file", "nothing", "download the missing shard")
        shard = READERS[suffix](path)
        wrong = sorted(shard.keys() ^ {name for name, place in places.items() if place == file})
        contract = f"made of the tensors that {index.name} lists"
        require(not wrong, str(path), contract, f"a difference in {wrong}", INTACT)
        tensors |= shard
    return tensors
