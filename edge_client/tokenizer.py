"""Text to token ids and back, as transformers' AutoTokenizer does it, without transformers.

`TextStream` turns tokens into text as they come: it holds back incomplete UTF-8 and decodes a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from split_llama.errors import CheckpointError, UsageError
from split_llama.json_file import read_json

CONTEXT_TOKENS = 8
LONGEST_CHARACTER = 4  # bytes of one character in UTF-8
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
REPLACEMENT = "\ufffd"


class EdgeTokenizer:
    """The tokenizer of a model folder. Ids equal those of transformers 5."""

    def __init__(self, backend: Tokenizer, config: dict[str, Any]) -> None:
        self._backend = backend
        named = {key: _token_text(config.get(key)) for key in SPECIAL_TOKENS}
        self.special_tokens = {key: text for key, text in named.items() if text is not None}

    @classmethod
    def open(cls, folder: Path) -> EdgeTokenizer:
        """Read `tokenizer.json` and, if there, `tokenizer_config.json`. Raises `CheckpointError`."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: there is no tokenizer.json; other tokenizer files are not supported")
        config_path = folder / "tokenizer_config.json"
        config = dict(read_json(config_path)) if config_path.is_file() else {}
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for any malformed file
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        _follow_class(backend, config)
        _follow_added_tokens(backend, config)
        return cls(backend, config)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Give the ids of `text`, with BOS where the model wants it unless `special_tokens` is false.

        Raises `UsageError` for lone surrogates: bytes of the command line or of stdin that were no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is no valid text at character {error.start}: was it UTF-8?") from None
        return list(self._backend.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Give the text of `ids`, without special tokens unless they are wanted."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """Give the id of a token by its text."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token, if the tokenizer names one."""
        bos = self.special_tokens.get("bos_token")
        return None if bos is None else self.token_id(bos)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Start a text stream that continues the ids of `context`."""
        return TextStream(self, context)


class TextStream:
    """Incremental decoding: the pieces joined are the text that the tokens add to their context.

    Only the tokens since the last piece and those of the piece before are decoded, because a decoder may look at its
    neighbours (a leading space, a run of byte tokens), but never further.
    """

    def __init__(self, tokenizer: EdgeTokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT_TOKENS:])
        self._read = len(self._window)

    def push(self, token: int) -> str:
        """Take one token and give the text that is complete now; often empty inside a multi-byte character."""
        self._window.append(token)
        piece = self._new_text()
        # A decoder gives up to one replacement character per byte that is still alone.
        alone = len(piece) - len(piece.rstrip(REPLACEMENT))
        if not piece or 0 < alone < LONGEST_CHARACTER:
            return ""
        self._slide()
        return piece

    def flush(self) -> str:
        """Give what is left, incomplete characters as replacement characters."""
        piece = self._new_text()
        self._slide()
        return piece

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._window[: self._read])
        text = self._tokenizer.decode(self._window)
        if text.startswith(before):
            return text[len(before) :]
        # Invalid bytes after valid ones change how a byte-fallback decoder reads the whole run.
        return self._tokenizer.decode(self._window[self._read :])

    def _slide(self) -> None:
        self._window = self._window[self._read :] if self._read < len(self._window) else self._window
        self._read = len(self._window)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _follow_class(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Rebuild what transformers 5 rebuilds for `LlamaTokenizer`: a space goes before the text, not before each part."""
    name = str(config.get("tokenizer_class", ""))
    if name not in ("LlamaTokenizer", "LlamaTokenizerFast") or not _has_byte_fallback(backend):
        return
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if config.get("legacy", False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is not False:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def _has_byte_fallback(backend: Tokenizer) -> bool:
    return bool(getattr(backend.model, "byte_fallback", False))


def _follow_added_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Add special tokens that only `tokenizer_config.json` names, as transformers does."""
    named = [_token_text(config.get(key)) for key in SPECIAL_TOKENS]
    missing = [token for token in named if token is not None and backend.token_to_id(token) is None]
    if missing:
        backend.add_special_tokens(missing)
