"""Messages of split fine-tuning: a JSON header and rows of values, cut into frames and put together again.

A message is one or more frames of one kind, handle and seq, sent back to back. Each frame holds `count` rows from row
`first` on, of `ack` rows in all; the first one begins with the header, `aux` bytes of JSON. Numpy and pydantic only.

A joined client sends FORWARD (A's outputs), BACKWARD (dL/d of B's outputs) and STEP (it has done its share of an
optimizer step); the answers are FORWARD (B's outputs), BACKWARD (dL/d of A's outputs) and REPLY. The server says with
RESYNC from which step on everybody goes on, and with CLOSE that the job is over. Losses and gradients are sums over
target tokens, never means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from split_llama.errors import BadRequest, BadStates
from split_llama.wire.codec import Codec, Floats, row_bytes
from split_llama.wire.control import U32, Blocks, Digest, Name, Payload, Request, Secret
from split_llama.wire.frame import HEADER_SIZE, Frame, Kind

MAX_HEADER_BYTES = 32 * 1024
MAX_CHECKPOINTS = 16

Finite = Annotated[float, Field(allow_inf_nan=False, strict=False)]


class Join(Request):
    """Join a job as `client`, or come back to it.

    `key` is the job's; `secret` is drawn by the client once and proves later that it is the same one. `have` lists the
    steps whose state the client can restore, its live one included; `generation` is the one it was in, 0 for none.
    `samples` is the size of its data. A null digest is not checked.
    """

    job: Name
    key: Name
    client: Name
    secret: Secret
    blocks: Blocks
    geometry: Digest | None = None
    weights: Digest | None = None
    tokenizer: Digest | None = None
    samples: U32 = 0
    generation: U32 = 0
    have: Annotated[tuple[U32, ...], Field(max_length=MAX_CHECKPOINTS)] = ()


class Joined(Payload):
    """The answer to JOIN: the client's number in the job, and how much may be under way."""

    index: U32
    max_micros: Annotated[int, Field(ge=1)]
    max_rows: Annotated[int, Field(ge=1)]


class Start(Payload):
    """RESYNC: restore the state after `step`, then go on. `present` are the numbers of the clients that take part.

    Everything of an earlier generation is void. Where the job shares A's and C's adapters the rows are their weights at
    that step (fp32, `flatten`). With `restore` false a client that had left is back among others who did not wait: it
    keeps its own newest state and goes on with them.
    """

    generation: U32
    step: U32
    present: tuple[U32, ...]
    restore: bool = True


class Forward(Request):
    """Header of FORWARD: micro-batch `micro` (from 0) of `of` in a step, with `targets` tokens that count in the loss.

    `lengths` are those of its sequences, back to back and without padding.
    """

    generation: U32
    step: U32
    micro: U32
    of: Annotated[int, Field(ge=1, lt=2**16)]
    targets: U32
    lengths: Annotated[tuple[Annotated[int, Field(ge=1, lt=2**32)], ...], Field(min_length=1, max_length=4096)]


class Backward(Request):
    """Header of BACKWARD; without rows the client's loss was not finite, and the micro-batch adds nothing."""

    generation: U32
    step: U32
    micro: U32


class Commit(Request):
    """Header of STEP: the client has done its share. `loss` is the sum over `targets` tokens, null if not finite.

    The rows, fp32, are those of `flatten` over A's and C's tensors where the job shares them: gradients, or weights
    where sets of weights are averaged.
    """

    generation: U32
    step: U32
    samples: U32
    targets: U32
    loss: Finite | None = None


class Answer(Payload):
    """Header of the answers to FORWARD and BACKWARD."""

    generation: U32
    step: U32
    micro: U32


class Outcome(Payload):
    """Header of REPLY, once the step is closed: what became of it. The rows are A's and C's new weights where shared.

    `included` says whether this client's share counts; `loss` is the mean per target token over all that do.
    `clipped_from` is the norm of this client's gradient where it was clipped; `skipped` says why the weights stayed.
    """

    generation: U32
    step: U32
    included: bool
    loss: Finite | None = None
    learning_rate: Finite = 0.0
    gradient_norm: Finite | None = None
    clipped_from: Finite | None = None
    skipped: str | None = None


