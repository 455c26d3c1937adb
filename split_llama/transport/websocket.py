"""Frames over one WebSocket: the normal case."""

from __future__ import annotations

import asyncio
import contextlib
import ssl as ssl_module
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)

from split_llama.errors import FlLlamaError, NotAServer, UsageError
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.backlog import backlog, keep_unsent_short
from split_llama.transport.base import LINK_LOST, NORMAL_CLOSE, Channel, ChannelClosed, short_reason
from split_llama.transport.liveness import Liveness, Verdict

DEFAULT_MAX_MESSAGE_BYTES = 16 * 2**20
# Codes this side sends because of what the peer did (RFC 6455, section 7.4.1): they tell more than "link lost".
_PEER_FAULTS = frozenset({1002, 1003, 1007, 1009})


@dataclass(frozen=True)
class WebSocketTransport:
    """Opens WebSockets to `url` (`http(s)://host:port[/root-path]`).

    `ssl` replaces the default context of https; proxies of the environment are honoured; redirects are not followed,
    since hidden states go where the user said and nowhere else. Times are seconds. After `quiet_seconds` without a sign
    of life the server is pinged; a link that stays silent for `pong_seconds` more is given up as lost.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    ssl: ssl_module.SSLContext | None = None
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    open_timeout: float = 10.0
    quiet_seconds: float = 10.0
    pong_seconds: float = 5.0
    close_timeout: float = 2.0

    async def connect(self) -> Channel:
        """Open a channel. Raises `ServerUnreachable`, `NotAServer`, `Unauthenticated`, `UsageError` on a bad URL."""
        address = ServerAddress.parse(self.url)
        tls: dict[str, Any] = {"ssl": self.ssl} if address.secure and self.ssl else {}
        try:
            connection = await _Connect(
                address.stream,
                additional_headers=authorization(self.api_key),
                user_agent_header="fl-llama",
                compression=None,
                max_size=self.max_message_bytes,
                open_timeout=self.open_timeout,
                # Its own pings take a slow line for a dead one: see `Liveness`.
                ping_interval=None,
                close_timeout=self.close_timeout,
                create_connection=_Connection,
                **tls,
            )
        except (OSError, InvalidHandshake, InvalidProxy, InvalidURI, EOFError, ImportError) as failure:
            raise _explain(address.base, failure) from failure
        assert isinstance(connection, _Connection)
        keep_unsent_short(connection.transport)
        return WebSocketChannel(connection, self.quiet_seconds, self.pong_seconds)


class WebSocketChannel:
    """A channel over an open WebSocket of the `websockets` library."""

    def __init__(self, connection: _Connection, quiet_seconds: float, pong_seconds: float) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._liveness = Liveness(quiet_seconds, pong_seconds, self._loop.time())
        self._silence: str | None = None
        self._watcher = self._loop.create_task(self._watch(), name="websocket-watcher")
        connection.hears = lambda: self._liveness.heard(self._loop.time())

    async def send(self, message: bytes) -> None:
        """Send one binary message; waits while the socket's buffer is full."""
        try:
            await self._connection.send(message)
        except ConnectionClosed as closed:
            raise self._closed(closed) from closed

    async def receive(self) -> bytes:
        """Give the next message; a text message is given as its bytes, which are no frame."""
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed as closed:
            raise self._closed(closed) from closed

    async def close(self, code: int = NORMAL_CLOSE, reason: str = "") -> None:
        """Close with the handshake of RFC 6455; waits `close_timeout` at most."""
        self._watcher.cancel()
        await self._connection.close(code, short_reason(reason))

    async def _watch(self) -> None:
        """Ping when it is too quiet; break off when nothing comes back."""
        silent_for = self._liveness.quiet + self._liveness.patience
        while (verdict := self._liveness.look(self._loop.time(), backlog(self._connection.transport))) != Verdict.DEAD:
            if verdict is Verdict.PING:
                # It waits for room in the buffer, and on a dead link there may be none.
                with contextlib.suppress(TimeoutError, ConnectionClosed):
                    async with asyncio.timeout(self._liveness.interval):
                        await self._connection.ping()
            await asyncio.sleep(self._liveness.interval)
        self._silence = f"nothing came from the server for {silent_for:.0f} seconds, not even the answer to a ping"
        self._connection.transport.abort()

    def _closed(self, closed: ConnectionClosed) -> ChannelClosed:
        self._watcher.cancel()
        if closed.rcvd is not None:
            return ChannelClosed(closed.rcvd.code, closed.rcvd.reason)
        if closed.sent is not None and closed.sent.code in _PEER_FAULTS:
            return ChannelClosed(closed.sent.code, closed.sent.reason)
        lost = closed.sent.reason if closed.sent is not None else "the connection was lost"
        return ChannelClosed(LINK_LOST, self._silence or lost)


class _Connection(ClientConnection):
    """Tells when bytes come, before they make a message."""

    hears: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        if self.hears is not None:
            self.hears()
        super().data_received(data)


class _Connect(connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def _explain(url: str, failure: BaseException) -> FlLlamaError:
    if isinstance(failure, InvalidStatus):
        response = failure.response
        headers, body = response.headers, bytes(response.body or b"")
        content_type, retry_after = headers.get("Content-Type", ""), headers.get("Retry-After", "")
        return failures.refused(url, response.status_code, content_type, body, retry_after)
    if isinstance(failure, InvalidProxy | ImportError):
        return UsageError(f"{url}: the proxy of the environment cannot be used: {failure}")
    if isinstance(failure, ProxyError):
        return failures.unreachable(url, failure)
    if isinstance(failure, InvalidMessage):
        broken_off = isinstance(failure.__cause__, EOFError | OSError)
        return failures.unreachable(url, failure) if broken_off else failures.not_http(url)
    if isinstance(failure, InvalidHandshake | InvalidURI):
        return NotAServer(f"{url} accepts no WebSocket as a split-server does: {failure}")
    return failures.unreachable(url, failure)
