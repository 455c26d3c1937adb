"""What is to be done next: cohorts, order, deadlines and meetings, with a clock that tests move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import BadRequest, UnknownStep, WindowExceeded
from split_llama.wire.codec import Codec
from split_llama.wire.training import Backward, Commit, Forward
from training.job_config import JobConfig
from training.server.book import LEAST_PATIENCE, Book, CloseStep, GoBack, Meet, RunForward, Work
from training.server.ledger import MAX_AHEAD, Ledger
from training.server.records import Micro, Phase, Rows
from training.strategy import make_strategy

ROWS = Rows(Codec.FP32, 4, b"1234")


def everything(micros: Sequence[Micro]) -> int:
    return len(micros)


FIRST = Forward(generation=1, step=1, micro=0, of=1, targets=2, lengths=(4,))


def count(ledger: Ledger) -> int:
    return sum(len(shares) for shares in ledger._shares.values())


class Looks:
    """Counts how many entries of a dictionary are gone through."""

    def __init__(self) -> None:
        self.most = 0

    def at(self, entries: dict[int, Micro]) -> dict[int, Micro]:
        looks = self

        class Watched(dict[int, Micro]):
            def _look(self) -> None:
                looks.most = max(looks.most, len(self))

            def __iter__(self) -> Any:
                self._look()
                return super().__iter__()

            def values(self) -> Any:
                self._look()
                return super().values()

            def items(self) -> Any:
                self._look()
                return super().items()

        return entries if isinstance(entries, Watched) else Watched(entries)


class Desk:
    """A book with the clients' side of it, at a time `now`."""

    def __init__(self, **fields: Any) -> None:
        self.config = JobConfig(**({"clients": 3, "steps": 6, "deadline_seconds": 10.0} | fields))
        strategy = make_strategy(self.config)
        self.now = 0.0
        self.ledger = Ledger(self.config, strategy, dict.fromkeys(range(self.config.clients), 0), 0.0)
        self.book = Book(self.config, strategy, self.ledger)

    def forward(self, client: int, step: int = 1, micro: int = 0) -> None:
        of = self.config.accumulate
        header = Forward(generation=1, step=step, micro=micro, of=of, targets=2, lengths=(4,))
        self.ledger.forward(client, header, 1, ROWS, self.now)

    def backward(self, client: int, step: int = 1, micro: int = 0, rows: Rows | None = ROWS) -> Any:
        return self.ledger.backward(client, Backward(generation=1, step=step, micro=micro), 2, rows, self.now)

    def commit(self, client: int, step: int = 1, tensors: Any = None) -> None:
        header = Commit(generation=1, step=step, samples=3, targets=2, loss=1.0)
        self.ledger.commit(client, header, tensors, self.now)

    def next(self) -> Work | None:
        return self.book.next(self.now, everything)

    def do(self) -> Work | None:
        """Ask, and do at once what is to be done."""
        work = self.next()
        match work:
            case RunForward(cohort):
                self.book.ran(cohort, self.now)
            case GoBack(cohort):
                for micro in cohort.members:
                    if micro.phase is Phase.RETURNED:
                        micro.settle(Phase.DONE)
                self.book.went_back(cohort, self.now)
            case CloseStep():
                self.book.close(work, self.now)
            case Meet():
                self.book.met(work, self.now)
        return work

    def there(self, client: int, step: int = 1, micro: int = 0) -> None:
        """Take one micro-batch of one client there, alone."""
        self.forward(client, step, micro)
        assert isinstance(self.do(), RunForward)


def clients(work: Work | None) -> list[int]:
    assert isinstance(work, RunForward | GoBack), work
    return [micro.client for micro in work.cohort.members]


def test_a_joint_pass_waits_for_all_and_goes_back_together() -> None:
    desk = Desk()
    desk.forward(2)
    desk.forward(0)
    assert desk.do() is None
    desk.forward(1)
    assert clients(desk.do()) == [0, 1, 2]
    desk.backward(1)
    desk.backward(2)
    assert desk.do() is None
    desk.backward(0)
    assert clients(desk.do()) == [0, 1, 2]
    for client in (2, 0):
        desk.commit(client)
    assert desk.do() is None
    desk.commit(1)
    work = desk.do()
    assert isinstance(work, CloseStep)
    assert [share.client for share in work.shares] == [0, 1, 2]
    assert [share.targets for share in work.shares] == [2, 2, 2]
    assert desk.ledger.closed(0) == 1
    assert desk.do() is None


