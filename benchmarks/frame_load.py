"""A load of one-row steps over WebSockets that costs the generator next to nothing: `benchmarks.control_plane` uses it.

Frames are built once and patched in place; all that one message of the server allows goes out as one message, without
a copy; the mask is zero, which is a mask like any other to the server. Blocking sockets, no event loop.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil

from split_llama.wire.codec import Codec, encode_rows
from split_llama.wire.control import Hello, Open, error_from_frame
from split_llama.wire.frame import HEADER_SIZE, VERSION, Frame, Kind, split_message
from split_llama.wire.step import build_step

WARM_UP_SECONDS = 0.5
PIECE = 2**20
BLOCKS = (1, 2)
FINAL_BINARY, MASKED = 0x82, 0x80
LONG_LENGTH = 127
_POSITION = struct.Struct("<III")  # seq, ack, first at byte 12 of a frame
_POSITION_AT = 12
_HANDLE_AND_SEQ = struct.Struct("<8xII")  # of a frame
MESSAGE_FRAMES = 64


@dataclass(frozen=True)
class Load:
    """How many sessions over how many connections, each with how many steps in flight."""

    sessions: int
    connections: int
    in_flight: int


class Session:
    """The next frames of one session: one buffer for each step in flight."""

    def __init__(self, handle: int, rows: bytes, in_flight: int, positions: int) -> None:
        frame = build_step(handle=handle, seq=1, first=0, count=1, codec=Codec.FP16, rows=rows).encode()
        self._frames = [bytearray(frame) for _ in range(in_flight)]
        self._positions = positions
        self._seq = 0
        self._in_flight = in_flight

    def next(self, answered: int) -> bytearray:
        """Give the next step's frame, after the reply to step `answered`."""
        frame = self._frames[self._seq % self._in_flight]
        _POSITION.pack_into(frame, _POSITION_AT, self._seq + 1, answered, self._seq % self._positions)
        self._seq += 1
        return frame


