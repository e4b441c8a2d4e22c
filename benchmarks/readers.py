"""Every reader of files from strangers, each with honest files to start from."""

import io
import json
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dmsec_jax.checkpoints import (
    adapters,
    configs,
    diffusers,
    embeddings,
    inspection,
    single_file,
    torch_archive,
    weights,
)
from dmsec_jax.checkpoints import io as tensors
from dmsec_jax.core.files import read_json
from dmsec_jax.core.trees import map_paths
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.diffusion import schedule
from dmsec_jax.models import presets

FIELDS = {name: component.field for name, component in diffusers.COMPONENTS.items()}


class Reader(NamedTuple):
    """`read(folder)` reads the file `name` in it; `seeds` are what it may hold, inside what `wrap` puts around; `header` as of `mutation.mutate`."""

    name: str
    seeds: tuple[bytes, ...]
    header: int
    read: Callable[[Path], object]
    beside: Mapping[str, bytes] = MappingProxyType({})
    wrap: Callable[[bytes], bytes] = bytes


def readers() -> dict[str, Reader]:
    """Name -> reader."""
    targets = {name: diffusers.shapes(name, getattr(presets.TINY, field)) for name, field in FIELDS.items()}
    vocabulary, merges, whole = _tokenizer()
    index = json.dumps({"metadata": {"total_size": 48}, "weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}})
    shards = {f"s-{i}.safetensors": _safetensors({name: np.ones(3, np.float32)}) for i, name in ((1, "a"), (2, "b"))}
    lora = {
        "lora_unet_conv_in.lora_down.weight": np.ones((2, 4, 3, 3)),
        "lora_unet_conv_in.lora_up.weight": np.ones((8, 2, 1, 1)),
    }
    peft = {
        "base_model.model.conv_in.lora_A.weight": np.ones((2, 4, 3, 3)),
        "base_model.model.conv_in.lora_B.weight": np.ones((8, 2, 1, 1)),
    }
    krona = {"lora_unet_conv_in.lokr_w1": np.ones((2, 2)), "lora_unet_conv_in.lokr_w2": np.ones((4, 2, 3, 3))}
    turned = {"lora_unet_conv_in.oft_blocks": np.full((2, 4, 4), 0.1), "lora_unet_conv_in.alpha": np.zeros(())}
    scale = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"conv_in": 3}})}
    small = {"a": np.ones((2, 3), np.float32), "b": np.ones((), np.float16), "c": np.ones((0, 2), np.int8)}
    found = {
        "safetensors": Reader("x.safetensors", (_safetensors(small, {"k": "v"}), _safetensors({})), 8, _touched),
        "adapter": Reader(
            "x.safetensors",
            (
                _safetensors(lora | {"lora_unet_conv_in.alpha": np.ones(())}),
                _safetensors(krona),
                _safetensors(turned),
                _safetensors({"lora_unet_conv_in.diff": np.ones((8, 4, 3, 3))}),
                _safetensors(lora, scale),
            ),
            8,
            lambda folder: adapters.read_adapter(folder / "x.safetensors", targets),
        ),
        "adapter_config.json": Reader(
            "adapter_config.json",
            (
                json.dumps(
                    {"peft_type": "LORA", "lora_alpha": 2, "alpha_pattern": {"conv_in": 1}, "use_rslora": True}
                ).encode(),
            ),
            0,
            lambda folder: adapters.read_adapter(folder / "adapter_model.safetensors", targets),
            {"adapter_model.safetensors": _safetensors(peft)},
        ),
        "single file": Reader(
            "x.safetensors",
            (_whole(targets),),
            8,
            lambda folder: single_file.read_params(folder / "x.safetensors", presets.TINY),
        ),
        "torch archive": Reader(
            "x.pt", (_archive(_tensor()), _legacy()), -1, lambda folder: torch_archive.read(folder / "x.pt")
        ),
        "pickle in an archive": Reader(
            "x.pt", (_tensor(), _module()), -1, lambda folder: torch_archive.read(folder / "x.pt"), wrap=_archive
        ),
        "weights of pytorch": Reader(
            "m.bin", (_archive(_tensor()), _legacy()), -1, lambda folder: weights.read_weights(folder, "m")
        ),
        "page of info": Reader(
            "x.safetensors",
            (
                _safetensors(lora),
                _safetensors({"a": np.ones(3)}, {"ss_x": "y"}),
                _safetensors({"emb_params": np.ones((1, 8))}),
            ),
            8,
            lambda folder: inspection.inspect(folder / "x.safetensors"),
        ),
        "learnt words": Reader(
            "x.safetensors",
            (_safetensors({"<a>": np.ones((2, 8))}), _safetensors({"emb_params": np.ones((1, 8))})),
            8,
            lambda folder: embeddings.read_words(folder / "x.safetensors", {"text_encoder": 8}),
        ),
        "config of latent diffusion": Reader(
            "x.yaml",
            (b"model:\n  params:\n    parameterization: 'v'\n    x: [1, &a {b: c}, *a]\n",),
            -1,
            lambda folder: single_file.prediction_beside(folder / "x.safetensors"),
        ),
        "shard index": Reader(
            "m.safetensors.index.json", (index.encode(),), 0, lambda folder: weights.read_weights(folder, "m"), shards
        ),
        "model_index.json": Reader(
            diffusers.INDEX,
            (json.dumps(diffusers.index_of("DDIMScheduler", presets.TINY)).encode(),),
            0,
            diffusers.check_index,
        ),
        "scheduler_config.json": Reader(
            "s.json",
            tuple(
                json.dumps(dict(p.scheduler)).encode() for p in (presets.TINY, presets.SD15, presets.SD21, presets.SDXL)
            ),
            0,
            lambda folder: schedule.from_scheduler_json(read_json(folder / "s.json"), "s.json"),
        ),
        "tokenizer vocabulary": Reader("vocab.json", (vocabulary,), 0, Tokenizer.load, {"merges.txt": merges}),
        "tokenizer merges": Reader("merges.txt", (merges,), -1, Tokenizer.load, {"vocab.json": vocabulary}),
    }
    files = {"vocab.json": vocabulary, "merges.txt": merges}
    for name, content in {
        "tokenizer_config.json": {
            "model_max_length": 16,
            "pad_token": {"content": "!"},
            "added_tokens_decoder": {"0": {"content": "!"}},
        },
        "special_tokens_map.json": {"bos_token": "<|startoftext|>", "pad_token": "!"},
        "added_tokens.json": {"!": 0},
    }.items():
        found[name] = Reader(name, (json.dumps(content).encode(),), 0, Tokenizer.load, files)
    found["tokenizer.json"] = Reader("tokenizer.json", (whole,), 0, Tokenizer.load)
    for name, component in diffusers.XL.items():
        fmt = component.format
        known = [getattr(preset, component.field) for preset in (presets.TINY, presets.SD21, presets.TINY_XL)]
        seeds = tuple(json.dumps(configs.write_config(cfg, fmt)).encode() for cfg in known if cfg is not None)
        found[f"{name}/config.json"] = Reader(
            "config.json",
            seeds,
            0,
            lambda folder, fmt=fmt: configs.read_config(read_json(folder / "config.json"), fmt, "c"),
        )
    return found


