"""The files of a tokenizer folder, in the layout that `transformers.CLIPTokenizer` reads and writes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dmsec_jax.core.checks import fail, require
from dmsec_jax.core.files import read_bounded, read_json, write_atomically, write_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
DEFAULT_LENGTH = 77  # the context of every released CLIP text encoder
MAX_MERGES = 16 * 2**20  # bytes; the released ones take 0.5 MB
UNKNOWN_LENGTH = 2**16  # transformers writes 1e30 where the length is unknown


class TokenFiles(NamedTuple):
    """What a tokenizer folder says: token -> id, merges with the earliest first, pad token, context length."""

    vocab: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    pad: str
    max_length: int


def read(folder: str | Path) -> TokenFiles:
    """Reads `vocab.json` and `merges.txt`, or else `tokenizer.json`; then the pad token and the length.

    These come from `special_tokens_map.json` and `tokenizer_config.json`; without them they are the end mark and 77.

    Raises:
        ValueError: if files are missing, malformed or not in CLIP's format, or if tokens were added to the vocabulary.
    """
    folder = Path(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab, merges, added = read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt"), []
    elif (folder / "tokenizer.json").exists():
        vocab, merges, added = _read_fast(folder / "tokenizer.json")
    else:
        contract = "a folder with vocab.json and merges.txt, or with tokenizer.json"
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:10]) or "nothing"
        raise fail(str(folder), contract, found, "point to tokenizer/ of a Stable Diffusion model")
    numbered = bool(vocab) and all(type(i) is int for i in vocab.values())
    require(numbered, f"vocabulary in {folder}", "token -> integer id", "other values or none", "download it again")
    config, special, older = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    listed = config.get("added_tokens_decoder")
    _refuse_added(folder, [*added, *older, *_contents(listed.values() if isinstance(listed, dict) else ())], vocab)
    # As in transformers: the special tokens map wins, unless the config lists the added tokens itself.
    pad = (config if listed else config | special).get("pad_token") or EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    require(isinstance(pad, str), f"pad_token in {folder}", "a token", repr(pad), "correct tokenizer_config.json")
    length = config.get("model_max_length", DEFAULT_LENGTH)
    number = type(length) in (int, float) and length >= 2
    require(number, f"model_max_length in {folder}", "a number >= 2", repr(length), "correct tokenizer_config.json")
    return TokenFiles(vocab, merges, pad, int(length) if length < UNKNOWN_LENGTH else DEFAULT_LENGTH)


def write(folder: str | Path, files: TokenFiles) -> None:
    """Writes `merges.txt`, `vocab.json`, `special_tokens_map.json` and `tokenizer_config.json`.

    Raises:
        OSError: if a file cannot be written; each file is written whole or not at all.
    """
    folder = Path(folder)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": files.pad, "unk_token": EOS}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": files.max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    merges = "".join(f"{left} {right}\n" for left, right in files.merges)
    write_atomically(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
    for name, value in (
        ("vocab.json", dict(sorted(files.vocab.items(), key=lambda item: item[1]))),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings | special),
    ):
        write_json(folder / name, value)


def _read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    content = read_bounded(path, MAX_MERGES)
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise fail(str(path), "UTF-8", str(error), "download it again") from error
    body = lines[1:] if lines[0].startswith("#version") else lines
    return _pairs(path, [line.split(" ") for line in body if line])


def _read_fast(path: Path) -> tuple[dict[str, Any], tuple[tuple[str, str], ...], list[Any]]:
    content = read_json(path)
    model = content.get("model")
    kind = (model.get("type"), model.get("end_of_word_suffix")) if isinstance(model, dict) else None
    ok = kind == ("BPE", END_OF_WORD) and isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    contract = f"of type BPE with suffix {END_OF_WORD}, a vocabulary and merges"
    require(ok, str(path), contract, kind, "use the tokenizer of a Stable Diffusion model")
    merges = [item.split(" ") if isinstance(item, str) else item for item in model["merges"]]
    added = content.get("added_tokens")
    return model["vocab"], _pairs(path, merges), _contents(added if isinstance(added, list) else ())


def _pairs(path: Path, items: list[Any]) -> tuple[tuple[str, str], ...]:
    for item in items:
        ok = isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item)
        require(ok, str(path), "made of merges of two tokens", repr(item)[:80], "download it again")
    return tuple(map(tuple, items))


def _contents(tokens: Iterable[Any]) -> list[Any]:
    return [token.get("content") for token in tokens if isinstance(token, dict)]


def _refuse_added(folder: Path, tokens: list[Any], vocab: Mapping[str, Any]) -> None:
    extra = [token for token in tokens if not isinstance(token, str) or token not in vocab]
    cure = "textual-inversion tokens are not supported: use the tokenizer of the base model"
    require(not extra, str(folder), "free of tokens added to the vocabulary", repr(extra[:5]), cure)
