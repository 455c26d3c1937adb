"""With a weight set for each client: who waits for whom before a pass, with a clock that tests move."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.server.test_book import Desk, clients
from training.server.book import CloseStep, GoBack, RunForward, Work
from training.server.company import WORTH, PassCost
from training.server.records import Micro, Phase

OWN: dict[str, Any] = {"strategy": "server-hierarchical", "average_every": 100, "steps": 100, "deadline_seconds": None}


def test_a_pass_waits_a_little_for_those_who_are_about_to_come() -> None:
    desk = Desk(**OWN)
    together(desk, [0, 1, 2], took=8.0)
    desk.now = 20.0
    desk.forward(1, 2)
    assert desk.do() is None
    assert desk.book.wakes_at == 20.0 + WORTH * 8.0
    desk.now = 21.0
    desk.forward(0, 2)
    assert desk.do() is None
    assert desk.book.wakes_at == 20.0 + WORTH * 8.0, "it counts from the first"
    desk.forward(2, 2)
    assert clients(desk.do()) == [0, 1, 2], "nobody is missed any more"


def test_who_takes_longer_than_that_is_not_waited_for() -> None:
    desk = Desk(**OWN)
    together(desk, [0, 1, 2], took=8.0)
    for client, at in ((0, 10.0), (1, 10.0), (2, 30.0)):
        desk.now = at
        desk.forward(client, 2)
    assert go(desk, took=8.0) == [0, 1, 2]
    back(desk, [0, 1, 2], 2)
    done = desk.now
    desk.forward(0, 3)
    assert desk.do() is None, "the other one of the quick ones is expected"
    desk.forward(1, 3)
    assert clients(desk.do()) == [0, 1], "the slow one is not"
    assert desk.now == done


def test_nobody_waits_before_the_first_pass_or_for_who_has_to_be_answered_first() -> None:
    desk = Desk(**OWN)
    desk.forward(1)
    assert clients(desk.do()) == [1]
    desk = Desk(**OWN)
    together(desk, [0, 1], took=8.0, go_back=False)
    desk.backward(1)
    desk.now += 30.0
    assert clients(desk.do()) == [1]
    desk.commit(1)
    assert isinstance(desk.do(), CloseStep)
    desk.forward(1, 2)
    assert clients(desk.do()) == [1], "the other's gradient has not come yet: it sends no states before"


def test_who_waits_at_the_meeting_is_not_expected() -> None:
    desk = Desk(**(OWN | {"average_every": 2}))
    together(desk, [0, 1, 2], took=8.0)
    for client in (0, 1):
        desk.forward(client, 2)
    desk.now += WORTH * 8.0
    assert clients(desk.do()) == [0, 1]
    back(desk, [0, 1], 2, closes=False)
    desk.forward(2, 2)
    assert clients(desk.do()) == [2]


def test_no_room_for_more_leaves_nothing_to_wait_for() -> None:
    desk = Desk(**OWN)
    together(desk, [0, 1, 2], took=8.0)
    desk.forward(0, 2)
    desk.forward(1, 2)
    assert desk.book.next(desk.now, lambda micros: 0) is None
    assert desk.book.wakes_at is None
    assert clients(desk.book.next(desk.now, lambda micros: 1)) == [0]


def test_asking_again_is_asking_for_memory_alone() -> None:
    desk = Desk(clients=2)
    desk.forward(0)
    desk.forward(1)
    asked: list[int] = []

    def none(micros: Sequence[Micro]) -> int:
        asked.append(len(micros))
        return 0

    opened = desk.ledger.tracks[0].opened
    assert desk.book.next(0.0, none) is None
    assert opened == {0}
    opened.clear()
    assert desk.book.next(0.0, none) is None
    assert (asked, opened) == ([2], set()), "nothing came, so nothing else was looked at"
    with pytest.raises(Exception, match="came before"):
        desk.forward(0)
    assert clients(desk.next()) == [0, 1]


def test_clients_that_found_the_machine_in_turns_come_together() -> None:
    begun: list[int] = []

    def delay(client: int) -> float:
        # The second one begins while the first one's pass is under way; from then on both are quick.
        begun.append(client)
        return 5.0 * client if len(begun) <= 2 else 1.0

    machine = Machine(2, 10.0, 0.1, delay)
    machine.run(12)
    assert machine.passes[0] == [0]
    assert machine.passes[4:] == [[0, 1]] * 8


@pytest.mark.parametrize(("fixed", "each"), [(0.17, 0.0), (0.0, 0.02), (0.1, 0.01)])
def test_the_fixed_part_of_a_pass_is_learned_from_passes_of_different_sizes(fixed: float, each: float) -> None:
    cost = PassCost()
    for members in (1, 2, 1, 3, 4, 2, 8, 1) * 3:
        cost.add(64 * members, fixed + each * members)
    assert cost.fixed == pytest.approx(fixed, abs=1e-6)


def test_where_a_pass_costs_its_rows_and_no_more_nobody_waits_for_long() -> None:
    machine = Machine(3, 0.0, 4.0, lambda client: 1.0 + client)
    machine.run(40)
    before = machine.all_idled
    machine.run(80)
    assert machine.all_idled - before < 0.05 * 40 * 4.0


def go(desk: Desk, *, took: float) -> list[int]:
    """Take what is ready through one pass of so many seconds."""
    work = desk.next()
    assert isinstance(work, RunForward)
    desk.now += took
    desk.book.ran(work.cohort, desk.now)
    return clients(work)


def together(desk: Desk, whom: Sequence[int], *, took: float, go_back: bool = True) -> None:
    """Take the first step's micro-batches through one pass of so many seconds, back, and close the step."""
    for client in whom:
        desk.forward(client)
    go(desk, took=took)
    if go_back:
        back(desk, whom, 1)


