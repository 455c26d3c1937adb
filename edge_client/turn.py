"""One answer as it grows: sampling, text, and when to stop. Runs in the worker's thread; no clock, no socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from edge_client.constraint import Constraint
from edge_client.sampling import Sampler, SamplingParams
from edge_client.stop import StopStrings
from edge_client.tokenizer import EdgeTokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was by the model alone (before penalties, temperature and grammar), and the likeliest ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token; `text` is what became readable with it, often empty inside a character or a stop string."""

    token: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one answer is made. `max_new_tokens` is cut to what the context leaves; 0 only scores the prompt.

    `logprobs` and `prompt_logprobs` say how many alternatives to give with each token of the answer and of the prompt
    (0: only the token's own; None: nothing). `constraint` makes the state of a grammar that the answer is held to.
    """

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None


class Turn:
    """The state of one answer. `tokens` holds what was generated, a closing EOS included.

    `prompt_logprobs` grows with `see_prompt`: one entry per prompt token but the first, which nothing predicts.
    """

    def __init__(
        self, params: GenerationParams, prompt_ids: Sequence[int], room: int, tokenizer: EdgeTokenizer | None
    ) -> None:
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._limit = min(params.max_new_tokens, room)
        self._eos = frozenset(params.eos_token_ids)
        self._sampler = Sampler(params.sampling, prompt_ids)
        self._stops = StopStrings(params.stop)
        self._stream = tokenizer.stream(prompt_ids) if tokenizer is not None else None
        self._constraint = params.constraint() if params.constraint is not None else None
        self._logprobs = params.logprobs
        self._prompt_logprobs = params.prompt_logprobs
        self._prompt = tuple(prompt_ids) if params.prompt_logprobs is not None else ()
        self._pieces: list[str] = []
        self._events: list[TokenEvent] = []
        if self._limit == 0 and not self.wants_prompt_logits:
            self.finish_reason = "length"

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the prompt is to be scored: then every position's logits go to `see_prompt`."""
        return self._prompt_logprobs is not None

    def see_prompt(self, first: int, logits: Tensor) -> None:
        """Take `logits [n, vocab]` of the prompt's positions from `first` on, in order; the last one's predict the
        answer's first token."""
        assert self._prompt_logprobs is not None, "nobody asked for the prompt's logits"
        following = self._prompt[first + 1 : first + 1 + len(logits)]
        self.prompt_logprobs += score(logits[: len(following)], following, self._prompt_logprobs)
        if self._limit == 0 and first + len(logits) >= len(self._prompt):
            self.finish_reason = "length"

    def choose(self, logits: Tensor) -> tuple[int, ...]:
        """Take the next token from `logits [vocab]`; give what to feed next, nothing when the answer is over."""
        scores = logits if self._constraint is None else self._constraint.mask(logits)
        token = self._sampler.choose(scores)
        self.tokens.append(token)
        feed = self._follow(token)
        text = "".join(self._pieces)
        self._pieces.clear()
        logprobs = None if self._logprobs is None else score(logits[None], (token,), self._logprobs)[0]
        self._events.append(TokenEvent(token, text, self.finish_reason, logprobs))
        return feed

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return self._limit - len(self.tokens)

    def take_events(self) -> list[TokenEvent]:
        """Give the tokens chosen since the last call."""
        events, self._events = self._events, []
        return events

    def _follow(self, token: int) -> tuple[int, ...]:
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            self._show(self._stream.push(token) if self._stream is not None else "")
            if self._stops.found is not None or self._completes(token):
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

    def _completes(self, token: int) -> bool:
        if self._constraint is None:
            return False
        self._constraint.take(token)
        return self._constraint.finished

    def _show(self, text: str) -> None:
        self._pieces.append(self._stops.push(text))


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprobs]:
    """Give each row's token and the likeliest `alternatives` their log-probabilities; `logits [n, vocab]` float32."""
    if not tokens:
        return []
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(alternatives, logits.shape[1]), dim=-1)
    rows = zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprobs(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in rows]
