"""The order of batches: every epoch a permutation, every batch a function of its number."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import UsageError
from training.tasks.examples import Sample
from training.tasks.order import batches


def _samples(count: int) -> list[Sample]:
    return [Sample((number,), (number,)) for number in range(count)]


COUNTS = st.integers(1, 40)
SIZES = st.integers(1, 50)
SEEDS = st.integers(0, 2**40)


@settings(deadline=None)
@given(count=COUNTS, size=SIZES, seed=SEEDS, epochs=st.integers(1, 3))
def test_every_sample_comes_once_in_every_epoch(count: int, size: int, seed: int, epochs: int) -> None:
    order = batches(_samples(count), size, seed)
    enough = -(-count * epochs // size)
    seen = [sample.token_ids[0] for batch in islice(order, enough) for sample in batch]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(count=COUNTS, size=SIZES, seed=SEEDS, indices=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_depends_on_its_number_alone(count: int, size: int, seed: int, indices: list[int]) -> None:
    order = batches(_samples(count), size, seed)
    jumped = [order.batch(index) for index in indices]
    assert jumped == [batches(_samples(count), size, seed).batch(index) for index in indices]
    walked = list(islice(order, max(indices) + 1))
    assert jumped == [walked[index] for index in indices]
    assert all(len(batch) == size for batch in walked)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    samples = _samples(50)
    first, second = batches(samples, 50, 0).batch(0), batches(samples, 50, 0).batch(1)
    other = batches(samples, 50, 1).batch(0)
    assert first != second
    assert first != other
    assert second != other
    assert Counter(first) == Counter(other)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert [s.token_ids[0] for s in batches(_samples(8), 8, 7).batch(0)] == [1, 3, 0, 6, 4, 7, 2, 5]


@pytest.mark.parametrize(("count", "size", "said"), [(0, 1, "no samples"), (1, 0, "batch_size must be at least 1")])
def test_nothing_to_order_is_refused(count: int, size: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        batches(_samples(count), size, 0)


def test_batches_before_the_first_are_refused() -> None:
    with pytest.raises(UsageError, match="numbered from 0, found -1"):
        batches(_samples(3), 1, 0).batch(-1)