class Link:
    """One WebSocket and its sessions."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sessions: dict[int, Session] = {}
        self._frame_size = 0
        self._buffer = bytearray(4 * PIECE)
        self._view = memoryview(self._buffer)
        self._held = 0
        key = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455
        self.socket.sendall(
            f"GET /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += self.socket.recv(1)
        if b" 101 " not in answer.splitlines()[0]:
            raise RuntimeError(f"no WebSocket: {answer!r}")

    def open(self, handles: Iterable[int], rows: bytes, load: Load, positions: int, *, echoed: bool) -> None:
        """Open sessions; an echo needs no opening."""
        self.sessions = {handle: Session(handle, rows, load.in_flight, positions) for handle in handles}
        self._frame_size = HEADER_SIZE + len(rows)
        if echoed:
            return
        frames = [Frame(Kind.HELLO, payload=Hello(protocol=VERSION, client="load").to_bytes())]
        for handle in handles:
            request = Open(session=secrets.token_hex(16), secret=secrets.token_hex(32), blocks=BLOCKS)
            frames.append(Frame(Kind.OPEN, handle=handle, payload=request.to_bytes()))
        self.send([frame.encode() for frame in frames])
        answered = 0
        while answered < len(frames):
            answered += sum(1 for message in self.receive() for _ in _frames(message))

    def begin(self, in_flight: int) -> None:
        """Send the first steps of all sessions."""
        for _ in range(in_flight):
            self.send([session.next(0) for session in self.sessions.values()])

    def send(self, frames: list[bytes | bytearray]) -> None:
        """Send frames as one message, or as many as the server's limit asks for."""
        for start in range(0, len(frames), MESSAGE_FRAMES):
            part = frames[start : start + MESSAGE_FRAMES]
            length = sum(map(len, part))
            pieces = [struct.pack("!BBQI", FINAL_BINARY, MASKED | LONG_LENGTH, length, 0), *part]
            sent = self.socket.sendmsg(pieces)
            if sent < length + len(pieces[0]):
                self.socket.sendall(b"".join(pieces)[sent:])

    def close(self, *, echoed: bool) -> None:
        """Close all sessions, and the connection."""
        if not echoed:
            self.send([Frame(Kind.CLOSE, handle=handle).encode() for handle in self.sessions])
            closed = 0
            while closed < len(self.sessions):
                closed += sum(frame.kind is Kind.CLOSE for message in self.receive() for frame in _frames(message))
        self.socket.close()

    def receive(self) -> list[memoryview]:
        """Read what has come; give the whole messages, which live until the next call."""
        self._held += self.socket.recv_into(self._view[self._held :])
        messages, offset = [], 0
        while (end := self._end_of_message(offset)) is not None:
            messages.append(self._view[end[0] : end[1]])
            offset = end[1]
        if offset and offset < self._held:
            # The messages given are views: what is left of the next one moves to a buffer of its own.
            rest = self._held - offset
            self._buffer, old = bytearray(len(self._buffer)), self._view
            self._view = memoryview(self._buffer)
            self._view[:rest] = old[offset : self._held]
            self._held = rest
        elif offset:
            self._held = 0
        return messages

    def _end_of_message(self, offset: int) -> tuple[int, int] | None:
        """Give begin and end of the message at `offset`, if it is all there."""
        if self._held - offset < 2:
            return None
        length, begin = self._buffer[offset + 1], offset + 2
        if length > 125:
            form = "!H" if length == 126 else "!Q"
            if self._held - begin < struct.calcsize(form):
                return None
            (length,) = struct.unpack_from(form, self._buffer, begin)
            begin += struct.calcsize(form)
        return (begin, begin + length) if begin + length <= self._held else None

    def answer(self) -> int:
        """Read replies and send the next steps of their sessions; give the number of replies."""
        frames: list[bytes | bytearray] = []
        for message in self.receive():
            # Replies are all of one size; whatever else comes is an error, and has another.
            if len(message) % self._frame_size:
                raise RuntimeError(f"not only replies came: {list(_frames(message))}")
            for offset in range(0, len(message), self._frame_size):
                handle, seq = _HANDLE_AND_SEQ.unpack_from(message, offset)
                frames.append(self.sessions[handle].next(seq))
        if frames:
            self.send(frames)
        return len(frames)


def _frames(message: memoryview) -> Iterator[Frame]:
    for frame in split_message(message):
        if frame.kind is Kind.ERROR:
            raise error_from_frame(frame)
        yield frame


def measure(
    port: int, server: psutil.Process, load: Load, width: int, positions: int, seconds: float, *, echoed: bool
) -> dict[str, float]:
    """Run a closed loop for some seconds: steps per second, per CPU second of the server, and shares of the cores."""
    states = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
    rows = encode_rows(Codec.FP16, states)
    links = [Link(port) for _ in range(load.connections)]
    selector = selectors.DefaultSelector()
    for number, link in enumerate(links):
        link.open(range(number + 1, load.sessions + 1, load.connections), rows, load, positions, echoed=echoed)
        selector.register(link.socket, selectors.EVENT_READ, link)
    for link in links:
        link.begin(load.in_flight)
    _run(selector, WARM_UP_SECONDS)
    own, used = time.process_time(), sum(server.cpu_times()[:2])
    begin = time.perf_counter()
    steps = _run(selector, seconds)
    elapsed = time.perf_counter() - begin
    used, own = sum(server.cpu_times()[:2]) - used, time.process_time() - own
    for link in links:
        link.close(echoed=echoed)
    return {
        "steps_per_second": steps / elapsed,
        "per_cpu_second": steps / used,
        "server_share_of_core": used / elapsed,
        "load_share_of_core": own / elapsed,
    }


def _run(selector: selectors.BaseSelector, seconds: float) -> int:
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, _ in selector.select(timeout=5.0):
            steps += key.data.answer()
    return steps