def test_a_commit_right_behind_the_gradient_waits_for_the_gradient_to_be_added() -> None:
    """What went back counts though its answer is still to come; the step is closed when all of it is added."""
    desk = Desk(clients=2)
    for client in (0, 1):
        desk.forward(client)
    assert clients(desk.do()) == [0, 1]
    for client in (0, 1):
        desk.backward(client)
        desk.commit(client)
    back = desk.do()
    assert isinstance(back, GoBack)
    assert clients(back) == [0, 1]
    close = desk.do()
    assert isinstance(close, CloseStep)
    assert [share.targets for share in close.shares] == [2, 2]


def test_what_was_not_taken_back_before_the_commit_adds_nothing() -> None:
    desk = Desk(clients=1, accumulate=2)
    desk.there(0, micro=0)
    desk.there(0, micro=1)
    desk.backward(0, micro=0)
    desk.commit(0)
    while isinstance(close := desk.do(), GoBack):
        pass
    assert isinstance(close, CloseStep)
    assert [share.targets for share in close.shares] == [2]
    # Its gradient comes too late now.
    desk.backward(0, micro=1)
    assert not isinstance(desk.next(), GoBack)


def test_each_stage_has_its_deadline() -> None:
    desk = Desk()
    desk.forward(0)
    desk.forward(1)
    assert desk.do() is None
    assert desk.book.wakes_at == 10.0
    desk.now = 10.0
    assert clients(desk.do()) == [0, 1]
    desk.backward(0)
    assert desk.do() is None
    assert desk.book.wakes_at == 20.0
    desk.now = 20.0
    assert clients(desk.do()) == [0, 1]
    # What comes now of a step that goes on without it is dropped, and costs nobody anything.
    desk.forward(2)
    desk.backward(1)
    desk.backward(2, micro=3)
    desk.commit(1)
    desk.commit(0)
    work = desk.do()
    assert isinstance(work, CloseStep)
    assert ([share.client for share in work.shares], work.left) == ([0], (1, 2))
    desk.backward(2)
    desk.commit(2)
    desk.forward(2, step=2)
    assert desk.do() is None


def test_who_commits_late_is_left_out() -> None:
    desk = Desk(clients=2)
    for client in (0, 1):
        desk.forward(client)
    desk.do()
    for client in (0, 1):
        desk.backward(client)
    desk.do()
    desk.commit(1)
    assert desk.do() is None
    desk.now = 10.0
    work = desk.do()
    assert isinstance(work, CloseStep)
    assert ([share.client for share in work.shares], work.left) == ([1], (0,))


def test_without_a_deadline_everybody_is_waited_for() -> None:
    desk = Desk(deadline_seconds=None)
    desk.forward(0)
    desk.now = 1e6
    assert desk.do() is None
    assert desk.book.wakes_at is None


def test_who_skips_a_micro_batch_is_not_waited_for() -> None:
    desk = Desk(clients=2, accumulate=2)
    desk.forward(0, micro=0)
    assert desk.do() is None
    desk.forward(1, micro=1)
    assert clients(desk.do()) == [0]
    desk.forward(0, micro=1)
    assert clients(desk.do()) == [0, 1]


def test_states_of_a_later_step_wait_for_it() -> None:
    desk = Desk(clients=2, strategy="sequential")
    desk.forward(1, step=2)
    assert desk.do() is None
    desk.there(0)
    desk.backward(0)
    desk.do()
    desk.commit(0)
    assert isinstance(desk.do(), CloseStep)
    assert clients(desk.do()) == [1]
    with pytest.raises(BadRequest, match="has no share in step 3"):
        desk.forward(1, step=3)


def test_what_does_not_fit_goes_in_parts() -> None:
    desk = Desk()
    for client in range(3):
        desk.forward(client)
    assert desk.book.next(0.0, lambda micros: 0) is None
    first = desk.book.next(0.0, lambda micros: 2)
    assert clients(first) == [0, 1]
    assert isinstance(first, RunForward)
    desk.book.ran(first.cohort, 0.0)
    assert clients(desk.do()) == [2]


def test_own_sets_take_what_is_ready_one_of_each_client() -> None:
    desk = Desk(strategy="server-hierarchical", accumulate=2, average_every=3)
    desk.forward(0, micro=0)
    desk.forward(0, micro=1)
    desk.forward(2, micro=0)
    assert clients(desk.do()) == [0, 2]
    assert clients(desk.do()) == [0]