def _touched(folder: Path) -> int:
    """Every byte of every tensor, so that what lies outside the file would show."""
    path = folder / "x.safetensors"
    tensors.read_metadata(path)
    return sum(
        int(array.reshape(-1).view(np.uint8).sum(dtype=np.uint64)) for array in tensors.read_tensors(path).values()
    )


def _safetensors(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        tensors.write_tensors(path, arrays, dtype="float32", metadata=metadata)
        return path.read_bytes()


def _whole(targets) -> bytes:
    params = {name: map_paths(lambda _, leaf: np.ones(leaf.shape, np.float32), tree) for name, tree in targets.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        single_file.write_model(path, presets.TINY, params)
        return path.read_bytes()


def _tokenizer() -> tuple[bytes, bytes, bytes]:
    """`vocab.json`, `merges.txt`, and both in the one file that transformers writes today."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Tokenizer.train(["a red dog", "a blue cat"], vocab_size=530, max_length=16).save(folder)
        vocabulary, merges = ((folder / file).read_bytes() for file in ("vocab.json", "merges.txt"))
    pairs = [line.split(" ") for line in merges.decode().split("\n")[1:] if line]
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": json.loads(vocabulary), "merges": pairs}
    whole = {"added_tokens": [{"id": 0, "content": "!"}], "model": model}
    return vocabulary, merges, json.dumps(whole).encode()


def _tensor() -> bytes:
    """A pickle of {"a": a tensor of [2, 3]}, as PyTorch writes it."""
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value
    number = lambda value: b"K" + bytes([value])
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(6) + b"tQ"
    body = (
        storage
        + number(0)
        + number(2)
        + number(3)
        + b"\x86"
        + number(3)
        + number(1)
        + b"\x86\x89ccollections\nOrderedDict\n)R"
    )
    return b"\x80\x02}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tRs."


def _module() -> bytes:
    """A pickle of a TorchScript module, and of what Lightning notes beside it."""
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value
    inside = b"c__torch__.net\nNet\n)\x81}" + text(b"w") + _tensor()[2:-1] + b"sb"
    notes = (
        b"}cpytorch_lightning.callbacks\nCheckpoint\n}" + text(b"score") + b"cnumpy\ndtype\n(" + text(b"f8") + b"tRss"
    )
    return b"\x80\x02}(" + text(b"net") + inside + text(b"notes") + notes + b"u."


def _archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", np.arange(6, dtype="<f4").tobytes())
        archive.writestr("x/byteorder", b"little")
    return file.getvalue()


def _legacy() -> bytes:
    parts = (torch_archive.LEGACY_MAGIC, 1001, {"little_endian": True, "protocol_version": 1001})
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    storage = struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes()
    return head + _tensor() + pickle.dumps(["0"], 2) + storage
