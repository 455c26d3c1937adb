"""One connection of an edge process: frames in, frames out, many sessions. Knows no socket.

Frames are dispatched on the event loop; nothing is decoded or computed here. Refusals about a step or session become
ERROR frames; only a `ConnectionRefused` leaves `receive`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator

from serving.admission import hello as hello_reply
from serving.core import Core
from serving.keys import Principal
from serving.outbox import Outbox
from serving.registry import Entry
from serving.session import Phase
from split_llama.errors import (
    BadFrame,
    BadRequest,
    ConnectionRefused,
    FlLlamaError,
    FrameTooLarge,
    ModelMismatch,
    Unauthenticated,
    UnknownSession,
    UnsupportedVersion,
)
from split_llama.extension import Guest
from split_llama.wire.control import Fork, Hello, Open, error_frame
from split_llama.wire.frame import VERSION, Frame, Kind, split_message

OUTGOING_BYTES = 64 * 2**20
FRAMES_PER_TURN = 64
# Kinds whose refusal names the message refused.
_NUMBERED = (Kind.STEP, Kind.FORWARD, Kind.BACKWARD)


class _Seat:
    """Where an extension's client sits: it hears nothing any more once it has left or its connection is gone."""

    guest: Guest

    def __init__(self, connection: Connection, handle: int) -> None:
        self._connection: Connection | None = connection
        self._handle = handle

    def send(self, frames: Frame | Iterator[Frame]) -> None:
        """Queue a frame for the client, or those of a long message, which are asked for as they are sent."""
        if self._connection is None:
            return
        if isinstance(frames, Frame):
            self._connection.put(frames, self._handle)
        else:
            self._connection.put_long(frames, self._handle)

    def leave(self) -> None:
        """The client closed its handle."""
        self._connection = None
        self.guest.leave()

    def detach(self) -> None:
        """The connection is gone."""
        self._connection = None
        self.guest.detach()


