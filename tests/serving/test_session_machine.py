"""The session protocol as a state machine, against a model that is a list of row numbers.

The pages are simulated too: every row has a number, the plan's edits and runs move the numbers about, and what a
session finds in its slots must be what the model says.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serving.session import Phase, Session, Terms
from serving.steps import Step
from split_llama.config import BlockRange
from split_llama.engine.pages import CopyPage, DropSwap, MoveSlots, PagePool, SwapIn, SwapOut, ZeroPages
from split_llama.engine.sequence import Sequence
from split_llama.errors import (
    BadRequest,
    ContextExceeded,
    FlLlamaError,
    NonFiniteStates,
    OutOfPages,
    PositionGap,
    SequenceGap,
    StaleStep,
    WindowExceeded,
)
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Flag, Frame, Kind
from split_llama.wire.step import build_step

PAGE, PAGES, SWAP_PAGES, MAX_LENGTH, WINDOW = 4, 9, 6, 24, 5
TERMS = Terms(window_steps=WINDOW, window_bytes=10_000, max_step_rows=8, max_length=MAX_LENGTH, width=1)
TREES = [(1, 3, 5), (1, 3, 7, 11), (1, 3, 5, 13, 21)]
PATHS = {2: (0, 2), 3: (0, 1), 4: (0, 2, 4)}
BLOCKS = BlockRange(1, 2)


@dataclass
class View:
    """What the model knows: the rows, and where the pending draft begins."""

    rows: list[int] = field(default_factory=list)
    base: int | None = None
    tree: tuple[int, ...] | None = None

    def after(self, step: Planned) -> View:
        """The specification: rules 5 and 7 and the section on drafts of docs/protocol.md."""
        rows = list(self.rows)
        if step.accept is not None:
            if self.base is None:
                raise BadRequest("no draft")
            draft = rows[self.base :]
            for depth, node in enumerate(step.accept):
                path = sum(1 << n for n in step.accept[: depth + 1])
                if node >= len(draft) or (self.tree or [(2 << i) - 1 for i in range(len(draft))])[node] != path:
                    raise BadRequest("no path")
            rows = rows[: self.base] + [draft[node] for node in step.accept]
            if step.first != len(rows):
                raise PositionGap("first")
        elif step.first > len(rows):
            raise PositionGap("first")
        elif self.base is not None and self.tree is not None and step.first > self.base:
            raise BadRequest("cuts into the tree")
        if step.first + len(step.rows) > MAX_LENGTH:
            raise ContextExceeded("too long")
        return View(
            rows[: step.first] + step.rows, step.first if step.draft else None, step.tree if step.draft else None
        )


@dataclass
class Planned:
    seq: int
    first: int
    rows: list[int]
    draft: bool
    tree: tuple[int, ...] | None
    accept: tuple[int, ...] | None


@dataclass
class Twin:
    """A session and its model."""

    real: Session
    view: View = field(default_factory=View)
    queue: list[Planned] = field(default_factory=list)
    applied: int = 0
    acked: int = 0
    lost: bool = False
    waiting: bool = False

    @property
    def projected(self) -> View:
        view = self.view
        for step in self.queue:
            view = view.after(step)
        return view


def cache_slots(pages: tuple[int, ...]) -> list[int]:
    return [page * PAGE + offset for page in pages for offset in range(PAGE)]


class SessionMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.pool = PagePool(PAGES, PAGE, swap_pages=SWAP_PAGES)
        self.cells: dict[int, int] = {}
        self.host: dict[int, list[int | None]] = {}
        self.numbers = itertools.count(1)
        self.twins: list[Twin] = []
        self.open_session()

    @rule()
    def open_session(self) -> None:
        if len(self.twins) < 4:
            self.twins.append(Twin(Session(Sequence(self.pool, BLOCKS, MAX_LENGTH), self.pool, TERMS)))

    def pick(self, data: st.DataObject) -> Twin:
        return data.draw(st.sampled_from(self.twins), label="session")

    @rule(data=st.data(), grow=st.sampled_from(["plain", "plain", "chain", "tree"]), back=st.integers(0, 12))
    def advance(self, data: st.DataObject, grow: str, back: int) -> None:
        """A step that fits, and at once its pass: this is how sessions get anywhere."""
        twin = self.pick(data)
        view, seq = twin.projected, twin.applied + len(twin.queue) + 1
        tree = data.draw(st.sampled_from(TREES)) if grow == "tree" else None
        rows = [next(self.numbers) for _ in range(len(tree) if tree else data.draw(st.integers(1, 6)))]
        first, accept = len(view.rows), None
        if view.base is not None and view.tree is not None:
            accept = PATHS[len(view.tree) - 1]
            first = view.base + len(accept)
        elif back < 6:
            first = max(0, first - back)
        elif back == 6 and tree is None:
            # As far as the context goes, from a little before the end: this is where pages run out.
            first = max(0, first - 2)
            rows += [next(self.numbers) for _ in range(min(8, MAX_LENGTH - first) - len(rows))]
        self.exchange(twin, Planned(seq, first, rows, grow != "plain", tree, accept), twin.applied)
        if twin.real.ready_rows() and back != 5:
            self.pass_over(twin, 1, bad=None)

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        self.exchange(twin, *self.draw_step(data, twin))

    def exchange(self, twin: Twin, step: Planned, ack: int) -> None:
        expected = self.predict(twin, step, ack)
        flags = Flag.DRAFT if step.draft else Flag(0)
        frame = build_step(
            handle=1,
            seq=step.seq,
            ack=ack,
            first=step.first,
            count=len(step.rows),
            codec=Codec.FP32,
            rows=struct.pack(f"<{len(step.rows)}I", *step.rows),
            flags=flags,
            tree=step.tree,
            accept=step.accept,
        )
        if isinstance(expected, type):
            with pytest.raises(expected):
                twin.real.offer(frame, 0.0)
        else:
            got = twin.real.offer(frame, 0.0)
            if expected == "queued":
                assert isinstance(got, Step)
                twin.queue.append(step)
            elif expected == "reply":
                assert isinstance(got, Frame)
                assert (got.kind, got.seq) == (Kind.REPLY, step.seq)
            elif expected == "resync":
                assert isinstance(got, Frame)
                assert (got.kind, got.seq, got.first) == (Kind.RESYNC, twin.applied, 0)
                twin.lost, twin.waiting = False, True
            else:
                assert got is None
        if not (twin.lost or twin.waiting) and ack <= twin.applied:
            twin.acked = max(twin.acked, ack)

    def draw_step(self, data: st.DataObject, twin: Twin) -> tuple[Planned, int]:
        view, after = twin.view, len(twin.queue)
        for step in twin.queue:
            view = view.after(step)
        seq = data.draw(st.sampled_from([twin.applied + after + 1] * 8 + [1, twin.applied, twin.applied + after + 2]))
        ack = data.draw(st.sampled_from([twin.applied] * 4 + [twin.acked, twin.applied + 1]))
        kind = data.draw(st.sampled_from(["plain"] * 4 + ["chain", "tree"]))
        tree = data.draw(st.sampled_from(TREES)) if kind == "tree" else None
        count = len(tree) if tree else data.draw(st.integers(1, 6))
        accept = None
        first = data.draw(st.sampled_from([len(view.rows)] * 6 + [len(view.rows) + 1, 0, max(0, len(view.rows) - 3)]))
        if view.base is not None and data.draw(st.booleans()):
            accept = data.draw(st.sampled_from([(0,), (0, 1), (0, 2), (0, 2, 3), (0, 1, 3), (0, 1, 2)]))
            first = view.base + len(accept) + data.draw(st.sampled_from([0, 0, 0, 0, 1]))
        elif data.draw(st.integers(0, 9)) == 0:
            accept = (0,)
        rows = [next(self.numbers) for _ in range(count)]
        return Planned(max(1, seq), first, rows, kind != "plain", tree, accept), ack

    def predict(self, twin: Twin, step: Planned, ack: int) -> str | type[FlLlamaError]:
        if twin.lost:
            return "resync"
        if twin.waiting:
            return "ignored"
        if ack > twin.applied:
            return BadRequest
        acked = max(ack, twin.acked)
        if step.seq <= twin.applied:
            return "reply" if step.seq > acked else StaleStep
        last = twin.applied + len(twin.queue)
        if step.seq <= last:
            return "ignored"
        if step.seq > last + 1:
            return SequenceGap
        try:
            twin.projected.after(step)
        except FlLlamaError as error:
            return type(error)
        return WindowExceeded if step.seq - acked > WINDOW else "queued"

    @rule(data=st.data(), bad=st.integers(0, 12))
    def run_pass(self, data: st.DataObject, bad: int) -> None:
        twin = self.pick(data)
        ready = twin.real.ready_rows()
        assert bool(ready) == bool(twin.queue)
        if not ready:
            return
        self.pass_over(twin, data.draw(st.integers(1, len(ready))), bad)

    def pass_over(self, twin: Twin, count: int, bad: int | None) -> None:
        steps = twin.real.start(count)
        planned = []
        for index, step in enumerate(steps):
            try:
                if index == bad:
                    raise NonFiniteStates("bad")
                was_away = twin.real.sequence.ticket is not None
                before = twin.real.sequence.block_table, twin.real.sequence.length, twin.real.sequence.committed
                needed, free = twin.real.pages_needed(step), self.pool.num_free
                run = twin.real.plan(step)
                assert needed <= free
                assert self.pool.num_free == free - needed or was_away
            except (NonFiniteStates, OutOfPages) as error:
                if isinstance(error, OutOfPages):
                    assert needed > free
                    sequence = twin.real.sequence
                    assert (sequence.block_table, sequence.length, sequence.committed) == before
                self.expect_refusals(twin, step, error, len(planned))
                break
            planned.append((step, run))
        self.compute([(step, run) for step, run in planned])
        for step, _ in planned:
            twin.real.complete(step, step.reply(b""))
            twin.view = twin.view.after(twin.queue.pop(0))
            twin.applied += 1

    def expect_refusals(self, twin: Twin, step: Step, error: FlLlamaError, planned: int) -> None:
        refusals = twin.real.refuse(step, error)
        assert [seq for seq, _ in refusals] == [queued.seq for queued in twin.queue[planned:]]
        assert refusals[0] == (step.seq, error)
        assert all(isinstance(refusal, SequenceGap) for _, refusal in refusals[1:])
        del twin.queue[planned:]

    def compute(self, planned: list[tuple[Step, object]]) -> None:
        """What the engine does: edits in order, then the rows."""
        for edit in self.pool.take_edits():
            if isinstance(edit, ZeroPages):
                for page in edit.pages:
                    for slot in range(page * PAGE, (page + 1) * PAGE):
                        self.cells.pop(slot, None)
            elif isinstance(edit, CopyPage):
                for slot in range(edit.slots):
                    self.cells[edit.target * PAGE + slot] = self.cells[edit.source * PAGE + slot]
            elif isinstance(edit, MoveSlots):
                moved = [self.cells[slot] for slot in edit.sources]
                self.cells.update(zip(edit.targets, moved, strict=True))
            elif isinstance(edit, SwapOut):
                self.host[edit.ticket] = [self.cells.get(slot) for slot in cache_slots(edit.pages)]
            elif isinstance(edit, SwapIn):
                for slot, number in zip(cache_slots(edit.pages), self.host.pop(edit.ticket), strict=True):
                    self.cells.pop(slot, None)
                    if number is not None:
                        self.cells[slot] = number
            elif isinstance(edit, DropSwap):
                del self.host[edit.ticket]
        assert sum(map(len, self.host.values())) == self.pool.num_swapped * PAGE
        for step, run in planned:
            numbers = struct.unpack(f"<{step.count}I", step.rows)
            self.cells.update(zip(run.cache_slots(PAGE), numbers, strict=True))  # type: ignore[attr-defined]

    @rule(data=st.data(), back=st.integers(0, 4))
    def cancel(self, data: st.DataObject, back: int) -> None:
        twin = self.pick(data)
        seq = twin.applied + len(twin.queue) + 1 - back
        answer = twin.real.cancel(seq)
        twin.queue = [step for step in twin.queue if step.seq < seq]
        if not twin.queue:
            assert answer is not None
            assert (answer.kind, answer.seq, answer.first) == (Kind.CANCEL, twin.applied, len(twin.view.rows))
        else:
            assert answer is None

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        twin = self.pick(data)
        settled = [len(twin.view.rows) if twin.view.base is None else twin.view.base]
        limit = min(settled + [step.first for step in twin.queue])
        at = data.draw(st.sampled_from([limit, limit, limit // 2, limit + 1, len(twin.view.rows)]))
        if len(self.twins) >= 4:
            return
        if at > limit:
            with pytest.raises(PositionGap):
                twin.real.fork(at)
            return
        try:
            child = twin.real.fork(at)
        except OutOfPages:
            assert twin.real.sequence.ticket is not None
            return
        self.compute([])
        self.twins.append(Twin(child, View(twin.view.rows[:at])))

    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        """Steps may be queued meanwhile: whoever waits for room may have to give its own up."""
        twin = self.pick(data)
        sequence = twin.real.sequence
        if sequence.block_table and self.pool.can_swap(len(sequence.block_table)):
            twin.real.swap_out()
            self.compute([])

    @rule(data=st.data(), count=st.integers(1, 5), keep=st.integers(0, 4))
    def postpone(self, data: st.DataObject, count: int, keep: int) -> None:
        """Steps that find no room go back into the queue, those behind them too; nothing else changes."""
        twin = self.pick(data)
        ready = twin.real.ready_rows()
        if ready:
            steps = twin.real.start(min(count, len(ready)))
            if keep < len(steps):
                twin.real.postpone(steps[keep])
            assert tuple(twin.real.running) == steps[:keep]
            if twin.real.running:
                twin.real.postpone(steps[0])
            assert twin.real.ready_rows() == ready

    @rule(data=st.data(), really=st.integers(0, 3))
    def lose(self, data: st.DataObject, really: int) -> None:
        if really:
            return
        twin = self.pick(data)
        twin.real.lose()
        twin.view, twin.queue, twin.acked = View(), [], twin.applied
        twin.lost, twin.waiting = True, False

    @rule(data=st.data(), wrong=st.integers(0, 4))
    def echo(self, data: st.DataObject, wrong: int) -> None:
        twin = self.pick(data)
        frame = Frame(Kind.RESYNC, seq=twin.applied + (wrong == 0), first=0)
        if twin.waiting and wrong == 0:
            with pytest.raises(BadRequest):
                twin.real.resynced(frame)
            return
        twin.real.resynced(frame)
        twin.waiting = False

    @rule(data=st.data(), really=st.integers(0, 2))
    def close(self, data: st.DataObject, really: int) -> None:
        if really or len(self.twins) < 2:
            return
        twin = self.pick(data)
        twin.real.close()
        assert twin.real.phase is Phase.CLOSED
        self.twins.remove(twin)

    @invariant()
    def pages_are_conserved_and_hold_the_right_rows(self) -> None:
        if not hasattr(self, "twins"):
            return
        sequences = [twin.real.sequence for twin in self.twins]
        self.pool.check_integrity(
            [sequence.block_table for sequence in sequences],
            [sequence.ticket for sequence in sequences if sequence.ticket is not None],
        )
        for twin in self.twins:
            ticket = twin.real.sequence.ticket
            found = (
                [self.cells.get(slot) for slot in cache_slots(twin.real.sequence.block_table)]
                if ticket is None
                else self.host[ticket]
            )
            assert found[: len(twin.view.rows)] == twin.view.rows
            assert twin.real.settled.length == len(twin.view.rows)
            assert twin.real.applied == twin.applied
            assert len(twin.real.queued) == len(twin.queue)


SessionMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
TestSessionMachine = SessionMachine.TestCase