def test_own_sets_have_some_patience_with_the_slow_and_then_go_by_themselves() -> None:
    desk = Desk(strategy="server-hierarchical", average_every=3, deadline_seconds=None)
    desk.forward(0)
    desk.forward(1)
    assert clients(desk.do()) == [0, 1]
    desk.backward(0)
    assert desk.do() is None
    assert desk.book.wakes_at == LEAST_PATIENCE
    desk.now = LEAST_PATIENCE
    assert clients(desk.do()) == [0]
    assert desk.do() is None
    desk.backward(1)
    assert clients(desk.do()) == [1]


def test_own_sets_meet_and_who_is_late_jumps_to_the_meeting() -> None:
    desk = Desk(strategy="server-hierarchical", average_every=2)
    for client in (0, 1):
        for step in (1, 2):
            desk.there(client, step)
            desk.backward(client, step)
            desk.do()
            desk.commit(client, step)
            if step == 1:
                assert isinstance(desk.do(), CloseStep)
    desk.there(2)
    assert desk.do() is None
    assert desk.book.wakes_at == 10.0
    desk.now = 10.0
    work = desk.do()
    assert isinstance(work, Meet)
    assert (work.step, [share.client for share in work.shares], work.left) == (2, [0, 1], {2: (1, 2)})
    assert [desk.ledger.closed(client) for client in range(3)] == [2, 2, 2]
    assert desk.backward(2) is None
    assert clients(desk.do()) == [2], "its tape goes"
    desk.there(2, 3)


def test_what_a_client_sends_must_make_sense() -> None:
    desk = Desk(clients=1, accumulate=3, max_micros=2)
    desk.forward(0, micro=0)
    with pytest.raises(BadRequest, match="came before"):
        desk.forward(0, micro=0)
    with pytest.raises(UnknownStep, match="no answer yet"):
        desk.backward(0)
    with pytest.raises(UnknownStep, match="no states"):
        desk.backward(0, micro=1)
    desk.forward(0, micro=1)
    with pytest.raises(WindowExceeded):
        desk.forward(0, micro=2)
    desk.do()
    with pytest.raises(BadRequest, match="gradient of 4"):
        desk.backward(0, rows=Rows(Codec.FP32, 3, b""))
    assert desk.backward(0, rows=None) is None
    desk.forward(0, micro=2)
    with pytest.raises(BadRequest, match="3 micro-batches"):
        desk.forward(0, micro=3)
    with pytest.raises(BadRequest, match="6 steps"):
        desk.commit(0, step=7)
    with pytest.raises(BadRequest, match="before step 1"):
        desk.commit(0, step=2, tensors=ROWS)


def test_a_client_has_answers_to_come_unless_it_is_its_own_move() -> None:
    desk = Desk(clients=2, strategy="sequential")
    assert not desk.ledger.is_busy(0)
    assert desk.ledger.is_busy(1), "it hears of the other's step"
    desk.forward(0)
    assert desk.ledger.is_busy(0)
    desk.do()
    assert not desk.ledger.is_busy(0)
    desk.backward(0)
    assert desk.ledger.is_busy(0)
    desk.do()
    assert not desk.ledger.is_busy(0)
    desk.commit(0)
    assert desk.ledger.is_busy(0)
    desk.do()
    assert (desk.ledger.is_busy(0), desk.ledger.is_busy(1)) == (True, False)


def test_commits_far_ahead_are_refused() -> None:
    desk = Desk(clients=1, steps=2 * MAX_AHEAD)
    for step in range(1, MAX_AHEAD + 2):
        desk.commit(0, step)
    with pytest.raises(WindowExceeded):
        desk.commit(0, MAX_AHEAD + 2)
    assert isinstance(desk.do(), CloseStep)
    desk.commit(0, MAX_AHEAD + 2)


def test_a_turn_that_is_far_away_can_be_prepared() -> None:
    desk = Desk(clients=2, strategy="sequential", turn_steps=2 * MAX_AHEAD, steps=5 * MAX_AHEAD)
    desk.forward(1, step=2 * MAX_AHEAD + 1)
    assert desk.do() is None


