"""When a job (re)starts, with whom, and at which step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import JobEnded, NotOwner
from training.roster import KEPT_CHECKPOINTS, Restart, Roster

EVERY = 5
REJOIN = 60.0


def is_kept(step: int) -> bool:
    return step % EVERY == 0


def roster_of(*names: str) -> Roster:
    roster = Roster(len(names), REJOIN, is_kept)
    for name in names:
        roster.join(name, f"secret of {name}", 10, (), 0.0)
    return roster


def started(*names: str) -> Roster:
    roster = roster_of(*names)
    restart = roster.decide(dict.fromkeys(range(len(names)), 0), (), 0, 0.0)
    everybody = range(len(names))
    assert restart == Restart(dict.fromkeys(everybody, 0), frozenset(everybody), None)
    return roster


def advance(roster: Roster, steps: Iterable[int]) -> None:
    for step in steps:
        for index in roster.present:
            roster.had_share(index, step)
            roster.closed(index, step)


def live(roster: Roster, step: int) -> dict[int, int]:
    return dict.fromkeys(roster.seats, step)


def test_nothing_begins_before_all_are_there_however_long_it_takes() -> None:
    roster = Roster(2, REJOIN, is_kept)
    roster.join("b", "s", 10, (), 0.0)
    assert roster.decide({0: 0, 1: 0}, (), 0, 10 * REJOIN) is None
    assert roster.wakes_at() is None
    roster.join("a", "s", 10, (), 11 * REJOIN)
    assert roster.decide({0: 0, 1: 0}, (), 0, 11 * REJOIN) is not None
    assert roster.decide({0: 0, 1: 0}, (), 0, 11 * REJOIN) is None


def test_numbers_follow_from_names_not_from_who_came_first() -> None:
    for order in (("a", "b", "c"), ("c", "a", "b")):
        roster = started(*order)
        assert {index: seat.name for index, seat in roster.seats.items()} == {0: "a", 1: "b", 2: "c"}
        assert all(seat.index == index for index, seat in roster.seats.items())


def test_a_seat_is_free_again_until_the_job_begins() -> None:
    roster = Roster(2, REJOIN, is_kept)
    first = roster.join("a", "s", 10, (), 0.0)
    roster.join("b", "s", 10, (), 0.0)
    with pytest.raises(JobEnded, match="all 2 places"):
        roster.join("c", "s", 10, (), 0.0)
    roster.lose(first.index, 1.0)
    assert roster.join("c", "s", 10, (), 1.0).index == first.index
    roster.leave(1)
    assert set(roster.seats) == {0}


def test_a_name_belongs_to_who_has_its_secret() -> None:
    roster = started("a", "b")
    with pytest.raises(NotOwner, match="another secret"):
        roster.join("a", "stolen", 10, (), 0.0)
    with pytest.raises(JobEnded):
        roster.join("c", "s", 10, (), 0.0)


def test_who_only_lost_the_connection_costs_the_step_under_way() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.lose(0, 100.0)
    assert roster.decide(live(roster, 7), {5}, 7, 100.0 + REJOIN - 1) is None
    roster.join("a", "secret of a", 10, (5, 7), 100.0)
    assert roster.decide(live(roster, 7), {5}, 7, 101.0) == Restart({0: 7, 1: 7}, frozenset({0, 1}), None)


def test_a_new_connection_before_the_old_one_is_known_to_be_dead_restarts_too() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.join("a", "secret of a", 10, (5, 7), 100.0)
    assert roster.decide(live(roster, 7), {5}, 7, 100.0) == Restart({0: 7, 1: 7}, frozenset({0, 1}), None)


def test_who_was_killed_takes_all_back_to_the_newest_common_checkpoint() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 14))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, (5, 10), 100.0)
    assert roster.decide(live(roster, 13), {5, 10}, 13, 101.0) == Restart({0: 10, 1: 10}, frozenset({0, 1}), 10)
    # What came after that step is void.
    assert roster.seats[1].have == {5, 10}


def test_a_common_step_must_be_the_servers_too() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 14))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, (5, 10), 100.0)
    assert roster.decide(live(roster, 13), {5}, 13, 101.0) == Restart({0: 5, 1: 5}, frozenset({0, 1}), 5)


def test_without_any_common_checkpoint_all_begin_again() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 4))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, (), 100.0)
    assert roster.decide(live(roster, 3), (), 3, 101.0) == Restart({0: 0, 1: 0}, frozenset({0, 1}), 0)


def test_who_lost_all_its_states_does_not_take_the_others_back() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 14))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, (), 100.0)
    assert roster.decide(live(roster, 13), {5, 10}, 13, 101.0) == Restart({0: 13, 1: 13}, frozenset({1}), None)
    assert roster.seats[0].since == 13


def test_with_own_sets_who_lost_its_states_goes_on_where_all_met_last() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 14))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, (), 100.0)
    assert roster.decide({0: 13, 1: 13}, {5, 10}, 10, 101.0) == Restart({0: 10, 1: 13}, frozenset({1}), None)


@pytest.mark.parametrize("had", [(), (5,)])
def test_a_server_whose_disk_was_full_too_takes_nobody_back_either(had: tuple[int, ...]) -> None:
    roster = started("a")
    advance(roster, range(1, 14))
    roster.lose(0, 100.0)
    roster.join("a", "secret of a", 10, had, 100.0)
    assert roster.decide(live(roster, 13), (), 13, 101.0) == Restart({0: 13}, frozenset(), None)


def test_others_go_back_to_a_state_they_have_but_not_for_who_has_none() -> None:
    roster = started("a", "b", "c")
    advance(roster, range(1, 14))
    for index, name, have in ((0, "a", (1,)), (1, "b", (5, 10))):
        roster.lose(index, 100.0)
        roster.join(name, f"secret of {name}", 10, have, 100.0)
    restart = roster.decide(live(roster, 13), {5, 10}, 13, 101.0)
    assert restart == Restart({0: 10, 1: 10, 2: 10}, frozenset({1, 2}), 10)


def test_after_a_restart_of_the_server_its_newest_checkpoint_is_not_given_up_for_one() -> None:
    seats = started("a", "b").seats
    for seat in seats.values():
        seat.present, seat.have = False, frozenset()
    roster = Roster(2, REJOIN, is_kept, seats, begun=True)
    roster.join("a", "secret of a", 10, (5,), 1000.0)
    roster.join("b", "secret of b", 10, (10, 15), 1001.0)
    assert roster.decide({}, {10, 15}, 0, 1001.0) == Restart({0: 15, 1: 15}, frozenset({1}), 15)


def test_who_does_not_come_back_in_time_is_given_up_and_the_others_go_on() -> None:
    roster = started("a", "b", "c")
    advance(roster, range(1, 8))
    roster.lose(1, 100.0)
    assert roster.wakes_at() == 100.0 + REJOIN
    assert roster.decide(live(roster, 7), {5}, 7, 100.0 + REJOIN) == Restart({0: 7, 2: 7}, frozenset({0, 2}), None)
    assert roster.wakes_at() is None
    assert roster.seats[1].since is None


def test_who_leaves_is_not_waited_for() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.leave(1)
    assert roster.decide(live(roster, 7), {5}, 7, 100.0) == Restart({0: 7}, frozenset({0}), None)


def given_up_and_back() -> Roster:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.lose(1, 100.0)
    roster.decide(live(roster, 7), {5}, 7, 200.0)
    advance(roster, range(8, 18))
    roster.join("b", "secret of b", 10, (5, 7), 300.0)
    return roster


def test_who_was_given_up_comes_back_without_taking_the_others_back() -> None:
    roster = given_up_and_back()
    assert roster.decide(live(roster, 17), {10, 15}, 17, 300.0) == Restart({0: 17, 1: 17}, frozenset({0}), None)
    assert roster.seats[1].since == 17


def test_own_sets_of_who_comes_back_begin_where_all_met_last() -> None:
    roster = given_up_and_back()
    restart = roster.decide({0: 17}, {10, 15}, 15, 300.0)
    assert restart == Restart({0: 17, 1: 15}, frozenset({0}), None)


def test_steps_before_its_return_need_nothing_of_who_was_away() -> None:
    roster = given_up_and_back()
    roster.decide(live(roster, 17), {10, 15}, 17, 300.0)
    advance(roster, (18, 19))
    roster.lose(0, 400.0)
    roster.join("a", "secret of a", 10, (10, 15), 400.0)
    # At 15 the client b was not there: it keeps what it has.
    assert roster.decide(live(roster, 19), {10, 15}, 19, 400.0) == Restart({0: 15, 1: 15}, frozenset({0}), 15)


def test_a_step_closed_without_who_is_away_gives_it_up() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.missed(1)
    assert roster.seats[1].since == 0, "it is slow, but there"
    roster.lose(1, 100.0)
    roster.missed(1)
    roster.closed(0, 8)
    roster.join("b", "secret of b", 10, (5, 7), 101.0)
    assert roster.decide(live(roster, 8), {5}, 8, 101.0) == Restart({0: 8, 1: 8}, frozenset({0}), None)


def test_after_a_restart_of_the_server_the_first_who_comes_waits_for_the_others() -> None:
    seats = started("a", "b").seats
    for seat in seats.values():
        seat.present, seat.have = False, frozenset()
    roster = Roster(2, REJOIN, is_kept, seats, begun=True)
    roster.join("a", "secret of a", 10, (5, 10), 1000.0)
    assert roster.decide({}, {5, 10}, 0, 1000.0) is None
    assert roster.wakes_at() == 1000.0 + REJOIN
    roster.join("b", "secret of b", 10, (5, 10, 12), 1001.0)
    assert roster.decide({}, {5, 10}, 0, 1001.0) == Restart({0: 10, 1: 10}, frozenset({0, 1}), 10)


def test_who_had_no_share_meanwhile_goes_on_with_the_state_it_has() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.had_share(1, 6)
    roster.had_share(0, 7)
    roster.lose(1, 100.0)
    roster.closed(0, 8)
    roster.had_share(0, 8)
    roster.join("b", "secret of b", 10, (5, 7), 100.0)
    assert roster.decide(live(roster, 8), {5}, 8, 101.0) == Restart({0: 8, 1: 8}, frozenset({0}), None)
    assert roster.seats[1].since == 0, "it missed nothing"
    roster.had_share(1, 9)
    roster.lose(1, 100.0)
    roster.join("b", "secret of b", 10, (5, 8), 100.0)
    assert roster.decide(live(roster, 9), {5}, 9, 101.0) == Restart({0: 5, 1: 5}, frozenset({0, 1}), 5)


def test_a_live_state_is_no_checkpoint() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 10))
    roster.lose(1, 100.0)
    roster.join("b", "secret of b", 10, (5, 9, 10), 100.0)
    roster.closed(0, 10)
    # It did its share of 10, and heard of nothing: it has that state, but nobody told it to keep it.
    assert roster.decide(live(roster, 10), {5, 10}, 10, 101.0) == Restart({0: 10, 1: 10}, frozenset({0, 1}), None)
    advance(roster, range(11, 14))
    assert roster.seats[0].have == {5, 10, 13}
    assert roster.seats[1].have == {5, 13}


def test_when_nobody_is_left_time_stands_still() -> None:
    roster = started("a", "b")
    advance(roster, range(1, 8))
    roster.lose(0, 100.0)
    roster.lose(1, 100.0)
    assert roster.decide(live(roster, 7), {5}, 7, 100000.0) is None
    assert roster.wakes_at() is None
    roster.join("b", "secret of b", 10, (5, 7), 100000.0)
    assert roster.decide(live(roster, 7), {5}, 7, 100001.0) is None
    roster.join("a", "secret of a", 10, (5, 7), 100002.0)
    assert roster.decide(live(roster, 7), {5}, 7, 100002.0) == Restart({0: 7, 1: 7}, frozenset({0, 1}), None)


@dataclass
class Client:
    """What a client process really has."""

    checkpoints: list[int]
    live: int | None = 0
    connected: bool = True

    def reach(self, step: int) -> None:
        self.live = step
        if is_kept(step):
            self.checkpoints = [*self.checkpoints, step][-KEPT_CHECKPOINTS:]

    def restore(self, step: int) -> None:
        assert step in (0, self.live, *self.checkpoints), "told to restore what it does not have"
        self.checkpoints = [each for each in self.checkpoints if each <= step]
        self.live = step

    @property
    def have(self) -> tuple[int, ...]:
        return tuple(self.checkpoints) + (() if self.live is None else (self.live,))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["advance"] * 6 + ["drop", "kill", "wipe", "return", "wait", "server"]), st.integers(0, 2)
    ),
    max_size=120,
)


@settings(deadline=None)
@given(EVENTS)
def test_nobody_is_told_to_restore_what_it_has_not_and_nobody_present_is_forgotten(
    events: list[tuple[str, int]],
) -> None:
    names = ("a", "b", "c")
    roster, clients = started(*names), {index: Client([]) for index in range(3)}
    server = Client([])
    now, step = 0.0, 0
    for event, index in events:
        client = clients[index]
        if event == "advance" and roster.started and roster.present == roster.started:
            if any(roster.seats[each].fresh for each in roster.present):
                continue
            step += 1
            server.reach(step)
            for each in roster.present:
                roster.had_share(each, step)
                roster.closed(each, step)
                clients[each].reach(step)
        elif event in ("drop", "kill") and client.connected:
            client.connected = False
            client.live = None if event == "kill" else client.live
            roster.lose(index, now)
        elif event == "wipe" and not client.connected:
            client.checkpoints, client.live = [], None
        elif event == "return" and not client.connected:
            client.connected = True
            roster.join(names[index], f"secret of {names[index]}", 10, client.have, now)
        elif event == "wait":
            now += REJOIN
        elif event == "server":
            server.live = None
            for each, other in clients.items():
                roster.seats[each].present = other.connected = False
            roster.started = frozenset()
        holds = {} if server.live is None else dict.fromkeys(roster.seats, server.live)
        restart = roster.decide(holds, server.checkpoints, server.live or 0, now)
        if restart is None:
            continue
        assert set(restart.steps) == {each for each, other in clients.items() if other.connected}
        assert len(set(restart.steps.values())) == 1
        step = next(iter(restart.steps.values()))
        assert step > 0 or not server.checkpoints, "nobody loses all for another"
        if restart.checkpoint is None:
            assert step == server.live
        else:
            server.restore(step)
        for each in restart.steps:
            if each in restart.restored:
                clients[each].restore(step)
            else:
                clients[each].live = step
