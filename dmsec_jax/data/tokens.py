"""The byte-pair encoding of CLIP: text -> int32 token ids, on the `tokenizers` library.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4, on
the byte-level encoding of GPT-2 (Radford et al. 2019). Text is put in NFC, its white space collapsed, lower-cased, cut
into words, single digits and runs of other signs; the last symbol of a piece carries `</w>`. A vocabulary is 256 byte
symbols, the same 256 with `</w>`, one token per merge, and the marks `<|startoftext|>` and `<|endoftext|>`, so every
text has an encoding.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from dmsec_jax.core.checks import fail, require
from dmsec_jax.data import token_files
from dmsec_jax.data.token_files import BOS, DEFAULT_LENGTH, END_OF_WORD, EOS

PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

# Bytes that print keep their character and come first; the other 68 become the code points from 256 on, as in GPT-2.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHER)}
BASE_TOKENS = [*BYTE_OF, *(symbol + END_OF_WORD for symbol in BYTE_OF)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its merges; ids are 0..len(vocab)-1. `dataclasses.replace` gives another length or pad token.

    Attributes:
        vocab: token -> id.
        merges: pairs of tokens, the earliest first.
        max_length: context of the text encoder, start and end marks included.
        pad: token that fills rows up to `max_length`: the end mark in Stable Diffusion 1, `"!"` in Stable Diffusion 2.
        words: further words -> the ids that each stands for, beyond those of `vocab` (textual inversion); matched whole, in any case.

    Raises:
        ValueError: if the ids are not 0..n-1, if a mark, the pad token or a part or the result of a merge is not in
            `vocab`, or if `max_length` < 2.
    """

    vocab: Mapping[str, int] = dataclasses.field(repr=False)
    merges: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    max_length: int = DEFAULT_LENGTH
    pad: str = EOS
    words: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        ids, cure = list(self.vocab.values()), "take all files from one CLIP model"
        whole = sorted(ids) == list(range(len(ids)))
        require(whole, "vocabulary ids", f"0..{len(ids) - 1}, each once", "others", cure)
        for token in (BOS, EOS, self.pad):
            require(token in self.vocab, "vocabulary", f"one with the token {token!r}", "one without", cure)
        require(self.max_length >= 2, "max_length", ">= 2", self.max_length, "use the context of the text encoder")
        object.__setattr__(self, "_backend", _backend(self.vocab, self.merges, self.pad))
        object.__setattr__(self, "_learnt", {word.lower(): list(ids) for word, ids in self.words.items()})
        object.__setattr__(self, "_split", _splitter(self._learnt))
        object.__setattr__(self, "_tokens", sorted(self.vocab, key=self.vocab.__getitem__))

    @property
    def bos_id(self) -> int:
        return self.vocab[BOS]

    @property
    def eos_id(self) -> int:
        return self.vocab[EOS]

    @property
    def pad_id(self) -> int:
        return self.vocab[self.pad]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads a tokenizer folder: `vocab.json` and `merges.txt`, or `tokenizer.json`, and the settings beside them.

        Raises:
            ValueError: if files are missing, malformed, not in CLIP's format, or hold tokens added to the vocabulary.
        """
        files = token_files.read(folder)
        try:
            return cls(**files._asdict())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer folder that `load` and `transformers.CLIPTokenizer.from_pretrained` open.

        Raises:
            OSError: if a file cannot be written; each file is written whole or not at all.
        """
        token_files.write(folder, token_files.TokenFiles(self.vocab, self.merges, self.pad, self.max_length))

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, max_length: int = DEFAULT_LENGTH) -> "Tokenizer":
        """Learns the most frequent merges of `texts`; the same texts give the same tokenizer.

        Args:
            texts: any strings; with none the result encodes byte by byte.
            vocab_size: at least 514. The result is smaller if the texts hold fewer different pairs: read `len(vocab)`.
            max_length: context of the text encoder to be trained with it.

        Raises:
            ValueError: if `vocab_size` has no room for the base symbols and the two marks, or if `texts` is one string.
        """
        smallest = len(BASE_TOKENS) + 2
        contract = f">= {smallest} (512 base symbols, two marks)"
        require(vocab_size >= smallest, "vocab_size", contract, vocab_size, "enlarge it")
        require(not isinstance(texts, str), "texts", "a sequence of strings", "one string", "write [text]")
        learner = _backend({EOS: 0}, (), EOS)
        # Ties go to the pair of lower ids. The library numbers symbols with a suffix in the order of a randomly seeded
        # hash table, so that each run would learn other merges; symbols given as special tokens are numbered in order.
        options = {"special_tokens": BASE_TOKENS, "end_of_word_suffix": END_OF_WORD, "show_progress": False}
        learner.train_from_iterator((_utf8(text) for text in texts), BpeTrainer(vocab_size=vocab_size, **options))
        vocab = {token: i for i, token in enumerate(BASE_TOKENS)}
        merges = []
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            if len(vocab) == vocab_size - 2:
                break
            merges.append((left, right))
            vocab.setdefault(left + right, len(vocab))  # two merges may spell the same token
        for mark in (BOS, EOS):
            vocab[mark] = len(vocab)
        return cls(vocab=vocab, merges=tuple(merges), max_length=max_length)

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> Int[np.ndarray, "B L"]:
        """Token ids int32 [B, max_length]: start mark, text, end mark, padding.

        Args:
            texts: B strings; `""` is the empty prompt. As in transformers, a mark spelt out in a text becomes the mark.
            truncate: cut a text that is too long, keeping the end mark.

        Raises:
            ValueError: if a text has more than `max_length` tokens and `truncate` is not set, is no valid Unicode,
                or if `texts` is one string.
        """
        require(not isinstance(texts, str), "texts", "a sequence of strings", "one string", "write [text]")
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, text in zip(ids, texts, strict=True):
            found = self._ids(_utf8(text))
            if len(found) + 2 > self.max_length and not truncate:
                got = f"{len(found) + 2} tokens for {text[:60]!r}{'...' if len(text) > 60 else ''}"
                contract = f"at most {self.max_length} tokens, start and end mark included"
                raise fail("prompt", contract, got, "shorten it (in Python, truncate=True cuts it)")
            found = [self.bos_id, *found[: self.max_length - 2], self.eos_id]
            row[: len(found)] = found
        return ids

    def _ids(self, text: str) -> list[int]:
        pieces = self._split.split(text) if self.words else [text]  # every second one is a learnt word
        known = lambda piece: self._backend.encode(piece, add_special_tokens=False).ids
        return [
            i for j, piece in enumerate(pieces) for i in ((j % 2 and self._learnt.get(piece.lower())) or known(piece))
        ]

    def decode(self, ids: Int[np.ndarray, "B L"]) -> list[str]:
        """The B texts in lower case, a space after each word, digit and run of signs; a row ends at its first end mark.

        Raises:
            ValueError: if `ids` is not [B, L] or holds an id outside the vocabulary.
        """
        ids = np.asarray(ids)
        require(ids.ndim == 2, "ids", "[B, L]", f"shape {ids.shape}", "add the batch axis with ids[None]")
        inside = bool(((ids >= 0) & (ids < len(self.vocab))).all())
        require(inside, "ids", f"in 0..{len(self.vocab) - 1}", "others", "use the tokenizer that made them")
        return [self._decode_row(row.tolist()) for row in ids]

    def _decode_row(self, row: list[int]) -> str:
        if self.eos_id in row:
            row = row[: row.index(self.eos_id)]
        symbols = "".join(self._tokens[i] for i in row if i != self.bos_id).replace(END_OF_WORD, " ")
        raw = b"".join(bytes([BYTE_OF[s]]) if s in BYTE_OF else s.encode() for s in symbols)
        return raw.decode("utf-8", errors="replace").strip(" ")


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: str) -> tokenizers.Tokenizer:
    """The pipeline of `transformers.CLIPTokenizer`; symbols outside the vocabulary become the end mark."""
    try:
        model = BPE(vocab=dict(vocab), merges=list(merges), unk_token=EOS, end_of_word_suffix=END_OF_WORD)
    except Exception as error:  # the library raises bare Exception
        contract = "pairs whose parts and results are in the vocabulary"
        raise fail("merges", contract, str(error), "take all files from one CLIP model") from error
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens([token for token in (BOS, EOS, pad) if token in vocab])
    return backend


def _splitter(words: Iterable[str]) -> re.Pattern[str]:
    """Finds whole words, the longest first; a word may begin and end with signs."""
    edge = lambda letter, look: look if letter.isalnum() or letter == "_" else ""
    choices = (
        edge(word[0], r"(?<!\w)") + re.escape(word) + edge(word[-1], r"(?!\w)")
        for word in sorted(words, key=len, reverse=True)
    )
    return re.compile(f"({'|'.join(choices)})", re.IGNORECASE)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got, cure = f"a lone surrogate in {text[:60]!r}", "decode it with errors='replace'"
        raise fail("text", "valid Unicode", got, cure) from error
    return text
