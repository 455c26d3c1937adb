"""The frame: a header of 32 bytes, little-endian, and its payload. `docs/protocol.md` is the specification."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from split_llama.errors import BadFrame, FrameTooLarge, UnsupportedVersion

MAGIC = 0x4C46  # the bytes "FL"
VERSION = 1
HEADER_SIZE = 32
MAX_FRAME_BYTES = 65536
FP32_BYTES = 4
STEP_EXTRA_BYTES = 8 + 256  # one tree node and the longest list of accepted nodes

_HEADER = struct.Struct("<HBBBBHIIIIII")


class Kind(IntEnum):
    """What a frame is for."""

    HELLO = 1
    OPEN = 2
    ATTACH = 3
    FORK = 4
    STEP = 5
    REPLY = 6
    CANCEL = 7
    CLOSE = 8
    ERROR = 9
    RESYNC = 10
    MOVED = 11
    FORWARD = 12
    BACKWARD = 13
    JOIN = 14


_KINDS = {kind.value: kind for kind in Kind}  # a dict lookup is several times faster than the enum's constructor


class Flag(IntFlag):
    """Bits of a step. With neither REPLY bit every row comes back."""

    REPLY_LAST = 1
    REPLY_NONE = 2
    DRAFT = 4
    TREE = 8
    ACCEPT = 16


# Not frozen: a frozen dataclass takes five times as long to make.
@dataclass(slots=True)
class Frame:
    """One frame. The payload of a decoded frame is a view of the message it came in, not a copy.

    `kind` is checked while decoding; `codec` and `flags` stay plain integers, because an unknown codec or flag is the
    fault of one step and must not cost the connection (see `split_llama.wire.step`).
    """

    kind: Kind
    codec: int = 0
    flags: int = 0
    aux: int = 0
    handle: int = 0
    seq: int = 0
    ack: int = 0
    first: int = 0
    count: int = 0
    payload: bytes | memoryview = b""

    def header(self, handle: int | None = None) -> bytes:
        """Give the 32 header bytes, with another handle if one is given.

        Raises `BadFrame` when a field does not fit its width.
        """
        try:
            return _HEADER.pack(
                MAGIC,
                VERSION,
                self.kind,
                self.codec,
                self.flags,
                self.aux,
                self.handle if handle is None else handle,
                self.seq,
                self.ack,
                self.first,
                self.count,
                len(self.payload),
            )
        except struct.error as error:
            raise BadFrame(f"a header field of {self.kind.name} does not fit its width: {error}") from error

    def encode(self) -> bytes:
        """Give the frame's bytes: header, then payload."""
        return b"".join((self.header(), self.payload))

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return HEADER_SIZE + len(self.payload)

    @classmethod
    def decode(cls, buffer: bytes | bytearray | memoryview, max_frame_bytes: int = MAX_FRAME_BYTES) -> Frame:
        """Read a buffer that holds exactly one frame. Raises as `split_message` does."""
        view = memoryview(buffer)
        frame = _frame_at(view, 0, max_frame_bytes)
        if frame.size != len(view):
            raise BadFrame(f"expected one frame of {frame.size} bytes, {len(view)} bytes came")
        return frame


def encode_message(frames: Iterable[Frame]) -> bytes:
    """Put frames back to back into one message; the payloads are copied once."""
    return b"".join(part for frame in frames for part in (frame.header(), frame.payload))


def split_message(message: bytes | bytearray | memoryview, max_frame_bytes: int = MAX_FRAME_BYTES) -> Iterator[Frame]:
    """Yield the frames of a message, in order and without copying; an empty message holds none.

    Raises `BadFrame` for bytes that are no frame, a truncated frame or an unknown kind, `UnsupportedVersion` for a
    frame of another version, `FrameTooLarge` for a frame over `max_frame_bytes` (header included). All three are
    fatal: the boundary of the next frame is not known any more.
    """
    view = memoryview(message)
    offset = 0
    while offset < len(view):
        frame = _frame_at(view, offset, max_frame_bytes)
        yield frame
        offset += frame.size


def frame_limit(width: int) -> int:
    """Give the largest frame for states `[n, width]`: 64 KiB, or a step of one fp32 row where that is larger."""
    return max(MAX_FRAME_BYTES, HEADER_SIZE + STEP_EXTRA_BYTES + width * FP32_BYTES)


def _frame_at(view: memoryview, offset: int, max_frame_bytes: int) -> Frame:
    left = len(view) - offset
    if left < HEADER_SIZE:
        raise BadFrame(f"expected a header of {HEADER_SIZE} bytes, {left} bytes came")
    magic, version, kind, codec, flags, aux, handle, seq, ack, first, count, length = _HEADER.unpack_from(view, offset)
    if magic != MAGIC:
        raise BadFrame(f"expected the magic 0x{MAGIC:04x} at byte {offset}, 0x{magic:04x} came: not a frame")
    if version != VERSION:
        raise UnsupportedVersion(f"this side speaks protocol version {VERSION}, a frame of version {version} came")
    if HEADER_SIZE + length > max_frame_bytes:
        raise FrameTooLarge(f"a frame may have {max_frame_bytes} bytes, {HEADER_SIZE + length} were announced")
    if HEADER_SIZE + length > left:
        raise BadFrame(f"a frame of {HEADER_SIZE + length} bytes was announced, {left} bytes came")
    if kind not in _KINDS:
        raise BadFrame(f"{kind} is no kind of frame in protocol version {VERSION}")
    begin = offset + HEADER_SIZE
    payload = view[begin : begin + length]
    return Frame(_KINDS[kind], codec, flags, aux, handle, seq, ack, first, count, payload)