class End(Payload):
    """CLOSE from the server: the job is over, or this client is no longer part of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """A header and `count` encoded rows."""

    kind: Kind
    seq: int
    header: bytes
    codec: Codec = Codec.FP32
    count: int = 0
    rows: bytes | memoryview = b""


def cut(message: Message, handle: int, width: int, max_frame_bytes: int) -> Iterator[Frame]:
    """Cut a message into frames for rows of `width` values."""
    assert len(message.header) <= MAX_HEADER_BYTES, "a header has its limit"
    each = row_bytes(message.codec, width)
    assert len(message.rows) == message.count * each, "rows and their bytes disagree"
    first, header = 0, message.header
    rows = memoryview(message.rows)
    while True:
        fits = max(1, (max_frame_bytes - HEADER_SIZE - len(header)) // each)
        if header and message.count and HEADER_SIZE + len(header) + each > max_frame_bytes:
            fits = 0  # a wide row goes into the next frame
        count = min(fits, message.count - first)
        piece = rows[first * each : (first + count) * each]
        # Only the first frame's rows are copied here: the header goes before them.
        payload = b"".join((header, piece)) if header else piece
        yield Frame(
            message.kind,
            message.codec,
            aux=len(header),
            handle=handle,
            seq=message.seq,
            ack=message.count,
            first=first,
            count=count,
            payload=payload,
        )
        first, header = first + count, b""
        if first >= message.count:
            return


class Assembler:
    """Puts the frames of one handle together again. One message may be incomplete at a time."""

    def __init__(self, width: int, max_rows: int) -> None:
        self._width = width
        self._max_rows = max_rows
        self._gathered = bytearray()
        self._header = b""
        self._begun: Frame | None = None
        self._rows = 0

    def add(self, frame: Frame) -> Message | None:
        """Take a frame; give the message that it completes. Raises `BadRequest`, `BadStates`; the message is lost then.

        Frames that continue a message which was refused are refused too.
        """
        try:
            return self._add(frame)
        except (BadRequest, BadStates):
            self.reset()
            raise

    def reset(self) -> None:
        """Forget an incomplete message."""
        self._gathered, self._header, self._begun, self._rows = bytearray(), b"", None, 0

    @property
    def nbytes(self) -> int:
        """Bytes held of an incomplete message."""
        return len(self._gathered)

    def _add(self, frame: Frame) -> Message | None:
        codec = Codec.from_wire(frame.codec)
        if frame.first == 0 and frame.aux:
            if self._begun is not None:
                raise BadRequest(f"message {frame.seq} begins before message {self._begun.seq} is complete")
            self._begin(frame)
        begun = self._begun
        if begun is None or (frame.kind, frame.seq, frame.codec, frame.ack) != (
            begun.kind,
            begun.seq,
            begun.codec,
            begun.ack,
        ):
            raise BadRequest(f"a frame of message {frame.seq} came out of place; send its first frame, with its header")
        rows = frame.payload[frame.aux :]
        expected = frame.count * row_bytes(codec, self._width)
        if frame.first != self._rows or len(rows) != expected or self._rows + frame.count > begun.ack:
            raise BadStates(
                f"expected {expected} bytes for {frame.count} rows of {self._width} values from row {self._rows} of "
                f"{begun.ack} on; {len(rows)} bytes from row {frame.first} on came"
            )
        self._gathered += rows
        self._rows += frame.count
        if self._rows < begun.ack:
            return None
        message = Message(begun.kind, begun.seq, self._header, codec, self._rows, memoryview(self._gathered))
        self.reset()
        return message

    def _begin(self, frame: Frame) -> None:
        if frame.aux > min(MAX_HEADER_BYTES, len(frame.payload)):
            raise BadRequest(f"a header of {frame.aux} bytes was announced; {MAX_HEADER_BYTES} may be, and must come")
        if frame.ack > self._max_rows:
            raise BadStates(f"a message may have {self._max_rows} rows here, {frame.ack} were announced; use less")
        self._begun = frame
        self._header = bytes(frame.payload[: frame.aux])


def flatten(values: Mapping[str, Floats], width: int) -> Floats:
    """Put tensors one after the other into rows `[n, width]`, the last one filled up with zeros."""
    flat = np.concatenate([np.ravel(value) for value in values.values()] or [np.zeros(0, np.float32)])
    rows = np.zeros((-(-flat.size // width), width), np.float32)
    rows.reshape(-1)[: flat.size] = flat
    return rows


def unflatten(rows: Floats, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Take the tensors of `shapes`, in its order, out of rows that `flatten` made. Raises `BadStates`."""
    needed = sum(math.prod(shape) for shape in shapes.values())
    width = rows.shape[1] if rows.ndim == 2 else 1
    if rows.size != -(-needed // width) * width:
        raise BadStates(
            f"expected {needed} adapter values in rows of {width}, {rows.size} came; rank or target modules differ"
        )
    flat, values, start = rows.reshape(-1), {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        values[name] = flat[start:stop].reshape(shape)
        start = stop
    return values
