"""Whose memory is given to whom: what waits for a client is dropped for others, and nothing for nothing."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from training.server.budget import Account, Budget

LIMIT = 100


@dataclass(eq=False)
class Tape:
    """What an account holds."""

    account: Account
    nbytes: int

    def drop_tape(self) -> None:
        nbytes, self.nbytes = self.nbytes, 0
        self.account.release(nbytes)


def hold(account: Account, nbytes: int, since: float | None = None) -> Tape:
    account.take(nbytes)
    tape = Tape(account, nbytes)
    if since is not None:
        account.waits(tape, since)
    return tape


def accounts(count: int, patience: float = 5.0) -> tuple[Budget, list[Account]]:
    budget = Budget(lambda: LIMIT)
    return budget, [Account(budget, patience) for _ in range(count)]


def test_what_waited_longest_of_who_holds_most_goes_first() -> None:
    budget, (first, second, asking) = accounts(3)
    old, new = hold(first, 30, 1.0), hold(first, 30, 2.0)
    other = hold(second, 40, 0.0)
    told: list[int] = []
    budget.listeners.add(lambda: told.append(budget.held))
    assert asking.make_room(20, 3.0)
    assert (old.nbytes, new.nbytes, other.nbytes) == (0, 30, 40)
    assert told == [70]
    assert asking.make_room(60, 3.0)
    assert (new.nbytes, other.nbytes) == (30, 0)


def test_what_is_used_or_would_not_be_enough_stays() -> None:
    budget, (first, asking) = accounts(2)
    running, waiting = hold(first, 50), hold(first, 50, 0.0)
    assert not asking.make_room(60, 1.0)
    assert (running.nbytes, waiting.nbytes) == (50, 50)
    first.is_used(waiting)
    assert not asking.make_room(40, 1.0)
    first.waits(waiting, 2.0)
    assert asking.make_room(40, 3.0)
    assert waiting.nbytes == 0
    running.drop_tape()
    assert budget.held == first.held == 0
    assert not budget.accounts


def test_who_holds_most_takes_nothing_from_others() -> None:
    _, (first, asking) = accounts(2)
    small, own = hold(first, 30, 0.0), hold(asking, 70, 0.0)
    assert not asking.make_room(20, 4.0)
    assert asking.asks_again_in(4.0) == 1.0
    # Its own goes once it waits too long for a client.
    assert asking.make_room(20, 5.0)
    assert (small.nbytes, own.nbytes) == (30, 0)
    assert asking.asks_again_in(5.0) is None


def test_what_is_too_old_already_is_no_reason_to_ask_again() -> None:
    _, (busy, asking) = accounts(2)
    hold(busy, 90)
    hold(asking, 10, 0.0)
    assert not asking.make_room(20, 6.0), "it is not enough, and what runs stays"
    assert asking.asks_again_in(6.0) is None


def test_more_than_there_is_has_everything() -> None:
    _, (first, asking) = accounts(2)
    tapes = [hold(first, 40, 0.0), hold(first, 40, 1.0)]
    assert asking.make_room(LIMIT + 1, 2.0), "with nothing else held, one has to go"
    assert [tape.nbytes for tape in tapes] == [0, 0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.booleans()), max_size=8),
    st.integers(0, 2),
    st.integers(1, 120),
)
def test_there_is_room_when_it_says_so(held: list[tuple[int, int, bool]], asking: int, nbytes: int) -> None:
    budget, all_accounts = accounts(3)
    tapes = [
        hold(all_accounts[who], size, float(when) if waits else None) for when, (who, size, waits) in enumerate(held)
    ]
    before = [tape.nbytes for tape in tapes]
    running = [tape for tape, (_, _, waits) in zip(tapes, held, strict=True) if not waits]
    if all_accounts[asking].make_room(nbytes, 0.0):
        assert budget.fits(nbytes) or budget.held == 0
    else:
        assert [tape.nbytes for tape in tapes] == before
    assert all(tape.nbytes for tape in running)
    assert budget.held == sum(tape.nbytes for tape in tapes)
