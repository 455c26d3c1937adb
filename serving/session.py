"""The protocol of one session as a state machine: seq, ack, window, kept replies, drafts, RESYNC, CANCEL.

Pure: no asyncio, no torch, no clock. The caller owns the order of events; a method that raises has changed nothing.
Frames given back carry handle 0: whoever holds the connection fills it in.

    ACTIVE --lose()--> LOST --resync(): at a step or ATTACH--> WAITING --the client's RESYNC--> ACTIVE
    any --close()--> CLOSED

Steps move from `queued` to `running` (`start`), get their pages (`plan`), and then are `complete`d or `refuse`d.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

from serving.steps import Positions, Step
from split_llama.engine.pages import PagePool
from split_llama.engine.plan import SequenceRun
from split_llama.engine.sequence import Sequence
from split_llama.errors import (
    BadRequest,
    FlLlamaError,
    OutOfPages,
    PositionGap,
    SequenceGap,
    StaleStep,
    WindowExceeded,
)
from split_llama.wire.frame import Frame, Kind

Refusal = tuple[int, FlLlamaError]


class Phase(Enum):
    """Where a session stands; see the module's diagram."""

    ACTIVE = "active"
    LOST = "lost"
    WAITING = "waiting"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Terms:
    """What every session is granted. The window counts the steps above the client's `ack`, and their frame bytes."""

    window_steps: int
    window_bytes: int
    max_step_rows: int
    max_length: int
    width: int


