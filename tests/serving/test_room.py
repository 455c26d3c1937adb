"""Room in the pages: whatever sessions do, promises are kept, pages conserved, and somebody always gets on."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.metrics import Metrics
from serving.registry import Entry
from serving.room import PATIENCE_SECONDS, PROMISE_SECONDS, Room
from serving.session import Phase, Session, Terms
from serving.steps import Step
from split_llama.config import BlockRange
from split_llama.engine.pages import PagePool
from split_llama.engine.sequence import Sequence
from split_llama.errors import OutOfPages
from split_llama.wire.codec import Codec
from split_llama.wire.frame import Frame, Kind
from split_llama.wire.step import build_step

PAGE, MAX_LENGTH, EVICT = 4, 96, 2.0
TERMS = Terms(window_steps=64, window_bytes=10**6, max_step_rows=32, max_length=MAX_LENGTH, width=1)
BLOCKS = BlockRange(1, 2)


class Place:
    """Sessions over a pool, with a clock that is turned by hand."""

    def __init__(self, pages: int, swap_pages: int = 0) -> None:
        self.pool = PagePool(pages, PAGE, swap_pages)
        self.entries: list[Entry] = []
        self.now = 100.0
        self.metrics = Metrics()
        self.room = Room(self.pool, self.entries, self.metrics, lambda: self.now, EVICT)

    def add(self, session: Session | None = None) -> Entry:
        session = session or Session(Sequence(self.pool, BLOCKS, MAX_LENGTH), self.pool, TERMS)
        fields: dict[str, Any] = {"ident": str(len(self.entries)), "owner": "o", "blocks": BLOCKS, "session": session}
        times = {"opened_at": self.now, "active_at": self.now}
        self.entries.append(Entry(**fields, **times, secret_hash=b"", digests=(None, None)))
        return self.entries[-1]

    def send(self, entry: Entry, count: int) -> bool:
        """Queue a step that appends `count` rows; says whether it fits into the context."""
        session = entry.session
        if session.phase in (Phase.LOST, Phase.WAITING):
            session.resync()
            session.resynced(Frame(Kind.RESYNC, seq=session.applied, first=0))
        last = session.queued[-1] if session.queued else None
        first, seq = (last.end, last.seq) if last else (session.settled.length, session.applied)
        if first + count > MAX_LENGTH or len(session.queued) > 20:
            return False
        rows = struct.pack(f"<{count}I", *range(count))
        fields = {"handle": 1, "seq": seq + 1, "ack": session.applied, "first": first, "count": count}
        entry.session.offer(build_step(**fields, codec=Codec.FP32, rows=rows), self.now)
        entry.active_at = self.now
        return True

    def run(self, entry: Entry) -> bool:
        """Plan and complete an entry's first step, as a pass does; says whether it was refused or put back."""
        session = entry.session
        [step] = session.start(1)
        try:
            self.room.plan(entry, step)
        except OutOfPages as error:
            if self.room.may_wait(entry, step):
                session.postpone(step)
            else:
                session.refuse(step, error)
            return False
        session.complete(step, step.reply(b""))
        entry.active_at = self.now
        return True

    def waiting(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.session.ready_rows()]


