"""One session of docs/protocol.md as a client keeps it: window, log, drafts and recovery."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from protocol_page import wire
from protocol_page.wire import ACCEPT, DRAFT, REPLY_NONE, TREE, Frame, Rows, control, row_bytes

if TYPE_CHECKING:
    from protocol_page.client import Client

SEQUENCE_GAP = 55
EARLY_STEPS, EARLY_BYTES = 4, 256 << 10  # until the Grant comes

Row = tuple[int, bytes]  # codec and bytes, as sent


class Refused(Exception):
    """An ERROR frame."""

    def __init__(self, frame: Frame) -> None:
        fields = frame.json()
        super().__init__(fields["code"], fields["error"], fields["message"])
        self.code: int = fields["code"]
        self.retry_after_ms: int = fields["retry_after_ms"]
        self.frame = frame


@dataclass
class Pending:
    """A step that has no reply: waiting to be sent, or sent under `frame.seq`. A replayed one has no ticket."""

    ticket: int | None
    frame: Frame


@dataclass
class Session:
    """One session: its identity, the log of its rows, and the steps without a reply."""

    client: Client
    handle: int
    blocks: tuple[int, int]
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    secret: str = field(default_factory=lambda: secrets.token_hex(32))
    grant: dict[str, Any] | None = None
    next_seq: int = 1
    ack: int = 0
    resyncs: int = 0
    replies: dict[int, tuple[Frame, Rows]] = field(default_factory=dict)  # by ticket
    refusals: dict[int, Refused] = field(default_factory=dict)  # by ticket; 0 is the session itself
    answers: dict[int, Frame] = field(default_factory=dict)  # the last CANCEL, CLOSE ... by kind
    _log: list[Row] = field(default_factory=list)  # one row per settled position
    _draft: list[Row] = field(default_factory=list)  # the rows of an answered draft that nothing has decided on
    _draft_lost: bool = False  # the server does not hold that draft any more
    _queue: list[Pending] = field(default_factory=list)
    _sent: dict[int, Pending] = field(default_factory=dict)  # by seq
    _tickets: int = 0
    _pause: float = 0.0  # seconds until a refused step may be sent again

    @property
    def length(self) -> int:
        """Settled positions, those of unanswered steps not counted."""
        return len(self._log)

    def submit(
        self, rows: Rows, first: int | None = None, *, codec: int = wire.FP32, flags: int = 0,
        tree: Sequence[int] | None = None, accept: Sequence[int] = (),
    ) -> int:  # fmt: skip
        """Queue one step and return its ticket. `tree` has the ancestor bits of each row."""
        head = b"" if tree is None else np.array(tree, "<u8").tobytes()
        head += bytes(accept) + bytes(-len(accept) % 8)
        flags |= (TREE if tree is not None else 0) | (ACCEPT if accept else 0)
        first = self.length if first is None else first
        frame = Frame(
            wire.STEP, codec, flags, aux=len(accept), first=first, count=len(rows),
            payload=head + wire.encode_rows(rows, codec),
        )  # fmt: skip
        if self._draft and self._draft_lost:
            frame = self._send_accepted_rows(frame)
        self._tickets += 1
        self._queue.append(Pending(self._tickets, frame))
        return self._tickets

    def step(self, rows: Rows, first: int | None = None, **options: Any) -> Rows:
        """Send one step and wait for its reply."""
        return self.wait(self.submit(rows, first, **options))

    def wait(self, ticket: int) -> Rows:
        """The rows that a step's reply holds."""
        return self.wait_frame(ticket)[1]

    def wait_frame(self, ticket: int) -> tuple[Frame, Rows]:
        """A step's reply."""
        self.client.flush()
        while ticket not in self.replies:
            self._raise_refusal(ticket)
            self.client.pump()
        return self.replies.pop(ticket)

    def wait_ready(self) -> None:
        """Wait for the Grant or RESYNC that answers OPEN, ATTACH or FORK."""
        resyncs = self.resyncs
        while self.grant is None and self.resyncs == resyncs:
            self._raise_refusal(0)
            self.client.pump()

    def ask(self, kind: int, seq: int = 0) -> Frame:
        """Send CANCEL or CLOSE and wait for its answer."""
        self.answers.pop(kind, None)
        self.client.flush()
        self.client.send([Frame(kind, handle=self.handle, seq=seq)])
        while kind not in self.answers:
            self._raise_refusal(0)
            self.client.pump()
        return self.answers[kind]

    def cancel(self, seq: int) -> Frame:
        """Drop the steps from `seq` on that still wait."""
        answer = self.ask(wire.CANCEL, seq)
        self.next_seq, self._sent = answer.seq + 1, {}
        return answer

    def close(self) -> None:
        """Free the session and its handle."""
        self.ask(wire.CLOSE)
        del self.client.sessions[self.handle]

    def fork(self, at: int) -> Session:
        """A new session that shares the first `at` positions."""
        child = self.client.new_session(self.blocks)
        child._log = self._log[:at]
        fields = {"parent": self.handle, "at": at, "session": child.id, "secret": child.secret}
        self.client.send([control(wire.FORK, fields, handle=child.handle)])
        child.wait_ready()
        return child

    def sendable(self) -> list[Frame]:
        """Number the queued steps that the window takes and count them as sent."""
        frames = []
        if self._pause and self._queue and self._has_room(self._queue[0].frame):
            time.sleep(self._pause)
            self._pause = 0.0
        while self._queue and self._has_room(self._queue[0].frame):
            pending = self._queue.pop(0)
            pending.frame = replace(pending.frame, handle=self.handle, seq=self.next_seq, ack=self.ack)
            self._sent[self.next_seq] = pending
            self.next_seq += 1
            frames.append(pending.frame)
        return frames

    def _has_room(self, frame: Frame) -> bool:
        if any(seq >= self.next_seq for seq in self._sent):
            return False  # steps behind a refused one: an ERROR for each is still to come
        steps, size = EARLY_STEPS, EARLY_BYTES
        if self.grant is not None:
            steps, size = self.grant["window_steps"], self.grant["window_bytes"]
        under_way = [pending.frame.size for pending in self._sent.values()]
        return self.next_seq - self.ack <= steps and (not under_way or sum(under_way) + frame.size <= size)

    def resend(self) -> list[Frame]:
        """After ATTACH was granted: the unanswered steps with their old numbers."""
        for pending in self._sent.values():
            pending.frame = replace(pending.frame, handle=self.handle)
        return [self._sent[seq].frame for seq in sorted(self._sent)]

    def take(self, frame: Frame) -> None:
        """Handle one frame of this session."""
        self.answers[frame.kind] = frame
        if frame.kind in (wire.OPEN, wire.ATTACH, wire.FORK):
            self.grant = frame.json()
        elif frame.kind == wire.REPLY:
            self._take_reply(frame)
        elif frame.kind == wire.RESYNC:
            self._resync(frame)
        elif frame.kind == wire.ERROR:
            self._take_error(Refused(frame))

    def _take_error(self, refused: Refused) -> None:
        seq = refused.frame.seq
        pending = self._sent.pop(seq, None)
        if pending is None:
            self.refusals[0] = refused
            return
        self.next_seq = min(self.next_seq, seq)  # a refused step does not use up its number
        behind = any(0 < other.frame.seq < seq for other in self._queue)
        if refused.retry_after_ms or (refused.code == SEQUENCE_GAP and behind):
            self._pause = max(self._pause, refused.retry_after_ms / 1000)
            self._queue.append(pending)  # it keeps its seq until it is sent again: those come first, in order
            self._queue.sort(key=lambda other: other.frame.seq or math.inf)
        else:
            self.refusals[pending.ticket or 0] = refused

    def _raise_refusal(self, ticket: int) -> None:
        for key in (ticket, 0):
            if key in self.refusals:
                raise self.refusals.pop(key)

    def _take_reply(self, frame: Frame) -> None:
        self.ack = max(self.ack, frame.seq)  # the replies of one session come in order
        pending = self._sent.pop(frame.seq, None)
        if pending is None or pending.ticket is None:
            return
        self.replies[pending.ticket] = frame, wire.decode_rows(frame.payload, frame.codec, self.client.width)
        step = pending.frame
        self._log, self._draft, self._draft_lost = self._settled_before(step), [], False
        if step.flags & DRAFT:
            self._draft = self._rows_of(step)
        else:
            self._log += self._rows_of(step)

    def _settled_before(self, step: Frame) -> list[Row]:
        """The rows of the positions before `step`, those included that it accepts of an answered draft."""
        rows = self._log + self._draft
        if step.flags & ACCEPT:
            start = 8 * step.count if step.flags & TREE else 0
            rows = self._log + [self._draft[node] for node in step.payload[start : start + step.aux]]
        return rows[: step.first]

    def _rows_of(self, step: Frame) -> list[Row]:
        size = row_bytes(step.codec, self.client.width)
        data = step.payload[len(step.payload) - step.count * size :]
        return [(step.codec, data[at : at + size]) for at in range(0, len(data), size)]

    def _send_accepted_rows(self, step: Frame) -> Frame:
        """The server lost a draft: send what `step` keeps of it as settled rows, and `step` without its ACCEPT."""
        settled = self._settled_before(step)
        self._queue += self._replay(settled, len(self._log))
        self._log, self._draft = max(self._log, settled, key=len), []
        return _without_accept(step)

    def _replay(self, rows: list[Row], start: int) -> list[Pending]:
        """Steps with REPLY_NONE of `rows` from `start` on, each of one codec and within the limits."""
        steps, at = [], start
        while at < len(rows):
            codec, row = rows[at]
            most = min(self.client.max_rows(len(row)), len(rows) - at)
            run = next((n for n in range(most) if rows[at + n][0] != codec), most)
            data = b"".join(row for _, row in rows[at : at + run])
            steps.append(Pending(None, Frame(wire.STEP, codec, REPLY_NONE, first=at, count=run, payload=data)))
            at += run
        return steps

    def _resync(self, resync: Frame) -> None:
        """Confirm; queue the log's rows that the server lacks and then what was unanswered, under new numbers."""
        self.resyncs += 1
        self.client.send([Frame(wire.RESYNC, handle=self.handle, seq=resync.seq, first=resync.first)])
        again = [self._sent[seq] for seq in sorted(self._sent)] + self._queue
        again = [Pending(old.ticket, replace(old.frame, seq=0)) for old in again if old.ticket is not None]
        self.next_seq, self.ack, self._sent, self._draft_lost = resync.seq + 1, resync.seq, {}, True
        rows = self._log
        if again:
            rows = self._settled_before(again[0].frame)
            again[0].frame = _without_accept(again[0].frame)
            self._log, self._draft = max(self._log, rows, key=len), []
        self._queue = self._replay(rows, resync.first) + again


def _without_accept(step: Frame) -> Frame:
    """The step with its accept list taken out."""
    if not step.flags & ACCEPT:
        return step
    start = 8 * step.count if step.flags & TREE else 0
    rest = step.payload[:start] + step.payload[start + step.aux + -step.aux % 8 :]
    return replace(step, flags=step.flags & ~ACCEPT, aux=0, payload=rest)
