"""Frames, codecs and the two links, written from docs/protocol.md alone: nothing of the project is imported."""

from __future__ import annotations

import http.client
import json
import secrets
import struct
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

HELLO, OPEN, ATTACH, FORK, STEP, REPLY, CANCEL, CLOSE, ERROR, RESYNC, MOVED, FORWARD, BACKWARD, JOIN = range(1, 15)
FP32, BF16, FP16, INT8 = range(4)
REPLY_LAST, REPLY_NONE, DRAFT, TREE, ACCEPT = 1, 2, 4, 8, 16

HEADER = struct.Struct("<HBBBBHIIIIII")
MAGIC = 0x4C46
FIRST_FRAME_LIMIT = 65536  # until HELLO is answered
GROUP = 64
PATIENCE = 30.0

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """One frame; the fields stand in the order of the header."""

    kind: int
    codec: int = 0
    flags: int = 0
    aux: int = 0
    handle: int = 0
    seq: int = 0
    ack: int = 0
    first: int = 0
    count: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        """Header and payload."""
        numbers = (self.handle, self.seq, self.ack, self.first, self.count, len(self.payload))
        return HEADER.pack(MAGIC, 1, self.kind, self.codec, self.flags, self.aux, *numbers) + self.payload

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return HEADER.size + len(self.payload)

    def json(self) -> dict[str, Any]:
        """The fields of a control payload."""
        fields = json.loads(self.payload)
        if not isinstance(fields, dict):
            raise ValueError(f"a control payload is an object, not {fields!r}")
        return fields


def control(kind: int, fields: dict[str, Any], handle: int = 0) -> Frame:
    """A frame with `fields` as its JSON payload."""
    return Frame(kind, handle=handle, payload=json.dumps(fields, separators=(",", ":")).encode())


def parse_message(message: bytes) -> list[Frame]:
    """The frames of one message."""
    frames, at = [], 0
    while at < len(message):
        if len(message) - at < HEADER.size:
            raise ValueError("a header passes the end of the message")
        magic, version, kind, codec, flags, aux, handle, seq, ack, first, count, length = HEADER.unpack_from(
            message, at
        )
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"magic {magic:#x}, version {version}")
        at += HEADER.size + length
        if at > len(message):
            raise ValueError("a payload passes the end of the message")
        frames.append(Frame(kind, codec, flags, aux, handle, seq, ack, first, count, message[at - length : at]))
    return frames


