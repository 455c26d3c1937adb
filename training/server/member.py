"""A client of a job behind one handle of one connection: its frames put together, messages for it cut into frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from split_llama.errors import BadRequest, FlLlamaError, JobEnded, SlowReader
from split_llama.extension import Send
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Payload, error_frame
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.training import Assembler, End, Joined, Message, cut
from training.roster import Seat

if TYPE_CHECKING:
    from training.server.lobby import Lobby

TAKEN = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.STEP})
# Adapters' weights that may wait for a client to read them, one message more or less: each step brings new ones, and
# nothing else bounds how far a client may be behind.
UNREAD_BYTES = 64 * 2**20
# Answers that may wait, as a multiple of `max_micros`: who reads its answers before it goes on has one for each
# micro-batch under way, and once more after a restart.
UNREAD_WINDOWS = 4
ANSWERS = frozenset({Kind.FORWARD, Kind.BACKWARD})


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
        self._unread: Counter[Kind] = Counter()
        self._answers = 0
        self._max_answers = UNREAD_WINDOWS
        self._given_up = False

    @property
    def is_busy(self) -> bool:
        """Say whether answers are still to come."""
        return not self.gone and (self.seat is None or self._busy(self.seat.index))

    @property
    def nbytes(self) -> int:
        """Bytes of messages that are not complete yet, and of those that are not sent yet."""
        return self._assembler.nbytes + self._unread.total()

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
        """Send a message: cut up while it is sent. A client too far behind loses its connection instead."""
        if self.gone or self._given_up:
            return
        if self._is_behind(message):
            self._given_up = True
            self._send(_too_slow(self._unread.total()))
            return
        self._unread[message.kind] += len(message.rows)
        self._answers += message.kind in ANSWERS
        self._send(self._frames(message))

    def _is_behind(self, message: Message) -> bool:
        """Say whether too much waits already for one more message to wait."""
        if message.kind in ANSWERS:
            return self._answers >= self._max_answers
        return bool(message.count) and self._unread[Kind.REPLY] + self._unread[Kind.RESYNC] > UNREAD_BYTES

    def _frames(self, message: Message) -> Iterator[Frame]:
        yield from cut(message, 0, self._width, self._max_frame_bytes)
        self._unread[message.kind] -= len(message.rows)
        self._answers -= message.kind in ANSWERS

    def welcome(self, joined: Joined) -> None:
        """Answer JOIN: a frame of JSON alone."""
        self._max_answers = UNREAD_WINDOWS * joined.max_micros
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


def _too_slow(unread: int) -> Iterator[Frame]:
    """End the connection when it is this message's turn."""
    raise SlowReader(f"{unread} bytes of answers and adapters wait unread: too many; read them while you send")
    yield  # A generator: nothing is raised before somebody asks.


def ended(what: str) -> JobEnded:
    """Make the refusal for a job that takes nobody any more."""
    return JobEnded(f"the job {what}; its adapters can be fetched, but nobody can join it")
