"""One answer as it grows: sampling, text, and when to stop. Runs in the worker's thread; no clock, no socket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from edge_client.sampling import Sampler, SamplingParams
from edge_client.stop import StopStrings
from edge_client.tokenizer import EdgeTokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token; `text` is what became readable with it, often empty inside a character or a stop string."""

    token: int
    text: str
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one answer is made. `max_new_tokens` is cut to what the context leaves."""

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()


class Turn:
    """The state of one answer. `tokens` holds what was generated, a closing EOS included."""

    def __init__(
        self, params: GenerationParams, prompt_ids: Sequence[int], room: int, tokenizer: EdgeTokenizer | None
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._limit = min(params.max_new_tokens, room)
        self._eos = frozenset(params.eos_token_ids)
        self._sampler = Sampler(params.sampling, prompt_ids)
        self._stops = StopStrings(params.stop)
        self._stream = tokenizer.stream(prompt_ids) if tokenizer is not None else None
        self._pieces: list[str] = []
        self._events: list[TokenEvent] = []

    def choose(self, logits: Tensor) -> tuple[int, ...]:
        """Take the next token from `logits [vocab]`; give what to feed next, nothing when the answer is over."""
        token = self._sampler.choose(logits)
        self.tokens.append(token)
        feed = self._follow(token)
        text = "".join(self._pieces)
        self._pieces.clear()
        self._events.append(TokenEvent(token, text, self.finish_reason))
        return feed

    def take_events(self) -> list[TokenEvent]:
        """Give the tokens chosen since the last call."""
        events, self._events = self._events, []
        return events

    def _follow(self, token: int) -> tuple[int, ...]:
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            self._show(self._stream.push(token) if self._stream is not None else "")
            if self._stops.found is not None:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self._limit:
                self.finish_reason = "length"
        if self.finish_reason is None:
            return (token,)
        if self._stream is not None:
            self._show(self._stream.flush())
        self._pieces.append(self._stops.flush())
        if self._stops.found is not None:
            self.finish_reason = "stop"
        return ()

    def _show(self, text: str) -> None:
        self._pieces.append(self._stops.push(text))