def test_what_is_refused_leaves_nothing_behind() -> None:
    desk = Desk(clients=1, steps=2**31 - 1)
    desk.ledger.forward(0, FIRST, 1, ROWS, 0.0)
    for step in range(2, 3000):
        with pytest.raises(BadRequest):
            desk.forward(0, step, micro=5)
        with pytest.raises(BadRequest):
            desk.commit(0, step, tensors=ROWS)
    assert count(desk.ledger) == 1
    refused = 0
    for step in range(2, 3000):
        try:
            desk.ledger.reject(0, step)
        except WindowExceeded:
            refused += 1
    assert count(desk.ledger) == 1 + MAX_AHEAD
    assert refused == 2998 - MAX_AHEAD


def test_a_step_of_very_many_micro_batches_costs_what_is_under_way() -> None:
    """Nothing that is asked for every message looks at all numbers of a step, sent or not."""
    desk = Desk(clients=2, accumulate=65535, deadline_seconds=None)
    looks = Looks()
    for number in range(1000):
        for client in (0, 1):
            desk.forward(client, micro=number)
        share = desk.ledger.share(0, 1)
        share.micros = looks.at(share.micros)
        assert clients(desk.do()) == [0, 1]
        for client in (0, 1):
            desk.backward(client, micro=number)
        assert isinstance(desk.do(), GoBack)
        assert desk.do() is None
        assert desk.ledger.input_bytes == 0
    assert looks.most == 0
    assert desk.ledger.share(0, 1).targets == 2000
    assert looks.most == 1000


def test_what_was_added_counts_whatever_a_commit_says() -> None:
    desk = Desk(clients=1, accumulate=2)
    desk.there(0, micro=0)
    desk.there(0, micro=1)
    for micro in (0, 1):
        desk.backward(0, micro=micro)
    # Right behind the gradients; then the second of them turns out to be of no use.
    desk.commit(0)
    first = desk.next()
    assert isinstance(first, GoBack)
    first.cohort.members[0].settle(Phase.DONE)
    second = desk.next()
    assert isinstance(second, GoBack)
    second.cohort.members[0].settle(Phase.VOID)
    close = desk.do()
    assert isinstance(close, CloseStep)
    assert [(share.samples, share.targets) for share in close.shares] == [(1, 2)]


STRATEGIES = st.sampled_from(["sequential", "client-batch", "server-hierarchical"])


@settings(deadline=None)
@given(STRATEGIES, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_whatever_comes_first_every_step_is_made_of_everything(
    strategy: str, count: int, accumulate: int, max_micros: int, random: Any
) -> None:
    config: dict[str, Any] = {"strategy": strategy, "clients": count, "accumulate": accumulate, "steps": 4}
    desk = Desk(**config, average_every=2, max_micros=max_micros, deadline_seconds=None)
    made = make_strategy(desk.config)
    present = frozenset(range(count))
    plans = {client: [step for step in range(1, 5) if client in made.contributors(step, present)] for client in present}
    at = dict.fromkeys(present, 0)
    sent: dict[int, int] = dict.fromkeys(present, 0)
    open_micros: dict[int, list[Micro]] = {client: [] for client in present}
    back: dict[int, int] = dict.fromkeys(present, 0)
    targets: dict[int, int] = {}
    for _ in range(4000):
        if desk.ledger.is_complete:
            break
        desk.now += 1.0
        client = random.choice(sorted(present))
        step = plans[client][at[client]] if at[client] < len(plans[client]) else None
        answered = [micro for micro in open_micros[client] if micro.phase is Phase.ANSWERED]
        if step is not None and sent[client] < accumulate and random.random() < 0.5:
            if desk.ledger.under_way(client) < max_micros:
                desk.forward(client, step, sent[client])
                open_micros[client].append(desk.ledger.share(client, step).micros[sent[client]])
                sent[client] += 1
        elif answered:
            micro = random.choice(answered)
            desk.backward(client, micro.step, micro.number)
            back[client] += 1
        elif step is not None and back[client] == accumulate and desk.ledger.under_way(client) == 0:
            desk.commit(client, step)
            at[client], sent[client], back[client], open_micros[client] = at[client] + 1, 0, 0, []
        work = desk.do() if random.random() < 0.7 else None
        if isinstance(work, CloseStep | Meet):
            assert not work.left
            targets[work.step] = targets.get(work.step, 0) + sum(2 * accumulate for _ in work.shares)
    assert desk.ledger.is_complete
    assert targets == {step: 2 * accumulate * len(made.contributors(step, present)) for step in range(1, 5)}
    assert desk.ledger.input_bytes == 0
