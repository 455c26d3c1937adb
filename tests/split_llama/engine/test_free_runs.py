"""Free pages as runs: against a plain set, and what they are for, sequences whose pages lie together."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.config import BlockRange
from split_llama.engine.free_runs import FreeRuns
from split_llama.engine.pages import PagePool
from split_llama.engine.sequence import Sequence


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 39), st.booleans()), max_size=60))
def test_runs_say_what_a_plain_set_says(num_pages: int, orders: list[tuple[int, int, bool]]) -> None:
    runs, free, taken = FreeRuns(num_pages), set(range(num_pages)), set()
    for count, page, give in orders:
        if give:
            back = random.Random(page).sample(sorted(taken), min(count, len(taken)))
            runs.give_back(back)
            taken -= set(back)
            free |= set(back)
        elif count <= len(free):
            after = page if page in taken else None
            follows = after is not None and after + 1 in free
            got = runs.take(count, after)
            assert len(set(got)) == count
            assert set(got) <= free
            assert not got or not follows or got[0] == page + 1
            free -= set(got)
            taken |= set(got)
        runs.check_integrity()
        assert list(runs) == sorted(free)
        assert len(runs) == len(free)


def test_more_than_is_free_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError):
        FreeRuns(3).take(4)


def breaks(sequence: Sequence) -> int:
    return sum(b != a + 1 for a, b in pairwise(sequence.block_table))


@pytest.mark.parametrize("prompt", [1, 40, 200])
def test_sequences_that_grow_side_by_side_stay_in_one_piece(prompt: int) -> None:
    pool = PagePool(16 * 64, 16)
    sequences = [Sequence(pool, BlockRange(0, 1), 64 * 16) for _ in range(16)]
    for sequence in sequences:
        sequence.append(prompt)
    for _ in range(63 * 16 - prompt):
        for sequence in sequences:
            sequence.append(1)
    assert [breaks(sequence) for sequence in sequences] == [0] * 16


def test_a_lone_sequence_fills_the_pool_in_order() -> None:
    pool = PagePool(50, 4)
    sequence = Sequence(pool, BlockRange(0, 1), 200)
    for _ in range(200):
        sequence.append(1)
    assert sequence.block_table == tuple(range(50))


def test_sequences_that_come_and_go_leave_few_breaks() -> None:
    pool = PagePool(16 * 64, 16)
    rng = random.Random(5)
    living = [Sequence(pool, BlockRange(0, 1), 64 * 16) for _ in range(8)]
    broken = ended = 0
    for _ in range(6000):
        place = rng.randrange(8)
        if living[place].length > 40 * 16:
            broken += breaks(living[place])
            ended += 1
            living[place].free()
            living[place] = Sequence(pool, BlockRange(0, 1), 64 * 16)
        living[place].append(rng.choice([1, 16, 64]))
    assert ended > 100
    # Out of about 40 pages each.
    assert broken < ended


def test_the_work_per_page_does_not_grow_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the runs that are added, and the heap entries that are kept, in place of time."""
    work = {"added": 0}
    real = FreeRuns._add

    def counted(self: FreeRuns, start: int, stop: int) -> None:
        work["added"] += 1
        real(self, start, stop)

    monkeypatch.setattr(FreeRuns, "_add", counted)
    pool, rng = PagePool(100_000, 16), random.Random(1)
    sequences = [Sequence(pool, BlockRange(0, 1), 10**7) for _ in range(256)]
    pages = 0
    for _ in range(20_000):
        sequence = rng.choice(sequences)
        if sequence.length > 2000:
            sequence.free()
        before = len(sequence.block_table)
        sequence.append(16)
        pages += len(sequence.block_table) - before
    assert pages == 20_000
    assert work["added"] < 3 * pages
    assert len(pool._free._longest) <= 2 * 2 * 257 + 64
