"""The two protocols every link implements, and the bounded pipe that channels are made of."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from split_llama.errors import FlLlamaError, error_for_close

NORMAL_CLOSE = 1000
LINK_LOST = 1006
INTERNAL_ERROR = 1011
MAX_REASON_BYTES = 123  # RFC 6455, section 5.5: a close frame has 125 bytes, 2 of them the code


class ChannelClosed(Exception):
    """The channel is closed. `code` is a WebSocket close code: 1000 when asked for, 1006 when the link was lost."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def error(self) -> FlLlamaError:
        """Give the exception a user should see: what closed the channel on this side, or what the code stands for."""
        if isinstance(self.__cause__, FlLlamaError):
            return self.__cause__
        return error_for_close(self.code, self.reason)


class Channel(Protocol):
    """An open link that carries messages (frames back to back) in order, both ways."""

    async def send(self, message: bytes) -> None:
        """Queue one message; waits while the link is full. Raises `ChannelClosed`."""

    async def receive(self) -> bytes:
        """Give the next message. Raises `ChannelClosed` once the link is down and all that came is read."""

    async def close(self, code: int = NORMAL_CLOSE, reason: str = "") -> None:
        """Close the link; closing twice is allowed."""


class Transport(Protocol):
    """Something that opens channels to one server."""

    async def connect(self) -> Channel:
        """Open a channel. Raises `ServerUnreachable`, `NotAServer`, `Unauthenticated` or what the server answered."""


class Pipe:
    """A bounded queue of messages for one event loop, which can be closed from either end.

    What was put before closing can still be read. `asyncio.Queue` cannot be closed before Python 3.13.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._messages: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._end: tuple[int, str, BaseException | None] | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more can be put."""
        return self._end is not None

    async def put(self, message: bytes) -> None:
        """Append a message; waits while `limit` are queued. Raises `ChannelClosed`."""
        while self._end is None and len(self._messages) >= self._limit:
            await self._change()
        self._raise_if_closed()
        self._messages.append(message)
        self._changed.set()

    async def get(self) -> bytes:
        """Take the oldest message; waits for one. Raises `ChannelClosed` when closed and empty."""
        while self._end is None and not self._messages:
            await self._change()
        if not self._messages:
            self._raise_if_closed()
        self._changed.set()
        return self._messages.popleft()

    def take_more(self, max_bytes: int) -> list[bytes]:
        """Take further messages without waiting, as long as they have `max_bytes` together at most."""
        taken: list[bytes] = []
        while self._messages and len(self._messages[0]) <= max_bytes:
            taken.append(self._messages.popleft())
            max_bytes -= len(taken[-1])
        self._changed.set()
        return taken

    def close(self, code: int, reason: str, cause: BaseException | None = None) -> None:
        """End the pipe; the first end counts. `cause` is chained to each `ChannelClosed`."""
        if self._end is None:
            self._end = (code, reason, cause)
            self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _raise_if_closed(self) -> None:
        if self._end is not None:
            code, reason, cause = self._end
            raise ChannelClosed(code, reason) from cause


def short_reason(reason: str) -> str:
    """Cut a close reason to what a close frame can hold."""
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