def row_bytes(codec: int, width: int) -> int:
    """The bytes of one row of `width` values."""
    return (4 * width, 2 * width, 2 * width, width + 2 * -(-width // GROUP))[codec]


def encode_rows(rows: Rows, codec: int) -> bytes:
    """Rows in `codec`, rounded as the page says."""
    rows = np.ascontiguousarray(rows, dtype="<f4")
    if codec == FP32:
        return rows.tobytes()
    if codec == BF16:
        limit = np.float32(3.3895313892515355e38)
        bits = np.clip(rows, -limit, limit).view("<u4")
        upper: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return upper.tobytes()
    if codec == FP16:
        return np.clip(rows, -65504, 65504).astype("<f2").tobytes()
    return b"".join(_encode_int8(row) for row in rows)


def _encode_int8(row: Rows) -> bytes:
    values, scales = [], []
    for start in range(0, len(row), GROUP):
        group = row[start : start + GROUP]
        wanted = np.minimum(np.abs(group).max() / np.float32(127), np.float32(65504))
        scale = wanted.astype("<f2")
        if np.float32(scale) < wanted:
            scale = np.nextafter(scale, np.float16(np.inf))
        scales.append(scale)
        divisor = np.float32(scale) if scale else np.float32(np.inf)
        values.append(np.clip(np.rint(group / divisor), -127, 127).astype(np.int8))
    return np.concatenate(values).tobytes() + np.array(scales, "<f2").tobytes()


def decode_rows(data: bytes, codec: int, width: int) -> Rows:
    """The values of rows in `codec`."""
    if codec == FP32:
        flat = np.frombuffer(data, "<f4")
    elif codec == BF16:
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif codec == FP16:
        flat = np.frombuffer(data, "<f2").astype(np.float32)
    else:
        rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes(INT8, width))
        scales = np.ascontiguousarray(rows[:, width:]).view("<f2").astype(np.float32)
        flat = rows[:, :width].view(np.int8) * np.repeat(scales, GROUP, axis=1)[:, :width]
    return flat.reshape(-1, width).astype(np.float32)


class Disconnected(Exception):
    """The connection is over: the close code (HTTP: the status) and, from HTTP, the error's code and class."""

    def __init__(self, close_code: int, error: dict[str, Any] | None = None) -> None:
        super().__init__(close_code, error)
        self.close_code = close_code
        self.error = error or {}


class Link(Protocol):
    """What both links can do. A message is frames back to back."""

    def send(self, message: bytes) -> None: ...

    def receive(self, patience: float = PATIENCE) -> bytes: ...

    def close(self) -> None: ...


class WebSocketLink:
    """`ws://HOST:PORT/v1/stream`: no subprotocol, no extension; websockets' sync client follows no redirects."""

    def __init__(self, port: int) -> None:
        url = f"ws://127.0.0.1:{port}/v1/stream"
        self._stack = ExitStack()
        self._socket = self._stack.enter_context(connect(url, compression=None, max_size=None, proxy=None))

    def send(self, message: bytes) -> None:
        """Send one binary message."""
        try:
            self._socket.send(message)
        except ConnectionClosed as closed:
            raise Disconnected(_close_code(closed)) from closed

    def receive(self, patience: float = PATIENCE) -> bytes:
        """The next message; TimeoutError when none comes."""
        try:
            message = self._socket.recv(timeout=patience)
        except ConnectionClosed as closed:
            raise Disconnected(_close_code(closed)) from closed
        if isinstance(message, str):
            raise ValueError("a text message")
        return message

    def close(self) -> None:
        """Close with code 1000."""
        self._stack.close()


def _close_code(closed: ConnectionClosed) -> int:
    return closed.rcvd.code if closed.rcvd is not None else 1006


class HttpLink:
    """`POST /v1/frames`: what is sent waits for the next request, which `receive` makes."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._name = secrets.token_hex(16)
        self._waiting: list[bytes] = []
        self.statuses: list[int] = []

    def send(self, message: bytes) -> None:
        """Keep the message for the next request."""
        self._waiting.append(message)

    def receive(self, patience: float = PATIENCE) -> bytes:
        """Post what waits, then ask with empty bodies until frames come; TimeoutError when none do."""
        until = time.monotonic() + patience
        while True:
            body, self._waiting = b"".join(self._waiting), []
            answer = self._post(body)
            if answer:
                return answer
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.05)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/octet-stream", "X-FL-Connection": self._name}
        try:
            self._http.request("POST", "/v1/frames", body, headers)
            response = self._http.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as failure:  # nobody knows what was lost
            self._http.close()
            raise Disconnected(1006) from failure
        self.statuses.append(response.status)
        if response.status == 204:
            return b""
        if response.status != 200:
            raise Disconnected(response.status, json.loads(answer)["error"])
        return answer

    def close(self) -> None:
        """Make no more requests: the connection lapses."""
        self._http.close()


def join(frames: Iterable[Frame]) -> bytes:
    """The frames as one message."""
    return b"".join(frame.encode() for frame in frames)


def receive_until_closed(link: Link) -> Disconnected:
    """Read what there is until the connection ends."""
    while True:
        try:
            link.receive()
        except Disconnected as closed:
            return closed


def exchange(link: Link, frames: Iterable[Frame], answers: int) -> list[Frame]:
    """Send the frames as one message and collect so many answers."""
    link.send(join(frames))
    answered: list[Frame] = []
    while len(answered) < answers:
        answered += parse_message(link.receive())
    return answered
