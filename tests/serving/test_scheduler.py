"""The scheduler: budget, order, decodes first, no starvation, fairness across owners."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.scheduler import SMALL_ROWS, Candidate, PassBudget, Pick, Scheduler, max_step_rows


@dataclass
class Queue:
    owner: str
    steps: deque[tuple[int, int]] = field(default_factory=deque)  # (arrival, rows)


def candidates_of(queues: dict[int, Queue]) -> list[Candidate]:
    return [
        Candidate(key, queue.owner, tuple(rows for _, rows in queue.steps), queue.steps[0][0])
        for key, queue in queues.items()
        if queue.steps
    ]


def apply(queues: dict[int, Queue], picks: list[Pick]) -> None:
    for pick in picks:
        for _ in range(pick.steps):
            queues[pick.key].steps.popleft()  # type: ignore[index]


LIMITS = st.tuples(st.integers(1, 300), st.integers(1, 8))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """A budget, and for each pass the (session, rows) of the steps that arrive before it."""
    max_rows, max_sequences = draw(LIMITS)
    step = st.tuples(st.integers(0, 5), st.integers(1, max_step_rows(max_rows)))
    return max_rows, max_sequences, draw(st.lists(st.lists(step, max_size=8), min_size=1, max_size=12))


@given(workloads())
def test_budget_order_progress_and_no_starvation(work: tuple[int, int, list[list[tuple[int, int]]]]) -> None:
    max_rows, max_sequences, arrivals = work
    scheduler = Scheduler(max_rows, max_sequences)
    queues = {key: Queue(owner=f"owner-{key % 2}") for key in range(6)}
    deadline: dict[int, int] = {}
    clock = 0
    for passes, batch in enumerate([*arrivals, *[[]] * 200], start=1):
        for key, rows in batch:
            waiting = sum(len(queue.steps) for queue in queues.values())
            queues[key].steps.append((clock, rows))
            deadline[clock] = passes + waiting
            clock += 1
        candidates = candidates_of(queues)
        picks = scheduler.pick(candidates)
        assert bool(picks) == bool(candidates)
        assert len({pick.key for pick in picks}) == len(picks) <= max_sequences
        assert sum(pick.rows for pick in picks) <= max_rows
        for pick in picks:
            steps = list(queues[pick.key].steps)[: pick.steps]  # type: ignore[index]
            assert 1 <= pick.steps == len(steps)
            assert pick.rows == sum(rows for _, rows in steps)
            for arrival, _ in steps:
                assert passes <= deadline[arrival], "a step waited longer than those before it justify"
        apply(queues, picks)
    assert not any(queue.steps for queue in queues.values())


@given(st.integers(8, 200), st.lists(st.integers(1, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_decodes_go_first_and_prefill_keeps_its_share(max_rows: int, decodes: list[int], prompts: int) -> None:
    share = max_step_rows(max_rows)
    decodes = [min(rows, share) for rows in decodes]
    chunk = (share,) * (SMALL_ROWS // share + 1)
    candidates = [Candidate(("decode", i), "a", (rows,), i) for i, rows in enumerate(decodes)]
    candidates += [Candidate(("prefill", i), "a", chunk, 1000 + i) for i in range(prompts)]
    picks = {pick.key: pick for pick in Scheduler(max_rows, 1000).pick(candidates)}
    left_out = [rows for i, rows in enumerate(decodes) if ("decode", i) not in picks]
    prefill_rows = sum(pick.rows for key, pick in picks.items() if key[0] == "prefill")  # type: ignore[index]
    if left_out:
        assert prefill_rows <= share, "prefill took more than its share while decodes waited"
    if prompts:
        assert prefill_rows > 0


def test_a_busy_owner_does_not_crowd_out_another() -> None:
    scheduler = Scheduler(max_rows=8, max_sequences=8)
    served: Counter[str] = Counter()
    for clock in range(50):
        candidates = [Candidate(("busy", i), "busy", (1,), clock) for i in range(100)]
        candidates.append(Candidate("calm", "calm", (1, 1, 1, 1), clock))
        for pick in scheduler.pick(candidates):
            served["calm" if pick.key == "calm" else "busy"] += pick.rows
    assert served["calm"] == served["busy"] == 200


def test_sessions_of_one_owner_take_turns() -> None:
    scheduler = Scheduler(max_rows=4, max_sequences=4)
    served: Counter[int] = Counter()
    for _ in range(30):
        for pick in scheduler.pick([Candidate(i, "a", (1,), 0) for i in range(10)]):
            served[pick.key] += 1  # type: ignore[index]
    assert min(served.values()) >= 10
    assert len(served) == 10


def test_one_sequence_per_pass_alternates_between_decode_and_prefill() -> None:
    scheduler = Scheduler(max_rows=400, max_sequences=1)
    arrivals = {"decode": 0, "prefill": 1}
    keys = []
    for clock in range(2, 12):
        candidates = [
            Candidate("decode", "a", (1,), arrivals["decode"]),
            Candidate("prefill", "b", (100,), arrivals["prefill"]),
        ]
        (pick,) = scheduler.pick(candidates)
        keys.append(pick.key)
        arrivals[str(pick.key)] = clock
    assert keys == ["decode", "prefill"] * 5


@given(LIMITS, st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=40))
def test_a_budget_never_goes_below_zero(limits: tuple[int, int], takes: list[tuple[int, bool]]) -> None:
    budget = PassBudget(*limits)
    for rows, joins in takes:
        budget.take(rows, joins=joins)
        assert budget.rows >= 0
        assert budget.sequences >= 0


def test_forgetting_keeps_memory_bounded() -> None:
    scheduler = Scheduler(8, 8)
    candidate = Candidate(1, "a", (1,), 0)
    scheduler.pick([candidate])
    assert scheduler.last_served(candidate) != (0, 0)
    scheduler.forget(1)
    scheduler.forget_owner("a")
    assert scheduler.last_served(candidate) == (0, 0)


@settings(max_examples=20)
@given(st.integers(1, 64))
def test_the_share_holds_any_step(max_rows: int) -> None:
    assert 1 <= max_step_rows(max_rows) <= max_rows


def test_nothing_to_do() -> None:
    assert Scheduler(8, 8).pick([]) == []
    assert Scheduler(8, 8).pick([Candidate(1, "a", (), 0)]) == []
