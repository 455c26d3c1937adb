from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from split_llama import accountant as module
from split_llama.accountant import STANDARD_ERROR, Accountant


def digests(numbers: Iterable[int]) -> list[bytes]:
    return [hashlib.sha256(number.to_bytes(4, "little")).digest() for number in numbers]


@given(st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=20))
def test_it_counts_as_a_set_does(batches: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHERED_ROWS", 7)
        accountant, known = Accountant(), set()
        for batch in batches:
            new = set(batch) - known
            known |= new
            assert accountant.charge(digests(batch)) == len(new)
            assert accountant.rows == len(known)
    assert accountant.is_exact


def test_it_is_small() -> None:
    accountant = Accountant()
    count = 3 * module.GATHERED_ROWS
    for first in range(0, count, 4096):
        accountant.charge(digests(range(first, first + 4096)))
    assert accountant.rows == count
    assert accountant._sorted.nbytes + 8 * len(accountant._gathered) == 8 * count
    assert len(accountant._gathered) <= module.GATHERED_ROWS


def test_beyond_the_exact_rows_it_estimates_and_never_falls() -> None:
    accountant, counts = Accountant(exact_rows=60_000), []
    for first in range(0, 200_000, 5000):
        accountant.charge(digests(range(first, first + 5000)))
        counts.append(accountant.rows)
        assert accountant.is_exact == (first < 60_000)
        assert abs(accountant.rows / (first + 5000) - 1) < 5 * STANDARD_ERROR
    assert counts == sorted(counts)
    assert accountant.charge(digests(range(200_000))) == 0
    assert accountant._sorted.nbytes == 0
