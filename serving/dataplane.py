"""Frames over WebSocket and over POST: a thin layer between sockets and `Connection`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response, WebSocket, WebSocketDisconnect

from serving.connection import Connection
from serving.core import Core, Stage
from serving.keys import Principal
from serving.replies import error_response
from split_llama.errors import (
    BadFrame,
    BadRequest,
    ConnectionRefused,
    Draining,
    FlLlamaError,
    FrameTooLarge,
    LimitExceeded,
    NotOwner,
    SlowReader,
)
from split_llama.transport.base import INTERNAL_ERROR, LINK_LOST, NORMAL_CLOSE, Channel, ChannelClosed, short_reason
from split_llama.wire.control import error_frame

SEND_SECONDS = 20.0
SENT_BYTES = 256 * 1024
CLOSE_SECONDS = 3.0
GOING_AWAY = 1001  # RFC 6455, section 7.4.1
# How long a POST is held back: while it is, its client sends nothing, and its other sessions wait.
POST_SECONDS = 1.0
# An answer to POST ends after so many bytes: putting it together keeps the event loop.
POST_BYTES = 4 * 2**20
IDLE_POST_SECONDS = 60.0
CONNECTION_HEADER = "X-FL-Connection"
PENDING_HEADER = "X-FL-Pending"
FRAMES_TYPE = "application/octet-stream"
_CONNECTION_ID = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger("fl_llama.server")


class WebSocketChannel:
    """A `Channel` over an accepted WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send(self, message: bytes) -> None:
        """Send one binary message; waits while the socket's buffer is full. Raises `ChannelClosed`."""
        try:
            await self._socket.send_bytes(message)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ChannelClosed(LINK_LOST, "the connection was lost") from error

    async def receive(self) -> bytes:
        """Give the next message. Raises `ChannelClosed`, and `BadFrame` for a text message."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise ChannelClosed(message.get("code", LINK_LOST), message.get("reason") or "")
        if message.get("bytes") is None:
            raise BadFrame("expected binary messages of frames, a text message came")
        return bytes(message["bytes"])

    async def close(self, code: int = NORMAL_CLOSE, reason: str = "") -> None:
        """Close; doing so twice is allowed."""
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self._socket.close(code, short_reason(reason))


async def serve_channel(
    core: Core, channel: Channel, principal: Principal, connection: Connection | None = None
) -> None:
    """Carry frames between a channel and a connection until either side ends. Sessions live on for the grace period."""
    connection = connection or Connection(core, principal)
    core.connections.add(connection)
    tasks = [
        asyncio.create_task(_read(channel, connection), name="reader"),
        asyncio.create_task(_write(core, channel, connection), name="writer"),
        asyncio.create_task(core.closing.wait(), name="closing"),
        asyncio.create_task(_watch(connection), name="watch"),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failure = next((error for task in done if (error := task.exception()) is not None), None)
        await _stop(tasks[:1])
        if failure is None:
            # An orderly end: what was computed is still delivered.
            connection.outbox.finish()
            await asyncio.wait(tasks[1:2], timeout=CLOSE_SECONDS)
        await _stop(tasks)
        await _farewell(core, channel, connection, failure)
    finally:
        await _stop(tasks)
        core.connections.discard(connection)
        connection.detach()


async def _stop(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _read(channel: Channel, connection: Connection) -> None:
    while True:
        await connection.receive(await channel.receive())


async def _write(core: Core, channel: Channel, connection: Connection) -> None:
    # Smaller than what may be announced: a slow link gets through one message in SEND_SECONDS.
    limit = min(core.hosted.max_message_bytes, SENT_BYTES)
    while await connection.outbox.wait():
        message = connection.outbox.take(limit)
        connection.sending_since = time.monotonic()
        await channel.send(message)
        connection.sending_since = None
        core.metrics.bytes_out.inc(len(message))


async def _watch(connection: Connection) -> None:
    """Wait until a message has been under way for too long: a timer for every message would cost more than sending."""
    while True:
        await asyncio.sleep(SEND_SECONDS / 10)
        since = connection.sending_since
        if since is not None and time.monotonic() - since > SEND_SECONDS:
            raise SlowReader(f"a reply was not read within {SEND_SECONDS:g} seconds; ATTACH again")


async def _farewell(core: Core, channel: Channel, connection: Connection, failure: BaseException | None) -> None:
    """Say why the connection ends, as far as the peer still listens."""
    if isinstance(failure, ChannelClosed):
        return
    if failure is None:
        code, reason, frame = GOING_AWAY, "the server is shutting down", None
    elif isinstance(failure, FlLlamaError):
        core.count_refusal(failure)
        code, reason = failure.close_code or INTERNAL_ERROR, failure.message
        frame = None if isinstance(failure, SlowReader) else error_frame(0, 0, failure)
        log.info("connection refused error=%s", type(failure).__name__)
    else:
        code, reason, frame = INTERNAL_ERROR, "the server failed; its log says more", None
        log.error("connection failed", exc_info=failure)
    with contextlib.suppress(TimeoutError, ChannelClosed):
        async with asyncio.timeout(CLOSE_SECONDS):
            if frame is not None:
                await channel.send(frame.encode())
            await channel.close(code, reason)


class PostConnections:
    """Connections named by a header, over many POSTs. They lapse when nothing is posted for a while."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._connections: dict[str, Connection] = {}
        self._used: dict[str, float] = {}

    def find(self, name: str, principal: Principal) -> Connection:
        """Give the connection of this name, a new one if it is unknown. Raises `NotOwner`, `LimitExceeded`."""
        self.lapse()
        connection = self._connections.get(name)
        if connection is None:
            if len(self._connections) >= self._core.settings.max_sessions:
                raise LimitExceeded("too many HTTP connections are open; try again later", retry_after_ms=2000)
            connection = self._connections[name] = Connection(self._core, principal)
        elif connection.principal.owner != principal.owner:
            raise NotOwner("the connection belongs to another owner: draw a new random name")
        self._used[name] = self._core.clock()
        return connection

    def drop(self, name: str) -> None:
        """End a connection; its sessions live on for the grace period."""
        connection = self._connections.pop(name, None)
        self._used.pop(name, None)
        if connection is not None:
            connection.detach()

    def lapse(self) -> None:
        """Drop the connections on which nothing was posted for `IDLE_POST_SECONDS`."""
        horizon = self._core.clock() - IDLE_POST_SECONDS
        for name in [name for name, used in self._used.items() if used < horizon]:
            self.drop(name)


