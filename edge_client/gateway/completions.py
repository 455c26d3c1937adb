"""POST /v1/completions: a prompt continued, or only scored."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.errors import json_response
from edge_client.gateway.logprobs import CompletionLogprobs
from edge_client.gateway.owner import owner_of
from edge_client.gateway.requests import CompletionRequest
from edge_client.gateway.runs import Item, Job, Runner, collect, make_params
from edge_client.gateway.service import Answer, AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.streaming import EventStream, sse, unless_gone
from edge_client.tokenizer import EdgeTokenizer
from edge_client.turn import TokenLogprobs

# OpenAI's default.
MAX_TOKENS = 16


async def complete(
    service: AnswerService, gateway: GatewaySettings, body: CompletionRequest, request: Request
) -> Response:
    """Answer the route. Raises `FlLlamaError`."""
    body.check()
    include_usage = body.include_usage()
    owner = owner_of(request.scope)
    run = await service.prepare(lambda: _Run(service, gateway, body, owner))
    if body.stream:
        return EventStream(run.chunks(include_usage), gateway.reader_timeout)
    return await unless_gone(request, run.whole())


class _Run:
    """One request under way."""

    def __init__(self, service: AnswerService, gateway: GatewaySettings, body: CompletionRequest, owner: str) -> None:
        self._service = service
        self._echo = bool(body.echo)
        echoes, jobs = [], []
        scored = body.logprobs if self._echo else None
        limit = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = make_params(service, gateway, body, limit, logprobs=body.logprobs, prompt_logprobs=scored)
        for prompt in body.prompts():
            if isinstance(prompt, str):
                ids = service.edge.tokenizer.encode(prompt, special_tokens=body.add_special_tokens is not False)
            else:
                ids = prompt
            # What cannot be answered is refused before anything is.
            service.edge.turn(ids, params[0])
            jobs.append(Job(ids, params))
            echoes.append(self._echoed(prompt))
        self._runner = Runner(service, gateway, jobs, owner)
        self._choices: list[_Choice] = []
        for job, echo in zip(jobs, echoes, strict=True):
            # One choice scores the prompt for all.
            prompt_scores: list[TokenLogprobs] = []
            for _ in params:
                logprobs = CompletionLogprobs(service.vocabulary) if body.logprobs is not None else None
                about = _Prompt(job.ids, echo, prompt_scores)
                self._choices.append(_Choice(len(self._choices), about, logprobs, service.edge.tokenizer))
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
        }

    def _echoed(self, prompt: str | list[int]) -> str | None:
        if not self._echo:
            return None
        return prompt if isinstance(prompt, str) else self._service.edge.tokenizer.decode(prompt)

    async def whole(self) -> Response:
        """Give the answer in one piece."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        await collect(self._runner, lambda index, item: parts[index].extend(self._choices[index].take(item)))
        choices = [_join(pieces) for pieces in parts]
        return json_response({**self._head, "choices": choices, "usage": self._runner.usage()})

    async def chunks(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Give it piece by piece."""
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        async with contextlib.aclosing(self._runner.items()) as items:
            async for index, item in items:
                for piece in self._choices[index].take(item):
                    yield sse({**self._head, "choices": [piece], **extra})
        if include_usage:
            yield sse({**self._head, "choices": [], "usage": self._runner.usage()})


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt, its text where that is echoed, and its scores once they are there."""

    ids: list[int]
    echo: str | None
    scores: list[TokenLogprobs]


class _Choice:
    """Turns the items of one choice into pieces of OpenAI's choice object."""

    def __init__(
        self, index: int, prompt: _Prompt, logprobs: CompletionLogprobs | None, tokenizer: EdgeTokenizer
    ) -> None:
        self._index = index
        self._prompt = prompt
        self._logprobs = logprobs
        self._tokenizer = tokenizer

    def take(self, item: Item) -> list[dict[str, Any]]:
        """Give the pieces that an item makes, often none."""
        if isinstance(item, Answer):
            return self._begin(item)
        if self._logprobs is not None:
            self._logprobs.event(item)
        if not item.text and self._logprobs is None and item.finish_reason is None:
            return []
        return [self._piece(item.text, item.finish_reason)]

    def _begin(self, answer: Answer) -> list[dict[str, Any]]:
        finish_reason = answer.turn.finish_reason if not answer.turn.tokens else None
        prompt = self._prompt
        if prompt.echo is None:
            return [self._piece("", finish_reason)] if finish_reason is not None else []
        if self._logprobs is not None:
            prompt.scores.extend(answer.turn.prompt_logprobs)
            self._logprobs.prompt(prompt.ids, prompt.scores, self._tokenizer)
        return [self._piece(prompt.echo, finish_reason)]

    def _piece(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs.take() if self._logprobs is not None else None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _join(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Make one choice of its pieces."""
    whole = dict(pieces[-1])
    whole["text"] = "".join(piece["text"] for piece in pieces)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: [value for piece in pieces for value in piece["logprobs"][name]] for name in whole["logprobs"]
        }
    return whole