class Connection:
    """The server's end: handles, and what may be sent back.

    `sending_since` is the monotonic time at which the message began that is on its way now, if one is.
    """

    def __init__(self, core: Core, principal: Principal, *, outgoing_bytes: int = OUTGOING_BYTES) -> None:
        self.principal = principal
        self.outbox = Outbox(outgoing_bytes)
        self.sending_since: float | None = None
        self._core = core
        self._entries: dict[int, Entry] = {}
        self._seats: dict[int, _Seat] = {}
        self._greeted = False
        self._changed = asyncio.Event()
        core.metrics.connections_opened.inc()

    # Mailbox

    def put(self, frame: Frame, handle: int | None = None) -> None:
        """Queue a frame for the edge, under another handle if one is given."""
        self.outbox.put(frame, handle)
        self._changed.set()

    def put_long(self, frames: Iterator[Frame], handle: int) -> None:
        """Queue a long message of an extension for the edge."""
        self.outbox.put_long(frames, handle)
        self._changed.set()

    def unbind(self, handle: int) -> None:
        """Forget a handle."""
        self._entries.pop(handle, None)
        self._changed.set()

    @property
    def is_busy(self) -> bool:
        """Say whether answers are still to come, or wait to be fetched."""
        if not self.outbox.is_empty:
            return True
        guests_are = any(seat.guest.is_busy for seat in self._seats.values())
        return guests_are or any(_is_pending(entry) for entry in self._entries.values())

    async def wait_answered(self, handles: Collection[int]) -> None:
        """Wait until these sessions have their answers, those left out that wait for room or for their rows."""
        while any(self._is_at_work(handle) for handle in handles):
            self._changed.clear()
            await self._changed.wait()

    def _is_at_work(self, handle: int) -> bool:
        entry, seat = self._entries.get(handle), self._seats.get(handle)
        return (entry is not None and _is_at_work(entry)) or (seat is not None and seat.guest.is_busy)

    def detach(self) -> None:
        """The link is gone: its sessions live on for the grace period."""
        now = self._core.clock()
        for entry in self._entries.values():
            entry.unbind(now)
        self._entries.clear()
        seats, self._seats = self._seats, {}
        for handle, seat in seats.items():
            self.outbox.drop(handle)
            seat.detach()

    async def receive(self, message: bytes) -> set[int]:
        """Take in one message; give the handles in it. Raises `ConnectionRefused` for what costs the connection."""
        self._core.metrics.bytes_in.inc(len(message))
        self._check_key()
        most = self._core.hosted.max_message_bytes
        if len(message) > most:
            raise FrameTooLarge(f"a message may have {most} bytes, {len(message)} came; send several messages")
        limit = self._core.hosted.max_frame_bytes
        handles = set()
        for number, frame in enumerate(split_message(message, limit), start=1):
            handles.add(frame.handle)
            self._dispatch(frame, len(message))
            if number % FRAMES_PER_TURN == 0:
                # A message may hold thousands of empty frames: others must get their turn in between.
                await asyncio.sleep(0)
        return handles

    def _check_key(self) -> None:
        """A key may be revoked, or get other limits, while its connection lives."""
        if self._core.keys.is_open:
            return
        current = self._core.keys.current(self.principal.owner)
        if current is None:
            raise Unauthenticated("the API key of this connection was revoked")
        self.principal = current

    def _dispatch(self, frame: Frame, message_bytes: int) -> None:
        try:
            if not self._greeted and frame.kind is not Kind.HELLO:
                raise BadFrame(f"expected HELLO first, {frame.kind.name} came")
            self._handle(frame, message_bytes)
        except ConnectionRefused:
            raise
        except FlLlamaError as error:
            self._core.count_refusal(error)
            self.put(error_frame(frame.handle, frame.seq if frame.kind in _NUMBERED else 0, error))

    def _handle(self, frame: Frame, message_bytes: int) -> None:
        if frame.handle in self._seats:
            self._hand_on(frame)
            return
        match frame.kind:
            case Kind.JOIN:
                self._join(frame)
            case Kind.FORWARD | Kind.BACKWARD if self._core.extensions:
                raise UnknownSession(f"handle {frame.handle} has joined no job on this connection; JOIN first")
            case Kind.STEP:
                self._core.step(self._entry(frame), _own_payload(frame, message_bytes), self.principal)
            case Kind.HELLO:
                self._hello(Hello.from_bytes(frame.payload))
            case Kind.OPEN | Kind.ATTACH:
                self._open(frame)
            case Kind.FORK:
                self._fork(frame)
            case Kind.CANCEL:
                entry = self._entry(frame)
                if (answer := entry.session.cancel(frame.seq)) is not None:
                    entry.send(answer)
            case Kind.CLOSE:
                self._core.remove(self._entry(frame))
                self.put(Frame(Kind.CLOSE, handle=frame.handle))
            case Kind.RESYNC:
                self._entry(frame).session.resynced(frame)
            case _:
                raise BadRequest(f"a {frame.kind.name} frame is not for this server to receive")

    def _hello(self, hello: Hello) -> None:
        if hello.protocol != VERSION:
            raise UnsupportedVersion(f"this server speaks protocol version {VERSION}, the client {hello.protocol}")
        if hello.model is not None and hello.model != self._core.hosted.name:
            raise ModelMismatch(f"model {hello.model!r} asked for, this server hosts {self._core.hosted.name!r}")
        self._greeted = True
        self.put(Frame(Kind.HELLO, payload=hello_reply(self._core.hosted).to_bytes()))

    def _open(self, frame: Frame) -> None:
        self._check_free(frame.handle)
        request = Open.from_bytes(frame.payload)
        take = self._core.open if frame.kind is Kind.OPEN else self._core.attach
        self._entries[frame.handle] = take(request, self.principal, self, frame.handle)

    def _fork(self, frame: Frame) -> None:
        self._check_free(frame.handle)
        request = Fork.from_bytes(frame.payload)
        parent = self._entries.get(request.parent)
        if parent is None:
            raise UnknownSession(f"the parent's handle {request.parent} is not open on this connection")
        self._entries[frame.handle] = self._core.fork(parent, request, self.principal, self, frame.handle)

    def _join(self, frame: Frame) -> None:
        self._check_free(frame.handle)
        seat = _Seat(self, frame.handle)
        seat.guest = self._core.extensions.join(frame, self.principal.owner, seat.send)
        self._seats[frame.handle] = seat

    def _hand_on(self, frame: Frame) -> None:
        seat = self._seats[frame.handle]
        if frame.kind is not Kind.CLOSE:
            seat.guest.receive(frame)
            return
        del self._seats[frame.handle]
        # Whoever left is not told the rest; the handle may be another's next.
        self.outbox.drop(frame.handle)
        seat.leave()
        self.put(Frame(Kind.CLOSE, handle=frame.handle))

    def _check_free(self, handle: int) -> None:
        if handle == 0 or handle in self._entries or handle in self._seats:
            raise BadRequest(f"handle {handle} is 0 or in use: choose another number")

    def _entry(self, frame: Frame) -> Entry:
        entry = self._entries.get(frame.handle)
        if entry is None:
            raise UnknownSession(
                f"handle {frame.handle} is not open on this connection (never opened, closed, or expired); "
                "OPEN or ATTACH first"
            )
        return entry


def _is_pending(entry: Entry) -> bool:
    return bool(entry.session.running or entry.session.queued) or not entry.verified


def _is_at_work(entry: Entry) -> bool:
    """Whether an answer comes without anything that others, or the edge, have to do first."""
    return _is_pending(entry) and entry.session.phase not in (Phase.WAITING, Phase.LOST)


def _own_payload(frame: Frame, message_bytes: int) -> Frame:
    """Copy a small payload out of a large message, which would stay in memory as long as the step waits."""
    if frame.size * 2 < message_bytes:
        frame.payload = bytes(frame.payload)
    return frame
