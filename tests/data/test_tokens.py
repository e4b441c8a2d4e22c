import dataclasses
import json
import os
import subprocess
import sys
import unicodedata

import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
from hypothesis import example, given

from dmsec_jax.data.tokens import BASE_TOKENS, BOS, EOS, Tokenizer

CAPTIONS = [
    f"a {style} icon of a {thing}" for style in ("noto", "twemoji") for thing in ("red apple", "green apple", "dog")
]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(CAPTIONS, vocab_size=560, max_length=16)


@pytest.fixture(scope="module")
def roomy(tok):
    return dataclasses.replace(tok, max_length=400)


def test_base_symbols_have_the_ids_of_clip():
    tok = Tokenizer.train([], vocab_size=514)
    assert len(tok.vocab) == 514
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (512, 513, 513)
    # From the vocabulary published with CLIP; the first five are whole words, the last has no suffix.
    assert tok.encode(["! , . 1 a"])[0, 1:6].tolist() == [256, 267, 269, 272, 320]
    assert tok.vocab["!"] == 0
    assert len(set(BASE_TOKENS)) == 512


def test_frequent_words_become_one_token(tok):
    row = tok.encode(["a red apple"])[0]
    assert row[:5].tolist() == [
        tok.bos_id,
        tok.vocab["a</w>"],
        tok.vocab["red</w>"],
        tok.vocab["apple</w>"],
        tok.eos_id,
    ]
    assert (row[5:] == tok.pad_id).all()


def test_ids_are_int32_rows_of_the_context_length(tok):
    ids = tok.encode(["", "a dog", "an unseen word"])
    assert ids.dtype == np.int32
    assert ids.shape == (3, 16)
    assert tok.encode([]).shape == (0, 16)


def test_empty_prompt_is_the_two_marks(tok):
    assert tok.encode([""])[0, :2].tolist() == [tok.bos_id, tok.eos_id]
    assert np.array_equal(tok.encode([""]), tok.encode([" \n\t"]))


def test_case_and_white_space_do_not_matter(tok):
    assert np.array_equal(tok.encode(["A  Red\n Apple "]), tok.encode(["a red apple"]))
    assert np.array_equal(tok.encode(["cafe\u0301"]), tok.encode(["caf\u00e9"]))


def test_too_long_prompt_is_refused_and_cut_only_on_request(tok):
    prompt = "dog " * 20
    with pytest.raises(ValueError, match=r"at most 16 tokens.*got 22 tokens for 'dog dog.*truncate=True"):
        tok.encode(["a dog", prompt])
    row = tok.encode([prompt], truncate=True)[0]
    assert row.tolist() == [tok.bos_id, *[tok.vocab["dog</w>"]] * 14, tok.eos_id]
    fits = tok.encode(["dog " * 14])[0]
    assert np.array_equal(fits, row)


def test_one_string_or_broken_unicode_is_refused(tok):
    with pytest.raises(ValueError, match=r"write \[text\]"):
        tok.encode("a dog")
    with pytest.raises(ValueError, match=r"write \[text\]"):
        Tokenizer.train("a dog", vocab_size=600)
    with pytest.raises(ValueError, match="lone surrogate"):
        tok.encode(["a \ud800 dog"])


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
@example(text="it's a dog's 12 \u00bd \x00 \u2028 \ufb01 \u0130 \U0001f431\u200d!! ''s </w> _\u0301")
def test_any_text_is_encoded_and_survives_decoding(roomy, text):
    ids = roomy.encode([text])
    assert ids.min() >= 0
    assert ids.max() < len(roomy.vocab)
    assert (ids[0] == roomy.eos_id).argmax() == (ids[0] != roomy.pad_id).sum()
    decoded = roomy.decode(ids)
    lower = "".join(sign.lower() for sign in unicodedata.normalize("NFC", text))  # sign by sign: no final sigma
    assert "".join(decoded[0].split()) == "".join(lower.split())
    if unicodedata.is_normalized("NFC", decoded[0]):  # lower case can leave NFC, after dotted capital I for instance
        assert np.array_equal(roomy.encode(decoded), ids)


def test_decode_stops_at_the_end_mark_and_checks_ids(tok):
    assert tok.decode(tok.encode(["A dog, 12!", ""])) == ["a dog , 1 2 !", ""]
    sd2 = dataclasses.replace(tok, pad="!")
    assert sd2.decode(sd2.encode(["a dog"])) == ["a dog"]
    with pytest.raises(ValueError, match="use the tokenizer that made them"):
        tok.decode(np.array([[len(tok.vocab)]]))
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        tok.decode(np.array([1, 2]))


