"""One queued step, and what a chain of steps does to a session's positions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from split_llama.draft_tree import check_path
from split_llama.errors import BadRequest, BadStates, ContextExceeded, PositionGap
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Flag, Frame, Kind
from split_llama.wire.step import parse_step, reply_rows

# Plain integers: an IntFlag makes a new member at each `&`, and this module runs for every step.
_LAST, _DRAFT = int(Flag.REPLY_LAST), int(Flag.DRAFT)


# Neither steps nor positions are frozen, though nobody changes one: frozen, they would take five times as long to make.
@dataclass(slots=True)
class Step:
    """A step that was checked against its own header. `rows` holds `count` encoded rows, not yet decoded.

    `size` is the bytes of its frame, `arrived` a monotonic time in seconds, `left` what the step leaves behind.
    """

    seq: int
    first: int
    count: int
    codec: Codec
    flags: int
    tree: tuple[int, ...] | None
    accept: tuple[int, ...] | None
    rows: bytes | memoryview
    size: int
    arrived: float
    left: Positions

    @classmethod
    def from_frame(cls, frame: Frame, width: int, max_rows: int, now: float) -> Step:
        """Check and cut up a STEP frame. Raises `BadRequest`, `BadStates`."""
        if frame.count > max_rows:
            raise BadStates(f"a step may have {max_rows} rows here, {frame.count} came; send it in parts")
        payload = parse_step(frame, width)
        draft = Draft(frame.first, frame.count, payload.tree) if frame.flags & _DRAFT else None
        return cls(
            seq=frame.seq,
            first=frame.first,
            count=frame.count,
            codec=payload.codec,
            flags=frame.flags,
            tree=payload.tree,
            accept=payload.accept,
            rows=payload.rows,
            size=frame.size,
            arrived=now,
            left=Positions(frame.first + frame.count, draft),
        )

    @property
    def end(self) -> int:
        """Length of the session once this step is applied."""
        return self.first + self.count

    @property
    def is_draft(self) -> bool:
        """Say whether the rows stay tentative."""
        return bool(self.flags & _DRAFT)

    @property
    def is_decode(self) -> bool:
        """Say whether this looks like generation and not like part of a prompt or a replay: one row, or a draft."""
        return (self.count == 1 or self.is_draft) and self.num_replies > 0

    @property
    def num_replies(self) -> int:
        """Rows of the reply."""
        return reply_rows(self.flags, self.count)

    def continues(self, before: Step) -> bool:
        """Say whether this step only appends to `before`, so that both can be one run of rows."""
        return self.first == before.end and self.accept is None and self.tree is None and before.tree is None

    def reply(self, rows: bytes) -> Frame:
        """Build the REPLY around encoded rows; the handle is filled in when it is sent."""
        first = self.end - 1 if self.flags & _LAST else self.first
        return Frame(Kind.REPLY, self.codec, seq=self.seq, first=first, count=self.num_replies, payload=rows)


@dataclass(frozen=True, slots=True)
class Draft:
    """Tentative rows from `base` on; `tree` is `None` for a chain."""

    base: int
    count: int
    tree: tuple[int, ...] | None


@dataclass(slots=True)
class Positions:
    """A session's length, tentative rows included, and its pending draft."""

    length: int = 0
    draft: Draft | None = None

    @property
    def committed(self) -> int:
        """Positions that stay."""
        return self.length if self.draft is None else self.draft.base

    def check(self, step: Step, max_length: int) -> None:
        """Check that a step fits behind. Raises `PositionGap`, `ContextExceeded`, `BadRequest`."""
        if step.accept is not None:
            self._check_accept(step)
        elif step.first > self.length:
            raise PositionGap(
                f"step {step.seq} begins at position {step.first}, the session has {self.length} positions; "
                "send what is missing first"
            )
        elif self.draft is not None and self.draft.tree is not None and step.first > self.draft.base:
            raise BadRequest(
                f"a draft tree is pending from position {self.draft.base}: say which nodes to accept, or begin at "
                f"{self.draft.base} or before; position {step.first} came"
            )
        if step.end > max_length:
            raise ContextExceeded(
                f"step {step.seq} would make the session {step.end} positions long, this server's context holds "
                f"{max_length}; shorten the prompt or the answer"
            )

    def _check_accept(self, step: Step) -> None:
        nodes: Sequence[int] = step.accept or ()
        if self.draft is None:
            raise BadRequest(f"step {step.seq} accepts nodes {list(nodes)}, but no draft is pending")
        check_path(nodes, self.draft.count, self.draft.tree)
        expected = self.draft.base + len(nodes)
        if step.first != expected:
            raise PositionGap(
                f"step {step.seq} accepts {len(nodes)} nodes of the draft at {self.draft.base}, so it must begin at "
                f"position {expected}; {step.first} came"
            )
