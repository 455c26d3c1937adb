"""One connection through an emulated link: two transports, and a lane each way between them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Literal, Protocol, cast

from loadtest.link_wire import Lane

Direction = Literal["up", "down"]
SOCKET_BUFFER = 128 * 1024
WRITE_BUFFER = 64 * 1024


class Switchboard(Protocol):
    """What a connection asks of the proxy it belongs to."""

    def admit(self, pair: Pair) -> int | None:
        """Take a new connection, and give its number; `None` while they are refused."""

    def forget(self, pair: Pair) -> None:
        """Both ends of a connection are gone."""

    def lane(self, direction: Direction, source: asyncio.Transport, sink: asyncio.Transport) -> Lane:
        """Make one direction of a connection."""

    def saw(self, number: int, direction: Direction, data: bytes) -> None:
        """Hear of what was read."""

    async def reach(self, pair: Pair) -> asyncio.Transport:
        """Connect to the target. Raises `OSError`."""


class Pair:
    """One connection: the client's transport, the target's, and the two lanes between them."""

    def __init__(self, board: Switchboard) -> None:
        self._board = board
        self._number = 0
        self._client: asyncio.Transport | None = None
        self._target: asyncio.Transport | None = None
        self._lanes: dict[Direction, Lane] = {}
        self._halves_closed = 0
        self.joining: asyncio.Task[None] | None = None

    def made(self, transport: asyncio.Transport) -> None:
        """A side is connected: the client's first, then the target's."""
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        # Read when there is a lane for what comes.
        transport.pause_reading()
        if self._client is not None:
            return  # the target's: `_join` goes on
        self._client = transport
        number = self._board.admit(self)
        if number is None:
            reset(transport)
            return
        self._number = number
        self.joining = asyncio.get_running_loop().create_task(self._join(transport), name="link-proxy-connect")

    async def _join(self, client: asyncio.Transport) -> None:
        try:
            target = await self._board.reach(self)
        except OSError:
            self.reset()
            return
        if client.is_closing():
            reset(target)
            return
        self._target = target
        self._lanes = {
            "up": self._board.lane("up", client, target),
            "down": self._board.lane("down", target, client),
        }
        client.resume_reading()
        target.resume_reading()

    def came(self, transport: asyncio.Transport, data: bytes) -> None:
        """Bytes came from a side."""
        direction = self._from(transport)
        self._board.saw(self._number, direction, data)
        if lane := self._lanes.get(direction):
            lane.feed(data)

    def ended(self, transport: asyncio.Transport) -> None:
        """A side will send no more."""
        if lane := self._lanes.get(self._from(transport)):
            lane.feed_end(self._close_half)

    def full(self, transport: asyncio.Transport, full: bool) -> None:
        """A side's buffer is full, or empty again."""
        if lane := self._lanes.get("down" if transport is self._client else "up"):
            lane.block(full)

    def lost(self, transport: asyncio.Transport, failure: Exception | None) -> None:
        """One of the two is gone; by a reset, the other shall hear of it after the delay."""
        into = self._lanes.pop("down" if transport is self._client else "up", None)
        if into is not None:
            into.close()
        out = self._lanes.get(self._from(transport))
        if out is not None and failure is not None:
            out.feed_end(reset)
        if self.joining is not None:
            self.joining.cancel()
        if not self._lanes or self._target is None:
            self._board.forget(self)

    def freeze(self) -> None:
        """Let nothing arrive any more."""
        for lane in self._lanes.values():
            lane.freeze()

    def reset(self) -> None:
        """End both sides at once."""
        for transport in (self._client, self._target):
            if transport is not None:
                reset(transport)
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        if self.joining is not None:
            self.joining.cancel()
        self._board.forget(self)

    def _close_half(self, sink: asyncio.Transport) -> None:
        with contextlib.suppress(OSError):
            sink.write_eof()
        self._halves_closed += 1
        if self._halves_closed == 2:
            for transport in (self._client, self._target):
                if transport is not None:
                    transport.close()

    def _from(self, transport: asyncio.Transport) -> Direction:
        return "up" if transport is self._client else "down"


class Side(asyncio.Protocol):
    """Tells the pair what happens to one of its two transports."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass it on."""
        self._transport = cast(asyncio.Transport, transport)
        self._pair.made(self._transport)

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        assert self._transport is not None
        self._pair.came(self._transport, data)

    def eof_received(self) -> bool:
        """Pass it on; the other direction lives."""
        assert self._transport is not None
        self._pair.ended(self._transport)
        return True

    def pause_writing(self) -> None:
        """Pass it on."""
        assert self._transport is not None
        self._pair.full(self._transport, True)

    def resume_writing(self) -> None:
        """Pass it on."""
        assert self._transport is not None
        self._pair.full(self._transport, False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on."""
        assert self._transport is not None
        self._pair.lost(self._transport, exc)


def make_socket(family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    """Make a socket without Nagle's wait, and with buffers that do not hide the link's own queue."""
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def reset(transport: asyncio.Transport) -> None:
    """End a connection as a broken one ends: by a reset, whatever was under way."""
    connection = transport.get_extra_info("socket")
    if connection is not None and not transport.is_closing():
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
