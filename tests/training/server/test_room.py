"""How many micro-batches go forward together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from training.server.engine import most_that_fit


@given(st.integers(1, 70), st.integers(0, 80))
def test_the_most_that_fit_are_found_with_few_questions(count: int, limit: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= limit

    assert most_that_fit(count, fits) == min(count, limit)
    assert asked[0] == count, "mostly all fit"
    assert all(1 <= number <= count for number in asked)
    assert len(asked) <= 1 + count.bit_length()
