"""Answers held to a grammar: JSON schemas and tool calls, compiled by llguidance over the model's own vocabulary."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_client.gateway.errors import ApiError
from split_llama.errors import UsageError
from split_llama.extras import needs_extra

# One way to write JSON: a small model that may choose fills the answer with blanks.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_REASON = 400
MOST_COMPILED = 32
ANY_OBJECT = {"type": "object"}


class Grammars:
    """Compiles grammars for one model. The tokenizer's table is made when it is needed first."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._table: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def json(self, schema: dict[str, Any], param: str) -> Callable[[], GrammarConstraint]:
        """Compile a JSON schema. Blocking. Raises `ApiError` that names `param` for one that cannot be."""
        return self._compile(lambda library: library.grammar_from_json_schema(schema, overrides=JSON_STYLE), param)

    def lark(self, grammar: str, param: str) -> Callable[[], GrammarConstraint]:
        """Compile a grammar in llguidance's Lark dialect. As `json`."""
        return self._compile(lambda library: library.grammar_from_lark(grammar), param)

    def _compile(self, make: Callable[[Any], str], param: str) -> Callable[[], GrammarConstraint]:
        with needs_extra("gateway"):
            from llguidance import LLMatcher
        tokenizer = self._tokenizer()
        try:
            grammar = make(LLMatcher)
            matcher = self._recall(grammar) or LLMatcher(tokenizer, grammar, log_level=0)
        except (ValueError, RecursionError) as error:
            raise _cannot_compile(param, str(error)) from error
        if matcher.is_error():
            raise _cannot_compile(param, matcher.get_error())
        self._remember(grammar, matcher)
        return lambda: GrammarConstraint(matcher.deep_copy(), tokenizer)

    def _recall(self, grammar: str) -> Any:
        with self._lock:
            return self._compiled.pop(grammar, None)

    def _remember(self, grammar: str, matcher: Any) -> None:
        """Keep what was compiled: an agent sends the same tools with every message."""
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)

    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._table is None:
                text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
                size = max(self._vocab_size, LLTokenizer(text, slices=[]).vocab_size)
                self._table = LLTokenizer(text, n_vocab=size, eos_token=self._eos or None)
            return self._table


def _cannot_compile(param: str, reason: str) -> ApiError:
    # Some reasons span lines and quote all there is.
    said = " ".join(reason.split())[:MAX_REASON]
    return ApiError(f"{param} cannot be compiled: {said}", param=param, reason="invalid_schema")


def _cannot_follow(reason: str) -> UsageError:
    # What comes behind the first line is a trace; now and then there is no line at all.
    said = reason.strip().partition("\n")[0][:MAX_REASON]
    return UsageError(f"the grammar cannot be followed: {said or 'llguidance does not say why'}")


@dataclass(frozen=True, slots=True)
class Trigger:
    """A text behind which a grammar begins: anywhere in the answer (`many`) or only at its start; once, or `again`."""

    text: bytes
    many: bool
    again: bool


class TriggeredConstraint:
    """Leaves an answer free until the trigger was written, then holds it to a grammar until that is complete."""

    def __init__(
        self, trigger: Trigger, make: Callable[[], GrammarConstraint], bytes_of: Callable[[int], bytes]
    ) -> None:
        self._trigger = trigger
        self._make = make
        self._bytes_of = bytes_of
        self._written = b""
        self._watches = True
        self._inner: GrammarConstraint | None = None
        self.finished = False

    def mask(self, logits: Tensor) -> Tensor:
        """Rule out what the grammar does not allow, if one has begun."""
        return logits if self._inner is None else self._inner.mask(logits)

    def take(self, token: int) -> None:
        """Go on behind `token`."""
        if self._inner is not None:
            self._inner.take(token)
            self._end_if_complete(self._inner)
        elif self._watches:
            self._watch(self._bytes_of(token))

    def _watch(self, data: bytes) -> None:
        text = self._trigger.text
        self._written += data
        at = self._written.find(text)
        if at >= 0 and (self._trigger.many or at == 0):
            inner, rest = self._make(), self._written[at + len(text) :]
            # The token that completes the trigger may hold more; if that begins no call, the text was just a text.
            if inner.take_bytes(rest):
                self._inner = inner
                self._end_if_complete(inner)
            self._written = b""
        elif self._trigger.many:
            self._written = self._written[-len(text) :]
        else:
            self._watches = text.startswith(self._written)

    def _end_if_complete(self, inner: GrammarConstraint) -> None:
        if inner.finished:
            self._inner = None
            self._watches = self._trigger.again
            self.finished = not self._trigger.again


class GrammarConstraint:
    """A matcher of llguidance as a `Constraint`."""

    def __init__(self, matcher: Any, tokenizer: Any) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer

    @property
    def finished(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """Rule out what the grammar does not allow next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _cannot_follow(self._matcher.get_error())
        size = logits.shape[-1]
        allowed = np.zeros(size, np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:size]
        allowed[: len(bits)] = bits
        if not allowed.any():
            raise UsageError("the grammar cannot be followed: this model has no token that could come next")
        return logits.cpu().masked_fill(torch.from_numpy(allowed) == 0, -torch.inf)

    def take_bytes(self, data: bytes) -> bool:
        """Go on behind a text, however its tokens were cut; give whether the grammar allows it."""
        tokens = self._tokenizer.tokenize_bytes(data) if data else []
        return bool(self._matcher.try_consume_tokens(tokens) == len(tokens))

    def take(self, token: int) -> None:
        """Go on behind `token`."""
        if not self._matcher.consume_token(token):
            raise _cannot_follow(self._matcher.get_error())
