"""A client of a job behind one handle of one connection: its frames put together, messages for it cut into frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from split_llama.errors import BadRequest, FlLlamaError, JobEnded
from split_llama.extension import Send
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Payload, error_frame
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.training import Assembler, End, Joined, Message, cut
from training.roster import Seat

if TYPE_CHECKING:
    from training.server.lobby import Lobby

TAKEN = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.STEP})


class Member:
    """A `Guest`. It has no seat before its JOIN was checked, and gets nothing through once it was sent away."""

    def __init__(
        self,
        lobby: Lobby,
        send: Send,
        take: Callable[[int, Member, Message], None],
        busy: Callable[[int], bool],
        *,
        width: int,
        max_rows: int,
        max_frame_bytes: int,
    ) -> None:
        self.seat: Seat | None = None
        self.gone = False
        self._lobby = lobby
        self._send = send
        self._take = take
        self._busy = busy
        self._width = width
        self._max_frame_bytes = max_frame_bytes
        self._assembler = Assembler(width, max_rows)

    @property
    def is_busy(self) -> bool:
        """Say whether answers are still to come."""
        return not self.gone and (self.seat is None or self._busy(self.seat.index))

    def receive(self, frame: Frame) -> None:
        """Take a frame. Raises `RequestRefused`."""
        if self.gone:
            return
        if self.seat is None:
            raise BadRequest("JOIN is being checked: wait for its answer")
        if frame.kind not in TAKEN:
            raise BadRequest(f"a {frame.kind.name} frame is not for a fine-tuning job to receive")
        message = self._assembler.add(frame)
        if message is not None:
            self._take(self.seat.index, self, message)

    def leave(self) -> None:
        """The client does not come back."""
        if not self.gone:
            self.gone = True
            self._lobby.left(self)

    def detach(self) -> None:
        """The connection is gone; the client may come back."""
        if not self.gone:
            self.gone = True
            self._lobby.lost(self)

    def send(
        self, kind: Kind, seq: int, header: Payload, codec: Codec = Codec.FP32, rows: bytes | memoryview = b""
    ) -> Message:
        """Send a message and give it, for the case that it is asked for again."""
        count = len(rows) // row_bytes(codec, self._width)
        message = Message(kind, seq, header.to_bytes(), codec, count, rows)
        self.send_again(message)
        return message

    def send_again(self, message: Message) -> None:
        """Send a message."""
        if not self.gone:
            for frame in cut(message, 0, self._width, self._max_frame_bytes):
                self._send(frame)

    def welcome(self, joined: Joined) -> None:
        """Answer JOIN: a frame of JSON alone."""
        if not self.gone:
            self._send(Frame(Kind.JOIN, payload=joined.to_bytes()))

    def refuse(self, seq: int, error: FlLlamaError) -> None:
        """Say that something is refused."""
        if not self.gone:
            self._send(error_frame(0, seq, error))

    def turn_away(self, seq: int, error: FlLlamaError) -> None:
        """Refuse the JOIN itself."""
        self.refuse(seq, error)
        self.gone = True

    def end(self, reason: str) -> None:
        """Say that the job is over, or that this client is no part of it any more."""
        self.send(Kind.CLOSE, 0, End(reason=reason))
        self.gone = True


def ended(what: str) -> JobEnded:
    """Make the refusal for a job that takes nobody any more."""
    return JobEnded(f"the job {what}; its adapters can be fetched, but nobody can join it")