class RoomMachine(RuleBasedStateMachine):
    """Sessions of all kinds on few pages."""

    @initialize(pages=st.integers(MAX_LENGTH // PAGE, 40), swap_pages=st.sampled_from([0, 10, 100]))
    def start(self, pages: int, swap_pages: int) -> None:
        self.place = Place(pages, swap_pages)
        self.place.add()

    def pick(self, data: st.DataObject) -> Entry:
        return data.draw(st.sampled_from(self.place.entries))

    @precondition(lambda self: len(self.place.entries) < 6)
    @rule()
    def open(self) -> None:
        self.place.add()

    @rule(data=st.data(), count=st.sampled_from([1, 1, 3, 16, 32]))
    def send(self, data: st.DataObject, count: int) -> None:
        self.place.send(self.pick(data), count)

    @rule(data=st.data(), most=st.integers(1, 4))
    def one_pass(self, data: st.DataObject, most: int) -> None:
        place = self.place
        ready = place.room.ready(place.waiting())
        taken = [entry for entry in data.draw(st.permutations(ready)) if entry.session.queued][:most]
        for number, entry in enumerate(taken):
            step = entry.session.queued[0]
            promised = place.room.promised_to(entry) >= entry.session.pages_needed(step)
            late = not place.room.may_wait(entry, step)
            went = place.run(entry)
            # What was promised is there, and the first one finds what `ready` said there was.
            assert went or not promised
            assert went or number or late

    @rule(data=st.data(), first=st.integers(1, 40))
    def generate(self, data: st.DataObject, first: int) -> None:
        """One session takes steps of one row as far as its promise goes: nobody can stop it."""
        entry, place = self.pick(data), self.place
        if entry.session.queued or not place.send(entry, min(first, 32)) or entry not in place.room.ready([entry]):
            return
        if not place.run(entry):
            return
        session = entry.session
        held = len(session.sequence.block_table)
        end = min((held + place.room.promised_to(entry)) * PAGE, MAX_LENGTH)
        for _ in range(end - session.sequence.length):
            assert place.send(entry, 1)
            assert place.run(entry)

    @rule(data=st.data(), at=st.integers(0, 40))
    def fork(self, data: st.DataObject, at: int) -> None:
        entry, place = self.pick(data), self.place
        session = entry.session
        if session.phase is not Phase.ACTIVE or at > session.settled.length or len(place.entries) >= 6:
            return
        try:
            place.add(place.room.fork(entry, at))
        except OutOfPages:
            assert session.sequence.ticket is not None

    @rule(seconds=st.sampled_from([0.1, 1.0, EVICT, PROMISE_SECONDS, PATIENCE_SECONDS]))
    def time_goes_by(self, seconds: float) -> None:
        self.place.now += seconds

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if len(self.place.entries) > 1:
            entry = self.pick(data)
            self.place.entries.remove(entry)
            entry.session.close()
            self.place.room.forget(entry)

    @invariant()
    def pages_and_promises_add_up(self) -> None:
        if not hasattr(self, "place"):
            return
        sequences = [entry.session.sequence for entry in self.place.entries]
        tickets = [sequence.ticket for sequence in sequences if sequence.ticket is not None]
        self.place.pool.check_integrity([sequence.block_table for sequence in sequences], tickets)
        self.place.room.check_integrity()


TestRoom = RoomMachine.TestCase
TestRoom.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("swap_pages", [0, 1000])
def test_steps_that_all_want_more_than_there_is_all_get_it_in_time(swap_pages: int) -> None:
    """Eight sessions that fill the context, on pages for one: each keeps sending until its last position is there."""
    place = Place(MAX_LENGTH // PAGE, swap_pages)
    entries = [place.add() for _ in range(8)]
    for _ in range(3000):
        for entry in entries:
            session = entry.session
            if session.settled.length < MAX_LENGTH and not session.queued:
                lost = session.phase is Phase.LOST
                missing = MAX_LENGTH - session.settled.length
                place.send(entry, min(32, missing) if lost or session.settled.length < 40 else 1)
        for entry in place.room.ready(place.waiting()):
            if entry.session.queued:
                place.run(entry)
        for entry in [one for one in entries if one.session.settled.length == MAX_LENGTH]:
            place.entries.remove(entry)
            entries.remove(entry)
            entry.session.close()
            place.room.forget(entry)
        if not entries:
            break
        place.now += 0.1
    assert not entries
    assert place.pool.num_used == place.pool.num_swapped == 0


def step_of(entry: Entry) -> Step:
    return entry.session.queued[0]


def test_a_step_that_can_never_fit_is_refused_at_once() -> None:
    place = Place(4)
    entry = place.add()
    place.send(entry, 32)
    assert place.room.ready([entry]) == [entry]
    assert not place.room.may_wait(entry, step_of(entry))
    assert not place.run(entry)
    assert not entry.session.queued


def fill(place: Place, entry: Entry, positions: int) -> None:
    for _ in range(positions // PAGE):
        assert place.send(entry, PAGE)
        assert place.run(entry)


@pytest.mark.parametrize("swap_pages", [0, 100])
def test_who_came_later_and_is_stuck_too_makes_way(swap_pages: int) -> None:
    place = Place(24, swap_pages)
    older, younger = place.add(), place.add()
    for entry in (older, younger):
        fill(place, entry, 12 * PAGE)
        # So that promises are not what they wait for.
        place.room.forget(entry)
    assert place.pool.num_free == 0
    place.send(older, 1)
    place.now += 0.1
    place.send(younger, 1)
    assert place.room.ready([older, younger]) == []
    place.now += 0.9
    assert place.room.ready([older, younger]) == []
    place.now += 0.1
    place.room.ready([older, younger])
    assert not younger.session.sequence.block_table
    assert (younger.session.sequence.ticket is not None) == bool(swap_pages)
    assert place.room.ready(place.waiting()) == [older]
    assert place.run(older)
    assert older.session.settled.length == 12 * PAGE + 1


def test_others_pass_a_waiting_step_by_but_not_for_ever() -> None:
    place = Place(24)
    holder, large, first, second = [place.add() for _ in range(4)]
    fill(place, holder, 80)
    place.room.forget(holder)
    place.send(large, 32)
    place.send(first, 1)
    assert place.room.ready([large, first]) == [first]
    assert place.run(first)
    place.room.forget(first)
    place.now += 1.0
    place.room.ready([large])
    place.send(second, 1)
    assert place.room.ready([large, second]) == []
    place.room.forget(holder)
    holder.session.close()
    assert place.room.ready([large, second]) == [large, second]


def test_a_fork_does_not_lose_its_parent_in_host_memory() -> None:
    place = Place(24, swap_pages=20)
    parent, other = place.add(), place.add()
    fill(place, parent, 60)
    place.now += EVICT
    fill(place, other, 80)
    assert (parent.session.sequence.ticket is not None, place.pool.num_swapped) == (True, 15)
    place.now += EVICT
    # The way back needs the other one's pages, and host memory has no room for them beside the parent's.
    child = place.add(place.room.fork(parent, 60))
    assert (child.session.settled.length, parent.session.settled.length) == (60, 60)
    assert other.session.phase is Phase.LOST


def test_the_oldest_waits_no_longer_than_its_patience() -> None:
    place = Place(MAX_LENGTH // PAGE)
    holder, late = place.add(), place.add()
    for _ in range(3):
        place.send(holder, 32)
        place.run(holder)
    place.send(late, 16)
    assert place.room.ready([late]) == []
    assert place.room.num_waiting == 1
    place.now += PATIENCE_SECONDS
    holder.active_at = place.now
    assert place.room.ready([late]) == [late]
    assert not place.run(late)
    assert not late.session.queued
