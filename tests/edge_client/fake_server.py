"""A server as simple as the protocol allows: B is the identity, all happens at once, and faults are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from split_llama.draft_tree import check_path
from split_llama.errors import FlLlamaError, OutOfPages, PositionGap, SequenceGap, UnknownSession
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Fork, Grant, Open, error_frame
from split_llama.wire.frame import Flag, Frame, Kind
from split_llama.wire.step import parse_step

WINDOW_STEPS = 3
WINDOW_BYTES = 400


@dataclass
class FakeSession:
    rows: list[bytes] = field(default_factory=list)
    applied: int = 0
    acked: int = 0
    replies: dict[int, Frame] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    lost: bool = False
    waiting: bool = False
    base: int | None = None  # of a pending draft
    tree: tuple[int, ...] | None = None


@dataclass
class FakeServer:
    width: int
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    handles: dict[int, str] = field(default_factory=dict)
    refuse_next: FlLlamaError | None = None
    refuse_open: bool = False

    def disconnect(self) -> None:
        self.handles.clear()

    def restart(self) -> None:
        self.handles.clear()
        self.sessions.clear()

    def evict(self, keep: int) -> list[Frame]:
        """Drop all but `keep` positions; give the RESYNC that a server may send unasked."""
        for handle, name in self.handles.items():
            session = self.sessions[name]
            if session.base is not None:
                del session.rows[session.base :]
                session.base = session.tree = None
            del session.rows[keep:]
            session.replies.clear()
            session.sizes.clear()
            session.acked = session.applied
            session.lost = True
            return [self._resync(handle, session)]
        return []

    def on_frame(self, frame: Frame) -> list[Frame]:
        if frame.kind in (Kind.OPEN, Kind.ATTACH):
            return self._open(frame)
        if frame.kind is Kind.FORK:
            return self._fork(frame)
        name = self.handles.get(frame.handle)
        if name is None:
            return [error_frame(frame.handle, frame.seq, UnknownSession("no such handle"))]
        session = self.sessions[name]
        if frame.kind is Kind.RESYNC:
            # An echo of an older RESYNC may still be on its way.
            if session.waiting and (frame.seq, frame.first) == (session.applied, len(session.rows)):
                session.waiting = session.lost = False
            return []
        if frame.kind is Kind.CLOSE:
            del self.sessions[name], self.handles[frame.handle]
            return [Frame(Kind.CLOSE, handle=frame.handle)]
        assert frame.kind is Kind.STEP
        return self._step(frame, session)

    def _open(self, frame: Frame) -> list[Frame]:
        opening = Open.from_bytes(frame.payload)
        if self.refuse_open:
            self.refuse_open = False
            return [error_frame(frame.handle, 0, OutOfPages("full", retry_after_ms=10))]
        known = opening.session in self.sessions
        session = self.sessions.setdefault(opening.session, FakeSession())
        self.handles[frame.handle] = opening.session
        if session.lost or session.waiting or (not known and frame.kind is Kind.ATTACH):
            return [self._resync(frame.handle, session)]
        return [self._grant(frame, session)]

    def _fork(self, frame: Frame) -> list[Frame]:
        fork = Fork.from_bytes(frame.payload)
        parent = self.sessions[self.handles[fork.parent]] if fork.parent in self.handles else None
        if parent is None or parent.lost:
            return [error_frame(frame.handle, 0, UnknownSession("no such parent"))]
        settled = len(parent.rows) if parent.base is None else parent.base
        if fork.at > settled:
            return [error_frame(frame.handle, 0, PositionGap("beyond what is settled"))]
        assert fork.session not in self.sessions, "the id is taken"
        session = self.sessions[fork.session] = FakeSession(rows=parent.rows[: fork.at])
        self.handles[frame.handle] = fork.session
        return [self._grant(frame, session)]

    def _grant(self, frame: Frame, session: FakeSession) -> Frame:
        grant = Grant(
            window_steps=WINDOW_STEPS,
            window_bytes=WINDOW_BYTES,
            length=len(session.rows),
            seq=session.applied,
            grace_seconds=60,
        )
        return Frame(frame.kind, handle=frame.handle, payload=grant.to_bytes())

    def _resync(self, handle: int, session: FakeSession) -> Frame:
        session.waiting = True
        return Frame(Kind.RESYNC, handle=handle, seq=session.applied, first=len(session.rows))

    def _step(self, frame: Frame, session: FakeSession) -> list[Frame]:
        if session.waiting:
            return []
        if session.lost:
            return [self._resync(frame.handle, session)]
        assert frame.ack <= session.applied, "acknowledged what was not answered"
        for seq in range(session.acked + 1, frame.ack + 1):
            session.replies.pop(seq, None)
            session.sizes.pop(seq, None)
        session.acked = max(session.acked, frame.ack)
        if frame.seq <= session.applied:
            return [session.replies[frame.seq]]
        if frame.seq > session.applied + 1:
            return [error_frame(frame.handle, frame.seq, SequenceGap("skipped"))]
        if self.refuse_next is not None:
            error, self.refuse_next = self.refuse_next, None
            return [error_frame(frame.handle, frame.seq, error)]
        return [self._apply(frame, session)]

    def _leave_draft(self, frame: Frame, session: FakeSession, accept: tuple[int, ...] | None) -> None:
        base, tree = session.base, session.tree
        session.base = session.tree = None
        if accept is not None:
            assert base is not None, "nothing to accept"
            check_path(accept, len(session.rows) - base, tree)
            assert frame.first == base + len(accept)
            session.rows[base:] = [session.rows[base + node] for node in accept]
        elif tree is not None:
            assert base is not None
            assert frame.first <= base, "cuts into a tree without saying which nodes stay"

    def _apply(self, frame: Frame, session: FakeSession) -> Frame:
        session.sizes[frame.seq] = frame.size
        # Before the grant the client may send a little more than it will be granted.
        assert len(session.sizes) <= WINDOW_STEPS + 1, "window exceeded"
        assert sum(session.sizes.values()) <= WINDOW_BYTES or len(session.sizes) <= 4
        step = parse_step(frame, self.width)
        rows = bytes(step.rows)
        self._leave_draft(frame, session, step.accept)
        assert frame.first <= len(session.rows), "position gap"
        del session.rows[frame.first :]
        if frame.flags & Flag.DRAFT:
            session.base, session.tree = frame.first, step.tree
        size = row_bytes(Codec(frame.codec), self.width)
        pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
        session.rows.extend(pieces)
        session.applied = frame.seq
        if frame.flags & Flag.REPLY_NONE:
            pieces = []
        elif frame.flags & Flag.REPLY_LAST:
            pieces = pieces[-1:]
        reply = Frame(
            Kind.REPLY,
            codec=frame.codec,
            handle=frame.handle,
            seq=frame.seq,
            first=frame.first,
            count=len(pieces),
            payload=b"".join(pieces),
        )
        session.replies[frame.seq] = reply
        return reply
