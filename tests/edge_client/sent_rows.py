"""Hears what an edge sends through a `LinkProxy` and keeps, per session and position, every row that was sent."""

from __future__ import annotations

from collections import defaultdict

from websockets.frames import Frame as SocketFrame
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from loadtest.link_pair import Direction
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Open
from split_llama.wire.frame import Kind, split_message
from split_llama.wire.step import parse_step


class SentRows:
    """Use `tap` for one proxy, and another object's `rows` to gather those of several."""

    def __init__(self, width: int, rows: dict[tuple[str, int], list[bytes]] | None = None) -> None:
        self.rows = rows if rows is not None else defaultdict(list)
        self._width = width
        self._sockets: dict[int, ServerProtocol] = {}
        self._names: dict[tuple[int, int], str] = {}

    def tap(self, number: int, direction: Direction, data: bytes) -> None:
        """Hear bytes of a connection."""
        if direction == "down":
            return
        socket = self._sockets.setdefault(number, ServerProtocol(max_size=None))
        socket.receive_data(data)
        for event in socket.events_received():
            if isinstance(event, Request):
                socket.send_response(socket.accept(event))
            elif isinstance(event, SocketFrame) and event.opcode is Opcode.BINARY:
                self._message(number, bytes(event.data))

    def _message(self, number: int, message: bytes) -> None:
        for frame in split_message(message):
            if frame.kind in (Kind.OPEN, Kind.ATTACH):
                self._names[number, frame.handle] = Open.from_bytes(frame.payload).session
            elif frame.kind is Kind.STEP:
                rows = bytes(parse_step(frame, self._width).rows)
                size = row_bytes(Codec(frame.codec), self._width)
                for index in range(frame.count):
                    key = self._names[number, frame.handle], frame.first + index
                    self.rows[key].append(rows[index * size : (index + 1) * size])

    @property
    def sent_again(self) -> int:
        """How many rows were sent more than once."""
        return sum(len(rows) > 1 for rows in self.rows.values())

    def differing(self) -> list[tuple[str, int]]:
        """Where different rows were sent for one position."""
        return [key for key, rows in self.rows.items() if len(set(rows)) > 1]