def make_router(core: Core) -> APIRouter:
    """The routes of the data plane."""
    router = APIRouter()
    posted = PostConnections(core)
    core.on_sweep(posted.lapse)

    @router.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        try:
            principal = core.keys.authenticate(socket.headers.get("authorization"))
            _check_open(core)
        except FlLlamaError as error:
            core.count_refusal(error)
            await socket.send_denial_response(error_response(error))
            return
        await socket.accept()
        await serve_channel(core, WebSocketChannel(socket), principal)

    @router.post("/v1/frames", response_class=Response, summary="Frames by POST, where WebSocket is blocked")
    async def frames(request: Request) -> Response:
        principal = core.keys.authenticate(request.headers.get("authorization"))
        _check_open(core)
        name = request.headers.get(CONNECTION_HEADER, "")
        if not _CONNECTION_ID.fullmatch(name):
            raise BadRequest(f"the header {CONNECTION_HEADER} must hold 32 hex digits that the client drew")
        connection = posted.find(name, principal)
        body = await _read_body(request, core.hosted.max_message_bytes)
        try:
            handles = await connection.receive(body)
            await _wait_for_answers(connection, handles)
            answer = b"".join(_drain(connection, core.hosted.max_message_bytes))
        except ConnectionRefused:
            posted.drop(name)
            raise
        core.metrics.bytes_out.inc(len(answer))
        headers = {PENDING_HEADER: "1"} if connection.is_busy else {}
        if not answer:
            return Response(status_code=204, headers=headers)
        return Response(answer, media_type=FRAMES_TYPE, headers=headers)

    return router


def _check_open(core: Core) -> None:
    _ = core.hosted
    if core.stage is Stage.DRAINING:
        raise Draining("the server is shutting down; connect again in a moment", retry_after_ms=1000)


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise FrameTooLarge(f"a body may have {limit} bytes; send the frames in several requests")
    return bytes(body)


async def _wait_for_answers(connection: Connection, handles: set[int]) -> None:
    """Wait for the answers of one body; without a body for any frame, as long as answers are to come."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(POST_SECONDS):
            if handles:
                await connection.wait_answered(handles)
            elif connection.is_busy:
                await connection.outbox.wait()


def _drain(connection: Connection, limit: int) -> Iterator[bytes]:
    """Give what waits, as much of it as one answer may hold; what is left is fetched with the next."""
    room = POST_BYTES
    while room > 0 and (message := connection.outbox.take(limit)):
        room -= len(message)
        yield message
