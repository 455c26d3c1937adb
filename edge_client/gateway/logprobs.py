"""Log-probabilities in OpenAI's two shapes: lists of a completion, objects of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_client.gateway.vocabulary import Vocabulary
from edge_client.tokenizer import EdgeTokenizer
from edge_client.turn import TokenEvent, TokenLogprobs


class CompletionLogprobs:
    """tokens, token_logprobs, top_logprobs and text_offset of one choice; `take` gives what came since."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._offset = 0
        self._lists: dict[str, list[Any]] = _empty()

    def prompt(self, ids: Sequence[int], scored: Sequence[TokenLogprobs], tokenizer: EdgeTokenizer) -> None:
        """Add an echoed prompt. Its first token is predicted by nothing: it has null."""
        stream = tokenizer.stream()
        for token, logprobs in zip(ids, (None, *scored), strict=True):
            text = stream.push(token)
            self._add(token, logprobs, len(text))
        self._offset += len(stream.flush())

    def event(self, event: TokenEvent) -> None:
        """Add a token of the answer."""
        self._add(event.token, event.logprobs, len(event.text))

    def take(self) -> dict[str, list[Any]]:
        """Give the lists and begin new ones."""
        lists, self._lists = self._lists, _empty()
        return lists

    def _add(self, token: int, logprobs: TokenLogprobs | None, length: int) -> None:
        lists, name = self._lists, self._vocabulary.text_of
        lists["tokens"].append(name(token))
        lists["token_logprobs"].append(logprobs.logprob if logprobs is not None else None)
        lists["text_offset"].append(self._offset)
        self._offset += length
        if logprobs is None:
            lists["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        # The token itself belongs to its own list. Of two tokens with one text the likelier one speaks for both.
        for other, logprob in (*logprobs.top, (token, logprobs.logprob)):
            top[name(other)] = max(logprob, top.get(name(other), logprob))
        lists["top_logprobs"].append(top)


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def chat_logprobs(event: TokenEvent, vocabulary: Vocabulary) -> dict[str, Any]:
    """Give one entry of a chat's `logprobs.content`."""
    assert event.logprobs is not None, "the turn was asked for log-probabilities"
    entry = _token(event.token, event.logprobs.logprob, vocabulary)
    top = [_token(token, logprob, vocabulary) for token, logprob in event.logprobs.top]
    return {**entry, "top_logprobs": top}


def _token(token: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    data = vocabulary.bytes_of(token)
    return {"token": vocabulary.text_of(token), "logprob": logprob, "bytes": list(data)}
