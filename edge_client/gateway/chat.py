"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_client.gateway.chat_plan import ChatPlan, plan_chat
from edge_client.gateway.errors import json_response
from edge_client.gateway.logprobs import chat_logprobs
from edge_client.gateway.owner import owner_of
from edge_client.gateway.requests import ChatRequest
from edge_client.gateway.runs import Item, Runner, collect
from edge_client.gateway.service import Answer, AnswerService
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.streaming import EventStream, sse, unless_gone
from edge_client.gateway.tool_calls import CallPiece, CallReader
from edge_client.gateway.vocabulary import Vocabulary
from edge_client.turn import TokenEvent

Delta = dict[str, Any]


async def chat(service: AnswerService, gateway: GatewaySettings, body: ChatRequest, request: Request) -> Response:
    """Answer the route. Raises `FlLlamaError`."""
    body.check()
    include_usage = body.include_usage()
    plan = await service.prepare(lambda: plan_chat(service, gateway, body))
    run = _Run(service, gateway, plan, owner_of(request.scope))
    if body.stream:
        return EventStream(run.chunks(include_usage), gateway.reader_timeout)
    return await unless_gone(request, run.whole())


class _Run:
    """One request under way."""

    def __init__(self, service: AnswerService, gateway: GatewaySettings, plan: ChatPlan, owner: str) -> None:
        self._runner = Runner(service, gateway, [plan.job], owner)
        readers = [plan.tools.reader() if plan.tools is not None else None for _ in plan.job.params]
        self._choices = [_Choice(service.vocabulary, reader) for reader in readers]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model,
        }

    async def whole(self) -> Response:
        """Give the answer in one piece."""
        await collect(self._runner, lambda index, item: self._choices[index].take(item))
        choices = [choice.whole(index) for index, choice in enumerate(self._choices)]
        body = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._runner.usage()}
        return json_response(body)

    async def chunks(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Give it piece by piece."""
        head = {**self._head, "object": "chat.completion.chunk"}
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        async with contextlib.aclosing(self._runner.items()) as items:
            async for index, item in items:
                for piece in self._choices[index].take(item):
                    yield sse({**head, "choices": [{"index": index, **piece}], **extra})
        if include_usage:
            yield sse({**head, "choices": [], "usage": self._runner.usage()})


class _Choice:
    """Turns the items of one choice into the pieces of a stream, and keeps what the whole message needs."""

    def __init__(self, vocabulary: Vocabulary, reader: CallReader | None) -> None:
        self._vocabulary = vocabulary
        self._reader = reader
        self._text: list[str] = []
        self._calls: list[Delta] = []
        self._logprobs: list[Delta] = []
        self._has_logprobs = False
        self._finish_reason: str | None = None

    def take(self, item: Item) -> list[Delta]:
        """Give the pieces that an item makes, often none."""
        if isinstance(item, Answer):
            return [_piece({"role": "assistant", "content": ""})]
        deltas = [self._delta(part) for part in self._read(item) if part]
        logprobs = None
        if item.logprobs is not None:
            self._has_logprobs = True
            entry = chat_logprobs(item, self._vocabulary)
            self._logprobs.append(entry)
            logprobs = {"content": [entry], "refusal": None}
            deltas = deltas or [{"content": ""}]
        pieces = [_piece(delta, logprobs if place == 0 else None) for place, delta in enumerate(deltas)]
        if item.finish_reason is not None:
            self._finish_reason = self._reason(item.finish_reason)
            pieces.append(_piece({}, None, self._finish_reason))
        return pieces

    def whole(self, index: int) -> Delta:
        """Give the choice in one piece."""
        text = "".join(self._text)
        message: Delta = {"role": "assistant", "content": text if text or not self._calls else None, "refusal": None}
        if self._calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in self._calls]
        logprobs = {"content": self._logprobs, "refusal": None} if self._has_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._finish_reason}

    def _read(self, event: TokenEvent) -> list[str | CallPiece]:
        if self._reader is None:
            return [event.text]
        parts = self._reader.push(event.text)
        return parts + self._reader.flush() if event.finish_reason is not None else parts

    def _delta(self, part: str | CallPiece) -> Delta:
        if isinstance(part, str):
            self._text.append(part)
            return {"content": part}
        if part.name is None:
            self._calls[part.index]["function"]["arguments"] += part.arguments
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        self._calls.append({**call, "function": {"name": part.name, "arguments": ""}})
        return {"tool_calls": [{"index": part.index, **call, "function": {"name": part.name, "arguments": ""}}]}

    def _reason(self, reason: str) -> str:
        reader = self._reader
        return (
            "tool_calls"
            if reason == "stop" and reader is not None and reader.calls and not reader.is_inside
            else reason
        )


def _piece(delta: Delta, logprobs: Delta | None = None, finish_reason: str | None = None) -> Delta:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
