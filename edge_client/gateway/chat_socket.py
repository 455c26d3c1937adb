"""The WebSocket chat at /v1/chat/ws: several answers at once on one connection. `docs/chat.md` is its description.

Who may connect (key, Host, Origin) is decided by the gateway's middleware before anything here runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from edge_client.gateway.chat_messages import (
    SUBPROTOCOL,
    Cancel,
    Defaults,
    Delta,
    Done,
    FinishReason,
    Hello,
    Noise,
    Reply,
    Request,
    Send,
    Usage,
    error_message,
    id_of,
    parse_request,
    read_json,
)
from edge_client.gateway.owner import owner_of
from edge_client.gateway.service import Answer, AnswerService
from edge_client.generate import GenerationStats
from edge_client.usual_params import usual_params
from split_llama.errors import BadRequest, FlLlamaError, LimitExceeded, ServerFault, SlowReader
from split_llama.transport.address import ServerAddress

PATH = "/v1/chat/ws"
MAX_ANSWERS = 32
# A token is a message or two: this is half a minute of a fast answer that nobody reads.
MAX_UNSENT = 2000
USAGE_SECONDS = 0.2
CLOSING_SECONDS = 2.0

log = logging.getLogger(__name__)


def router(service: AnswerService) -> APIRouter:
    """Give the route of the chat; every connection gets answers from `service`."""
    routes = APIRouter()

    @routes.websocket(PATH)
    async def chat(websocket: WebSocket) -> None:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await _Connection(websocket, service).run()

    return routes


def greeting(service: AnswerService) -> Hello:
    """Say what answers here, and what of it runs where."""
    edge, settings = service.edge, service.settings
    card, partition = edge.source.card, edge.source.partition
    usual = usual_params(edge, settings).sampling
    return Hello(
        model=service.model,
        max_model_len=edge.max_length,
        partition=(partition.p, partition.q),
        blocks=card.num_hidden_layers,
        hidden_size=card.hidden_size,
        codec=settings.codec,
        noise=Noise(sigma=edge.noise.sigma, clip=edge.noise.clip, setting=settings.noise),
        server=ServerAddress.parse(settings.server_url()).base,
        defaults=Defaults(temperature=usual.temperature, top_p=usual.top_p, max_tokens=settings.max_new_tokens),
    )


class _Connection:
    """One socket: a reader, a writer, and a task per answer."""

    def __init__(self, websocket: WebSocket, service: AnswerService) -> None:
        self._websocket = websocket
        self._service = service
        self._unsent: asyncio.Queue[Reply] = asyncio.Queue(MAX_UNSENT)
        self._overflow = asyncio.Event()
        self._answers: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until the client leaves or does not read; whatever ends it ends its answers."""
        self._post(greeting(self._service))
        parts = [asyncio.create_task(part) for part in (self._read(), self._write(), self._wait_overflow())]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            mine = [*parts, *self._answers.values()]
            for task in mine:
                _cancel(task)
            ended = await asyncio.gather(*mine, return_exceptions=True)
        if self._overflow.is_set():
            with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
                async with asyncio.timeout(CLOSING_SECONDS):
                    await self._websocket.close(SlowReader.close_code or 1008, "the answers are not read")
        for fault in ended:
            if isinstance(fault, Exception) and not isinstance(fault, WebSocketDisconnect):
                log.error("a chat connection failed", exc_info=fault)

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text, raw = message.get("text"), None
            try:
                raw = _read(text)
                self._take(parse_request(raw))
            except FlLlamaError as error:
                self._post(error_message(error, id_of(text or "", raw)))
            # An answer must have begun before the next message may cancel it.
            await asyncio.sleep(0)

    def _take(self, request: Request) -> None:
        if isinstance(request, Cancel):
            if (task := self._answers.get(request.id)) is not None:
                _cancel(task)
            return
        if request.id in self._answers:
            raise BadRequest(f"an answer with the id {request.id!r} is under way; give every answer an id of its own")
        if len(self._answers) >= MAX_ANSWERS:
            raise LimitExceeded(f"{MAX_ANSWERS} answers run on this connection; wait for one", retry_after_ms=1000)
        task = asyncio.create_task(self._answer(request), name=f"chat {request.id}")
        self._answers[request.id] = task
        task.add_done_callback(lambda _: self._answers.pop(request.id, None))

    async def _write(self) -> None:
        while True:
            reply = await self._unsent.get()
            await self._websocket.send_text(reply.model_dump_json())

    async def _wait_overflow(self) -> None:
        await self._overflow.wait()

    def _post(self, reply: Reply) -> None:
        try:
            self._unsent.put_nowait(reply)
        except asyncio.QueueFull:
            self._overflow.set()

    async def _answer(self, request: Send) -> None:
        reason: FinishReason = "cancelled"
        usage = None
        try:
            async with self._started(request) as answer:
                try:
                    reason = await self._stream(request.id, answer)
                finally:
                    usage = _usage(request.id, answer)
        except asyncio.CancelledError:
            # By the client, who waits for `done`; or with the connection, and then nobody reads it.
            reason = "cancelled"
        except FlLlamaError as error:
            self._post(error_message(error, request.id))
            return
        except Exception:
            log.exception("an answer failed")
            fault = ServerFault("the gateway failed while it answered; its log says more")
            self._post(error_message(fault, request.id))
            return
        if usage is not None:
            self._post(usage)
        self._post(Done(id=request.id, finish_reason=reason))

    @contextlib.asynccontextmanager
    async def _started(self, request: Send) -> AsyncIterator[Answer]:
        messages = [message.model_dump() for message in request.messages]
        service = self._service
        params = usual_params(
            service.edge,
            service.settings,
            max_new_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        )
        # A long conversation takes the tokenizer a while, and the event loop never computes.
        ids = await service.prepare(lambda: service.chat_ids(messages))
        async with service.answer(ids, params, owner=owner_of(self._websocket.scope)) as answer:
            yield answer

    async def _stream(self, identifier: str, answer: Answer) -> FinishReason:
        said = time.monotonic()
        async with contextlib.aclosing(answer.events()) as events:
            async for event in events:
                self._post(Delta(id=identifier, text=event.text, tokens=1))
                if time.monotonic() - said >= USAGE_SECONDS:
                    said = time.monotonic()
                    self._post(_usage(identifier, answer))
        return answer.turn.finish_reason or "length"


def _read(text: str | None) -> object:
    if text is None:
        raise BadRequest("expected JSON in a text message, a binary one came. docs/chat.md describes all")
    return read_json(text)


def _cancel(task: asyncio.Task[None]) -> None:
    # Once only: a second cancellation would break off the cleaning up after the first.
    if not task.cancelling():
        task.cancel()


def _usage(identifier: str, answer: Answer) -> Usage:
    stats, tokens = answer.stats, len(answer.turn.tokens)
    return Usage(
        id=identifier,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        completion_tokens=tokens,
        round_trips=stats.round_trips,
        bytes_up=stats.bytes_up,
        bytes_down=stats.bytes_down,
        rows_up=stats.rows_up,
        drafted=stats.drafted,
        accepted=stats.accepted,
        tokens_per_second=round(_pace(stats, tokens), 2),
        ttft_ms=round(stats.ttft_ms, 2),
    )


def _pace(stats: GenerationStats, tokens: int) -> float:
    """Tokens a second after the first one; 0 while there is no second."""
    elapsed = stats.total_ms - stats.ttft_ms
    return (tokens - 1) * 1000 / elapsed if tokens > 1 and elapsed > 0 else 0.0
