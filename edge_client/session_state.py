"""One session's side of the protocol as pure logic: frames in, frames and events out; no clock, no socket.

Steps are numbered, sent inside the granted window and kept until they are answered. Rows of answered steps live in the
replay log. Whatever happens to the server, the session goes on from the log:

- a lost connection: ATTACH, then the unanswered steps again under their old numbers (the server kept their replies);
- RESYNC{have}: rows from `have` on are replayed with replies off, then the unanswered steps follow under new numbers;
- a refusal that may pass (no pages, draining): the step keeps its number and waits; later steps wait behind it.

A draft's rows are tentative: they reach the log when `settle` says which of them stay, and the server hears it with the
next step. A session that nobody waits for (it is kept for the next turn) replays nothing until it is used again.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

from edge_client.session_events import Answer, Closed, Event, Failed, Redirected, Retry
from edge_client.session_steps import PendingDraft, Step
from edge_client.step_log import EncodedRows, StepLog
from split_llama.draft_tree import is_chain
from split_llama.errors import (
    BadRequest,
    BadStates,
    Draining,
    FlLlamaError,
    OutOfPages,
    PositionGap,
    RemoteError,
    SequenceGap,
    UnknownSession,
    WindowExceeded,
)
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Fork, Grant, Moved, Open, error_from_frame
from split_llama.wire.frame import Flag, Frame, Kind
from split_llama.wire.step import build_step, max_rows, reply_rows

# Before the grant comes nobody knows the window; any server takes this much behind an OPEN.
EAGER_STEPS = 4
EAGER_BYTES = 256 * 1024
DEFAULT_RETRY_MS = 200
_NO_FORK = (UnknownSession, PositionGap, BadRequest)


class Phase(Enum):
    """Where the session stands with the server."""

    DETACHED = "no connection"
    OPENING = "OPEN sent, steps may follow"
    ATTACHING = "ATTACH sent, steps wait for the answer"
    LIVE = "granted"
    REFUSED = "waiting to ask again"
    CLOSED = "closed or failed"


@dataclass(slots=True)
class SessionState:
    """The state machine. `opening` is the payload of OPEN and ATTACH; `max_frame_bytes` the server's limit."""

    opening: Open
    width: int
    handle: int = 0
    max_frame_bytes: int = 65536
    max_step_rows: int = 1 << 30
    phase: Phase = Phase.DETACHED
    window_steps: int = EAGER_STEPS
    window_bytes: int = EAGER_BYTES
    log: StepLog = field(init=False)
    _steps: deque[Step] = field(default_factory=deque)
    _control: deque[Frame] = field(default_factory=deque)
    _gaps: Counter[int] = field(default_factory=Counter)
    _draft: PendingDraft | None = None
    _fork: Fork | None = None
    _forked: bool = False
    _resync: Frame | None = None
    _opened: bool = False
    _step_refused: bool = False
    _last_seq: int = 0
    _next_token: int = 0
    _ack: int = 0

    def __post_init__(self) -> None:
        self.log = StepLog(self.width)

    @property
    def unanswered(self) -> int:
        """Steps submitted and not answered, replayed ones not counted."""
        return sum(step.token is not None for step in self._steps)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: everything submitted was answered, and the server has taken the session in."""
        return not self._steps and self.phase not in (Phase.OPENING, Phase.ATTACHING)

    def rows_per_step(self, codec: Codec) -> int:
        """How many rows one step may carry."""
        return min(self.max_step_rows, max_rows(codec, self.width, self.max_frame_bytes))

    def submit(self, first: int, rows: EncodedRows, flags: int = 0) -> int:
        """Queue a step of at most `rows_per_step` rows; give the token that its `Answer` will carry."""
        assert flags in (0, Flag.REPLY_LAST, Flag.REPLY_NONE), "drafts go through `submit_draft`"
        return self._submit(first, rows, flags, None)

    def submit_draft(self, first: int, rows: EncodedRows, tree: tuple[int, ...]) -> int:
        """Queue a draft, `tree` with its ancestor bits; `settle` it once its answer is there, before the next step."""
        chain = is_chain(tree)
        token = self._submit(first, rows, Flag.DRAFT, None if chain else tree)
        self._draft = PendingDraft(first, is_tree=not chain)
        return token

    def settle(self, path: tuple[int, ...]) -> None:
        """Keep the nodes `path` of the answered draft, root to leaf, and drop the others."""
        draft = self._draft
        assert draft is not None, "no draft is pending"
        assert draft.rows is not None, "the draft is not answered yet"
        assert draft.path is None, "the draft is settled already"
        draft.path = path
        self.log.write(draft.base, draft.rows.pick(path))

    def fork(self, opening: Open, at: int) -> SessionState:
        """Give a new session that has the first `at` positions of this one, with `opening`'s id and secret.

        Nothing may be under way here. Whatever the server has kept is shared there, the rest is sent again.
        """
        assert not self._steps, "only an idle session can be forked"
        assert at <= len(self.log), f"fork at {at} of {len(self.log)}"
        child = SessionState(opening, self.width, window_steps=self.window_steps, window_bytes=self.window_bytes)
        child.log = self.log.fork(at)
        # Should the fork be refused, the child is attached like a session that the server has lost.
        child._opened = child._forked = True
        child.max_frame_bytes, child.max_step_rows = self.max_frame_bytes, self.max_step_rows
        if self.phase is Phase.LIVE and self._resync is None:
            kept = at if self._draft is None else min(at, self._draft.base)
            child._fork = Fork(parent=self.handle, at=kept, session=opening.session, secret=opening.secret)
            child._replay(kept, at)
        return child

    def attach(self, handle: int, max_frame_bytes: int, max_step_rows: int) -> None:
        """A connection is there: ask for the session under `handle`. A closed one stays closed."""
        if self.phase is Phase.CLOSED:
            return
        self.handle, self.max_frame_bytes, self.max_step_rows = handle, max_frame_bytes, max_step_rows
        self._control.clear()
        self._ask()

    def detach(self) -> None:
        """The connection is gone; nothing is lost."""
        if self.phase is Phase.CLOSED:
            return
        # The server may have made the session although its grant never came.
        self._opened = self._opened or self.phase in (Phase.OPENING, Phase.ATTACHING)
        self.phase = Phase.DETACHED
        self._fork = self._resync = None
        self._control.clear()
        self._forget_sent()

    def retry(self) -> None:
        """The delay of a `Retry` is over."""
        if self.phase is not Phase.REFUSED:
            return
        if self._step_refused:
            self.phase = Phase.LIVE
        else:
            self._ask()

    def close(self) -> None:
        """Ask the server to free the session; unanswered steps are forgotten."""
        if self.phase not in (Phase.DETACHED, Phase.CLOSED):
            self._control.append(Frame(Kind.CLOSE, handle=self.handle))
        self.phase = Phase.CLOSED
        self._steps.clear()

    def take_frames(self) -> list[Frame]:
        """Give the frames that may be sent now, in order, and count them as sent."""
        frames = list(self._control)
        self._control.clear()
        if self.phase not in (Phase.OPENING, Phase.LIVE):
            return frames
        flying = [step for step in self._steps if step.sent]
        steps, size = len(flying), sum(step.size for step in flying)
        for step in self._steps:
            if step.sent:
                continue
            full = steps >= self.window_steps or size + step.size > self.window_bytes
            if full and steps:
                break
            step.sent, steps, size = True, steps + 1, size + step.size
            frames.append(self._frame(step))
        return frames

    def on_frame(self, frame: Frame) -> list[Event]:
        """Take a frame of this session's handle."""
        if frame.kind is Kind.CLOSE:
            self.phase = Phase.CLOSED
            return [Closed()]
        if self.phase is Phase.CLOSED:
            # What is refused as a whole is not there any more, which is what was asked for.
            return [Closed()] if frame.kind is Kind.ERROR and frame.seq == 0 else []
        if frame.kind in (Kind.OPEN, Kind.ATTACH, Kind.FORK):
            return self._on_grant(Grant.from_bytes(frame.payload))
        if frame.kind is Kind.REPLY:
            return self._on_reply(frame)
        if frame.kind is Kind.ERROR:
            return self._on_error(frame.seq, error_from_frame(frame))
        if frame.kind is Kind.RESYNC:
            return self._on_resync(frame)
        if frame.kind is Kind.MOVED:
            return [Redirected(Moved.from_bytes(frame.payload).address)]
        return self._fail(RemoteError(f"the server sent a {frame.kind.name} frame, which does not belong here"))

    def _ask(self) -> None:
        if self._fork is not None:
            self._ask_fork(self._fork)
            return
        kind = Kind.ATTACH if self._opened else Kind.OPEN
        self.phase = Phase.ATTACHING if self._opened else Phase.OPENING
        self._forget_sent()
        self._control.append(Frame(kind, handle=self.handle, payload=self.opening.to_bytes()))

    def _ask_fork(self, fork: Fork) -> None:
        """Steps may follow a FORK at once; those come first that bring what the parent has not settled there."""
        self.phase = Phase.OPENING
        self._forget_sent()
        self._control.append(Frame(Kind.FORK, handle=self.handle, payload=fork.to_bytes()))

    def _forget_sent(self) -> None:
        self._gaps.clear()
        for step in self._steps:
            step.sent = False

    def _submit(self, first: int, rows: EncodedRows, flags: int, tree: tuple[int, ...] | None) -> int:
        if self._resync is not None:
            self._start_over(self._resync)
        accept = self._leave_draft(first)
        self._next_token += 1
        self._append(Step(first, rows, flags, self._next_token, 0, tree, accept))
        return self._next_token

    def _leave_draft(self, first: int) -> tuple[int, ...] | None:
        """Say what a step at `first` accepts of the draft before it."""
        draft, self._draft = self._draft, None
        return draft.accept_for(first) if draft is not None else None

    def _append(self, step: Step) -> None:
        self._last_seq += 1
        step.seq = self._last_seq
        self._steps.append(step)

    def _replay(self, start: int, stop: int) -> None:
        """Queue the log's rows of `[start, stop)`, with replies off."""
        for first, rows in self.log.read(start, stop):
            at = first
            for piece in rows.cut(self.rows_per_step(rows.codec)):
                self._append(Step(at, piece, Flag.REPLY_NONE, None, 0))
                at += piece.count

    def _frame(self, step: Step) -> Frame:
        return build_step(
            handle=self.handle,
            seq=step.seq,
            ack=self._ack,
            first=step.first,
            count=step.rows.count,
            codec=step.rows.codec,
            rows=step.rows.data,
            flags=step.flags,
            tree=step.tree,
            accept=step.accept,
        )

    def _on_grant(self, grant: Grant) -> list[Event]:
        self.window_steps, self.window_bytes = grant.window_steps, grant.window_bytes
        self._opened, self._fork = True, None
        if self.phase in (Phase.OPENING, Phase.ATTACHING):
            self.phase = Phase.LIVE
        return []

    def _on_reply(self, frame: Frame) -> list[Event]:
        step = self._steps[0] if self._steps else None
        if frame.seq <= self._ack:
            return []  # sent again because an acknowledgement was lost
        if step is None or frame.seq != step.seq or not step.sent:
            expected = f"for step {step.seq}" if step is not None else "no reply"
            return self._fail(RemoteError(f"expected {expected}, the server replied to step {frame.seq}"))
        count = reply_rows(step.flags, step.rows.count)
        codec = step.rows.codec
        if frame.count != count or frame.codec != codec or len(frame.payload) != count * row_bytes(codec, self.width):
            return self._fail(
                BadStates(
                    f"expected {count} rows of {self.width} values in {codec.label}, the server replied with "
                    f"{frame.count} rows and {len(frame.payload)} bytes in codec {frame.codec}"
                )
            )
        self._steps.popleft()
        self._ack = step.seq
        if step.token is None:
            return []
        if step.flags & Flag.DRAFT:
            assert self._draft is not None
            self._draft.rows = step.rows
        else:
            self.log.write(step.first, step.rows)
        reply = EncodedRows(codec, count, bytes(frame.payload)) if count else None
        return [Answer(step.token, step.first + step.rows.count, reply)]

    def _on_resync(self, frame: Frame) -> list[Event]:
        self._opened = True
        self.phase = Phase.LIVE
        self._gaps.clear()
        self._resync = frame
        if self.unanswered:
            self._start_over(frame)
        else:
            # Nobody waits: what the server has lost is sent again when the next step comes.
            self._steps.clear()
        return []

    def _start_over(self, frame: Frame) -> None:
        """Answer a RESYNC: replay from the `first` positions that the server still has, then what was unanswered."""
        self._resync = None
        unanswered = [step for step in self._steps if step.token is not None]
        self._control.append(Frame(Kind.RESYNC, handle=self.handle, seq=frame.seq, first=frame.first))
        self._last_seq = self._ack = frame.seq
        self._steps.clear()
        if self._draft is not None and self._draft.rows is not None:
            # An answered draft is settled by now, and in the log.
            self._draft = None
        self._replay(frame.first, unanswered[0].first if unanswered else len(self.log))
        for step in unanswered:
            # What it accepts was replayed as settled rows.
            step.accept, step.sent = None, False
            self._append(step)

    def _on_error(self, seq: int, error: FlLlamaError) -> list[Event]:
        if isinstance(error, SequenceGap) and self._gaps[seq] > 0:
            self._gaps[seq] -= 1
            return []
        if self._forked and self.phase is Phase.OPENING and isinstance(error, _NO_FORK):
            return self._on_refused_fork(seq)
        if isinstance(error, UnknownSession):
            return self._on_unknown(seq, error)
        passing = isinstance(error, (OutOfPages, Draining, WindowExceeded))
        delay = error.retry_after_ms or (DEFAULT_RETRY_MS if passing else 0)
        if not delay:
            return self._fail(error)
        for step in self._steps:
            if step.sent and seq and step.seq > seq:
                self._gaps[step.seq] += 1
            step.sent = step.sent and 0 < step.seq < seq
        self._step_refused = self.phase is Phase.LIVE or seq > 0
        self.phase = Phase.REFUSED
        return [Retry(delay, error)]

    def _on_refused_fork(self, seq: int) -> list[Event]:
        """The parent is gone, or shorter than we thought: attach instead, the server will ask for the rows."""
        if seq == 0:
            self._fork = None
            self._steps = deque(step for step in self._steps if step.token is not None)
            self._ask()
        return []

    def _on_unknown(self, seq: int, error: FlLlamaError) -> list[Event]:
        """Steps behind a refused OPEN are unknown too, which is no news; a live session was forgotten: attach again."""
        if self.phase is Phase.ATTACHING and seq == 0:
            return self._fail(error)
        if self.phase is Phase.LIVE:
            self._opened = True
            self._ask()
        return []

    def _fail(self, error: FlLlamaError) -> list[Event]:
        self.close()
        return [Failed(error)]