def test_stable_diffusion_2_pads_with_its_own_token(tok):
    sd2 = dataclasses.replace(tok, pad="!")
    row = sd2.encode(["a dog"])[0]
    assert row[:4].tolist() == tok.encode(["a dog"])[0, :4].tolist()
    assert (row[4:] == 0).all()


def test_training_is_repeatable_and_stops_where_the_texts_end(tok):
    again = Tokenizer.train(iter(CAPTIONS), vocab_size=560, max_length=16)
    assert again.vocab == tok.vocab
    assert again.merges == tok.merges
    assert len(tok.vocab) == 514 + len({left + right for left, right in tok.merges})
    small = Tokenizer.train(CAPTIONS, vocab_size=520)
    assert len(small.vocab) == 520
    assert small.merges == tok.merges[:6]
    everything = Tokenizer.train(CAPTIONS, vocab_size=5000)
    assert len(everything.vocab) < 600
    with pytest.raises(ValueError, match="vocab_size must be >= 514"):
        Tokenizer.train(CAPTIONS, vocab_size=513)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_saved_folder_is_read_back(tok, tmp_path, pad):
    dataclasses.replace(tok, pad=pad).save(tmp_path / "tokenizer")
    names = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(os.listdir(tmp_path / "tokenizer")) == names
    back = Tokenizer.load(tmp_path / "tokenizer")
    assert (back.vocab, back.merges, back.max_length, back.pad) == (tok.vocab, tok.merges, 16, pad)
    assert list(back.vocab.values()) == list(range(len(tok.vocab)))


def test_tokenizer_json_alone_is_enough(tok, tmp_path):
    special = [{"id": tok.vocab[t], "content": t, "special": True} for t in (BOS, EOS)]
    for merges in ([list(pair) for pair in tok.merges], [" ".join(pair) for pair in tok.merges]):
        model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": tok.vocab, "merges": merges}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": special}))
        back = Tokenizer.load(tmp_path)
        assert (back.vocab, back.merges, back.max_length, back.pad) == (tok.vocab, tok.merges, 77, EOS)


@pytest.mark.parametrize(
    ("config", "special", "expected"),
    [
        ({}, {}, (EOS, 77)),
        ({"model_max_length": 1e30}, {}, (EOS, 77)),
        ({"model_max_length": 20, "pad_token": {"content": "!", "special": True}}, {}, ("!", 20)),
        ({"pad_token": EOS}, {"pad_token": "!"}, ("!", 77)),  # Stable Diffusion 2.1
        ({"pad_token": EOS, "added_tokens_decoder": {"0": {"content": "!"}}}, {"pad_token": "!"}, (EOS, 77)),
    ],
)
def test_pad_token_and_length_come_from_the_settings(tok, tmp_path, config, special, expected):
    tok.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    back = Tokenizer.load(tmp_path)
    assert (back.pad, back.max_length) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "valid JSON"),
        ("vocab.json", "[" * 100_000, "valid JSON"),
        ("vocab.json", "[1]", "one JSON object"),
        ("vocab.json", b"\xff\xfe", "valid JSON in UTF-8"),
        ("vocab.json", "{}", "token -> integer id"),
        ("vocab.json", '{"a": "0"}', "token -> integer id"),
        ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 2}', r"0\.\.1, each once"),
        ("vocab.json", '{"a": 0}', "one with the token"),
        ("vocab.json", f'{{"{BOS}": 0, "{EOS}": 1}}', "results are in the vocabulary"),
        ("merges.txt", "#version: 0.2\na b c\n", "merges of two tokens"),
        ("merges.txt", b"\xff", "UTF-8"),
        ("merges.txt", "#version: 0.2\nq z\n", "results are in the vocabulary"),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": -Infinity}', "model_max_length"),
        ("tokenizer_config.json", '{"pad_token": 3, "added_tokens_decoder": {"0": 1}}', "pad_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999": {"content": "<cat-toy>"}}}', "textual-inversion"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "one with the token '<pad>'"),
        ("added_tokens.json", '{"<cat-toy>": 999}', "textual-inversion"),
    ],
)
def test_malformed_folder_is_an_error_that_names_it(tok, tmp_path, name, content, message):
    tok.save(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_or_foreign_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got nothing; point to tokenizer/"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(ValueError, match=r"of type BPE with suffix </w>.*WordPiece"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").touch()
    with pytest.raises(ValueError, match="a regular file"):
        Tokenizer.load(tmp_path)


def test_training_gives_the_same_merges_in_every_process():
    """The learner's hash tables are seeded anew in each process; ties must not depend on them."""
    program = (
        "from dmsec_jax.data.tokens import Tokenizer;"
        "words = [a + b + c for a in 'abcdef' for b in 'ghijk' for c in 'lmnop'];"
        "print(Tokenizer.train([' '.join(words)] * 3, vocab_size=600).merges)"
    )
    runs = {subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(runs) == 1
