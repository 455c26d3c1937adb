"""The vocabulary as bytes: what each token stands for by itself, also where that is half a character."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from split_llama.errors import CheckpointError
from split_llama.json_file import read_json

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """Token ids to bytes. Made from `tokenizer.json`; special tokens stand for their own names."""

    def __init__(self, raw: dict[str, Any]) -> None:
        model = raw.get("model") or {}
        vocab = model.get("vocab") or {}
        pieces = {index: piece for piece, index in vocab.items()} if isinstance(vocab, dict) else _unigram(vocab)
        added = {entry["id"]: entry["content"] for entry in raw.get("added_tokens") or []}
        read = _read_byte_level() if "ByteLevel" in str(raw.get("decoder")) else _read_sentencepiece
        # Tokens that were added by name, such as the tags around a tool call.
        self.added = {content: index for index, content in added.items()}
        self._bytes = {index: read(piece) for index, piece in pieces.items()}
        self._bytes |= {index: content.encode() for index, content in added.items()}

    @classmethod
    def open(cls, folder: Path) -> Vocabulary:
        """Read `tokenizer.json` of a model folder. Raises `CheckpointError`."""
        path = folder / "tokenizer.json"
        try:
            return cls(dict(read_json(path)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a vocabulary: {error!r}") from error

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes of a token; none for an id without a token."""
        return self._bytes.get(token, b"")

    def text_of(self, token: int) -> str:
        r"""Give a token's text; where it is no whole character its bytes, as OpenAI writes them: `bytes:\xe2\x80`."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in data)


def _unigram(vocab: list[list[Any]]) -> dict[int, str]:
    return {index: str(entry[0]) for index, entry in enumerate(vocab)}


def _read_sentencepiece(piece: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()


def _read_byte_level() -> Any:
    """Undo GPT-2's writing of bytes as printable characters (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in printable]
    byte_of |= {chr(256 + place): value for place, value in enumerate(others)}

    def read(piece: str) -> bytes:
        if all(char in byte_of for char in piece):
            return bytes(byte_of[char] for char in piece)
        return piece.encode()

    return read