def back(desk: Desk, whom: Sequence[int], step: int, *, closes: bool = True) -> None:
    for client in whom:
        desk.backward(client, step)
    assert clients(desk.do()) == list(whom)
    for client in whom:
        desk.commit(client, step)
        if closes:
            assert isinstance(desk.do(), CloseStep)


class Machine:
    """A server that computes one pass after the other, and clients that take their time between answers.

    `eager` ones commit right behind their gradient.
    """

    def __init__(self, count: int, fixed: float, each: float, delays: Any, *, eager: bool = False) -> None:
        self.eager = eager
        self.desk = Desk(**(OWN | {"clients": count}))
        self.fixed, self.each, self.delay = fixed, each, delays
        self.events: list[tuple[float, int, str]] = []
        self.steps = dict.fromkeys(range(count), 1)
        self.passes: list[list[int]] = []
        self.took = 0.0
        self.idled = 0.0
        self.free_at = self.longest = self.all_idled = 0.0
        for client in range(count):
            self.after(client, "forward")

    def after(self, client: int, what: str) -> None:
        heapq.heappush(self.events, (self.desk.now + self.delay(client), client, what))

    def run(self, passes: int) -> None:
        while len(self.passes) < passes:
            self.deliver()
            work = self.desk.next()
            if work is None:
                self.sleep()
            else:
                self.do(work)

    def deliver(self) -> None:
        while self.events and self.events[0][0] <= self.desk.now:
            _, client, what = heapq.heappop(self.events)
            step = self.steps[client]
            if what == "forward":
                self.desk.forward(client, step)
            elif what == "backward":
                self.desk.backward(client, step)
                if self.eager:
                    self.desk.commit(client, step)
            else:
                if not self.eager:
                    self.desk.commit(client, step)
                self.steps[client] += 1
                self.after(client, "forward")

    def sleep(self) -> None:
        """Nothing is to be done until something comes, or the book has said so."""
        wakes, comes = self.desk.book.wakes_at, self.events[0][0] if self.events else None
        again = self.desk.next()
        assert again is None
        assert self.desk.book.wakes_at == wakes, "asked again, it says the same"
        times = [at for at in (wakes, comes) if at is not None]
        assert times, "it sleeps for good"
        until = min(times)
        assert until > self.desk.now
        arrived = [micro.arrived_at for micro in self.waiting()]
        if arrived:
            self.idled += until - self.desk.now
            self.all_idled += until - self.desk.now
            assert until <= max(min(arrived), self.free_at) + WORTH * self.longest + 1e-9
        self.desk.now = until

    def waiting(self) -> list[Micro]:
        shares = [self.desk.ledger.contributors_of(track)[0] for track in self.desk.ledger.tracks]
        return [micro for share in shares for micro in share.micros.values() if micro.phase is Phase.WAITING]

    def do(self, work: Work) -> None:
        desk = self.desk
        match work:
            case RunForward(cohort):
                # The machine stood idle for no longer than it is worth while somebody was there.
                assert self.idled <= WORTH * self.longest + 1e-9
                self.passes.append([micro.client for micro in cohort.members])
                self.took = self.fixed + self.each * len(cohort.members)
                self.longest = max(self.longest, self.took)
                self.idled = 0.0
                desk.now += self.took
                desk.book.ran(cohort, desk.now)
                self.free_at = desk.now
                for micro in cohort.members:
                    self.after(micro.client, "backward")
            case GoBack(cohort):
                desk.now += self.fixed + self.each * len(cohort.members)
                for micro in cohort.members:
                    if micro.phase is Phase.RETURNED:
                        micro.settle(Phase.DONE)
                        self.after(micro.client, "commit")
                desk.book.went_back(cohort, desk.now)
                self.free_at = desk.now
            case CloseStep():
                desk.book.close(work, desk.now)


def test_who_went_together_stays_together_on_an_idle_machine() -> None:
    begun: list[int] = []

    def delay(client: int) -> float:
        # All come at once, and from then on a little apart, always.
        begun.append(client)
        return 20.0 + (0.1 * client if len(begun) > 4 else 0.0)

    machine = Machine(4, 8.0, 0.1, delay)
    machine.run(12)
    assert machine.passes == [[0, 1, 2, 3]] * 12


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    fixed=st.floats(0.01, 10.0),
    each=st.floats(0.0, 2.0),
    spread=st.floats(0.0, 30.0),
    eager=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_waiting_is_bounded_and_everybody_goes_on(
    count: int, fixed: float, each: float, spread: float, eager: bool, random: Any
) -> None:
    machine = Machine(count, fixed, each, lambda client: 0.01 + random.random() * spread, eager=eager)
    machine.run(30)
    assert {client for members in machine.passes for client in members} == set(range(count))