class Session:
    """State of one session. It owns `sequence` and with it the pages.

    `settled` are the positions after the last completed step, `applied` its seq; `sequence` runs ahead of them while
    planned steps are running.
    """

    def __init__(self, sequence: Sequence, pool: PagePool, terms: Terms) -> None:
        self.sequence = sequence
        self.terms = terms
        self.phase = Phase.ACTIVE
        self.applied = 0
        self.acked = 0
        self.settled = Positions(sequence.length)
        self.queued: deque[Step] = deque()
        self.running: deque[Step] = deque()
        self._planned = self.settled
        self._pool = pool
        self._replies: dict[int, Frame] = {}
        self._sizes: dict[int, int] = {}
        self._unacked_bytes = 0
        self._cancel_wanted = False

    # What arrives

    def offer(self, frame: Frame, now: float, admit: Callable[[Step], None] | None = None) -> Step | Frame | None:
        """Take in a STEP frame: gives the step it queued, or a frame to send back at once, or nothing.

        `admit` has the last word and may raise. Raises the refusals of the protocol; a refused step keeps its seq.
        """
        if self.phase is Phase.LOST:
            return self.resync()
        if self.phase is not Phase.ACTIVE:
            return None
        self._acknowledge(frame.ack)
        if frame.seq <= self.applied:
            return self._kept_reply(frame.seq)
        newest = self._newest
        last = newest.seq if newest is not None else self.applied
        if frame.seq <= last:
            return None
        if frame.seq > last + 1:
            raise SequenceGap(f"step {last + 1} is expected next, step {frame.seq} came")
        step = Step.from_frame(frame, self.terms.width, self.terms.max_step_rows, now)
        projected = newest.left if newest is not None else self.settled
        projected.check(step, self.terms.max_length)
        self._check_window(step)
        if admit is not None:
            admit(step)
        self.queued.append(step)
        self._sizes[step.seq] = step.size
        self._unacked_bytes += step.size
        return step

    @property
    def _newest(self) -> Step | None:
        if self.queued:
            return self.queued[-1]
        return self.running[-1] if self.running else None

    def _acknowledge(self, ack: int) -> None:
        if ack > self.applied:
            raise BadRequest(f"ack {ack} came, but step {self.applied} is the last one answered")
        for seq in range(self.acked + 1, ack + 1):
            self._replies.pop(seq, None)
            self._unacked_bytes -= self._sizes.pop(seq, 0)
        self.acked = max(self.acked, ack)

    def _kept_reply(self, seq: int) -> Frame:
        if seq not in self._replies:
            raise StaleStep(
                f"step {seq} was applied and its reply acknowledged; step {self.applied} is the last one applied"
            )
        return self._replies[seq]

    def _check_window(self, step: Step) -> None:
        terms = self.terms
        steps, size = len(self._sizes) + 1, self._unacked_bytes + step.size
        # A lone step always fits, however wide its rows are.
        if steps > terms.window_steps or (size > terms.window_bytes and steps > 1):
            raise WindowExceeded(
                f"{steps} steps of {size} bytes would be unacknowledged, {terms.window_steps} steps and "
                f"{terms.window_bytes} bytes were granted; wait for replies and acknowledge them",
                retry_after_ms=50,
            )

    def cancel(self, seq: int) -> Frame | None:
        """Drop queued steps from `seq` on. Gives the CANCEL answer; while steps are left, `finish` gives it later."""
        while self.queued and self.queued[-1].seq >= seq:
            self._forget_size(self.queued.pop())
        self._cancel_wanted = True
        return self.finish()

    def finish(self) -> Frame | None:
        """Give the CANCEL answer once nothing is left that could still move its numbers."""
        if self.running or self.queued or not self._cancel_wanted:
            return None
        self._cancel_wanted = False
        return Frame(Kind.CANCEL, seq=self.applied, first=self.settled.length)

    def resynced(self, frame: Frame) -> None:
        """Take in the client's RESYNC: numbering goes on behind `seq`. Raises `BadRequest` if it is no echo of ours."""
        if self.phase is not Phase.WAITING:
            return
        if frame.seq != self.applied or frame.first != 0:
            raise BadRequest(
                f"RESYNC with first 0 and seq {self.applied} is awaited, first {frame.first} and seq {frame.seq} came"
            )
        self.phase = Phase.ACTIVE

    # Work

    def ready_rows(self) -> tuple[int, ...]:
        """Give the rows of the first queued steps that may ride in one pass; empty while steps are running."""
        if self.running or not self.queued or self.phase is not Phase.ACTIVE:
            return ()
        before = self.queued[0]
        if len(self.queued) == 1:
            return (before.count,)
        rows = [before.count]
        for step in islice(self.queued, 1, None):
            if not step.continues(before):
                break
            rows.append(step.count)
            before = step
        return tuple(rows)

    def start(self, count: int) -> tuple[Step, ...]:
        """Begin with the first `count` queued steps, as far as `ready_rows` gave them."""
        assert not self.running, "steps are running already"
        for _ in range(count):
            self.running.append(self.queued.popleft())
        return tuple(self.running)

    def plan(self, step: Step) -> SequenceRun:
        """Do the page operations of a running step, in order. Raises `OutOfPages`."""
        self._check_pages(step)
        if self.sequence.ticket is not None:
            self.sequence.swap_in()
        draft = self._planned.draft
        if step.accept is not None and draft is not None and draft.tree is not None:
            self.sequence.accept(step.accept)
        elif step.first < self.sequence.length:
            self.sequence.truncate(step.first)
        run = self.sequence.append_draft(step.tree) if step.tree is not None else self.sequence.append(step.count)
        self._planned = step.left
        return run

    def _check_pages(self, step: Step) -> None:
        """Raise `OutOfPages` before anything is rolled back, so that the same step can be sent again."""
        needed, free = self.pages_needed(step), self._pool.num_free
        if needed > free:
            raise OutOfPages(
                f"{needed} more KV pages of {self._pool.page_size} positions are needed, {free} are free; "
                "send the same step again later",
                retry_after_ms=500,
            )

    def pages_needed(self, step: Step) -> int:
        """Give how many free pages the next step to be planned takes; negative if it gives more back."""
        return self.sequence.pages_needed(step.first, step.end)

    def postpone(self, step: Step) -> None:
        """Put an unplanned running step, and those behind it, back into the queue."""
        while self.running and self.running[-1].seq >= step.seq:
            self.queued.appendleft(self.running.pop())

    def complete(self, step: Step, reply: Frame) -> None:
        """Record that the first running step was applied; its reply is kept until it is acknowledged."""
        assert self.running, "no step is running"
        assert self.running[0] is step, "steps complete in order"
        self.running.popleft()
        self.applied = step.seq
        self.settled = step.left
        self._replies[step.seq] = reply

    def refuse(self, step: Step, error: FlLlamaError) -> list[Refusal]:
        """Refuse an unplanned running step; those behind it, running or queued, are refused with `SequenceGap`."""
        while self.running and self.running[-1].seq > step.seq:
            self.queued.appendleft(self.running.pop())
        refused = self.running.pop()
        assert refused is step, "only a running step can be refused"
        self._forget_size(step)
        gap = f"step {step.seq} was refused ({type(error).__name__}) and is expected next"
        refusals = [(step.seq, error), *((later.seq, SequenceGap(gap)) for later in self.queued)]
        self._drop_queue()
        return refusals

    def _drop_queue(self) -> None:
        for step in self.queued:
            self._forget_size(step)
        self.queued.clear()

    def _forget_size(self, step: Step) -> None:
        self._unacked_bytes -= self._sizes.pop(step.seq)

    # Pages come and go

    def fork(self, at: int) -> Session:
        """Share the first `at` positions with a new session.

        Raises `PositionGap` where they are not settled yet, `OutOfPages` if there is no way back from host memory.
        """
        limit = min([self.settled.committed, *(step.first for step in (*self.running, *self.queued))])
        if at > limit:
            raise PositionGap(
                f"a fork at position {at} was asked for, {limit} positions of the session are settled; "
                "wait for the replies of the steps before it"
            )
        if self.sequence.ticket is not None:
            self.sequence.swap_in()
        return Session(self.sequence.fork(at), self._pool, self.terms)

    def swap_out(self) -> None:
        """Move the contents of the pages to host memory, until the next step or fork; the pool must have room there."""
        assert not self.running, "the pages are in use"
        self.sequence.swap_out()

    def lose(self) -> None:
        """Give all pages up and forget all steps; the client hears of it through `resync`."""
        self._reset()
        self.phase = Phase.LOST

    def _reset(self) -> None:
        self.sequence.free()
        self.queued.clear()
        self.running.clear()
        self._replies.clear()
        self._sizes.clear()
        self._unacked_bytes = 0
        self._cancel_wanted = False
        self.settled = self._planned = Positions()
        self.acked = self.applied

    def resync(self) -> Frame:
        """Ask the client to send everything again: gives the RESYNC frame, and steps are ignored until its echo."""
        assert self.phase in (Phase.LOST, Phase.WAITING), "nothing was lost"
        self.phase = Phase.WAITING
        return Frame(Kind.RESYNC, seq=self.applied, first=0)

    def close(self) -> None:
        """End the session and give its pages back."""
        self._reset()
        self.phase = Phase.CLOSED
