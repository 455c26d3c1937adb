"""Tokens as bytes, against the tokenizers themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.gateway.vocabulary import Vocabulary
from edge_client.tokenizer import EdgeTokenizer
from split_llama.demo import demo_model_path
from split_llama.errors import CheckpointError

TEXT = "Où est Tom? 🙂 <b> \n\t日本"


@pytest.mark.parametrize("name", ["demo", "llama2-tokenizer", "stories260K"])
def test_the_bytes_of_a_texts_tokens_are_its_bytes(name: str, data_dir: Path) -> None:
    folder = demo_model_path() if name == "demo" else data_dir / name
    vocabulary, tokenizer = Vocabulary.open(folder), EdgeTokenizer.open(folder)
    joined = b"".join(vocabulary.bytes_of(token) for token in tokenizer.encode(TEXT, special_tokens=False))
    # SentencePiece puts a space before the text.
    assert joined.removeprefix(b" ") == TEXT.encode()


def test_half_a_character_is_written_as_openai_does() -> None:
    raw = {"model": {"vocab": {"â": 0, "Ġa": 1}}, "decoder": {"type": "ByteLevel"}, "added_tokens": []}
    vocabulary = Vocabulary(raw)
    assert vocabulary.text_of(0) == "bytes:\\xe2"
    assert vocabulary.text_of(1) == " a"
    assert (vocabulary.bytes_of(7), vocabulary.text_of(7)) == (b"", "")


def test_unigram_and_broken_files(tmp_path: Path) -> None:
    vocabulary = Vocabulary({"model": {"vocab": [["▁the", -1.0], ["<0xE2>", -2.0]]}, "decoder": None})
    assert vocabulary.bytes_of(0) == b" the"
    assert vocabulary.bytes_of(1) == b"\xe2"
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(CheckpointError, match="vocabulary"):
        Vocabulary.open(tmp_path)
