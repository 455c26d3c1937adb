"""Dealing one data set out to clients."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_llama.errors import UsageError
from training.tasks.examples import Example
from training.tasks.partition import label_counts, partition

HOWS = ("iid", "dirichlet:0.001", "dirichlet:0.5", "dirichlet:100", "shards:1", "shards:3")
LABELS = st.lists(st.sampled_from("abcde"), min_size=24, max_size=80)


def _examples(labels: list[str]) -> list[Example]:
    return [Example(f"prompt {number}", "answer", label=label) for number, label in enumerate(labels)]


@settings(deadline=None)
@given(labels=LABELS, clients=st.integers(1, 8), how=st.sampled_from(HOWS), seed=st.integers(0, 2**40))
def test_every_example_goes_to_one_client_and_nobody_is_left_out(
    labels: list[str], clients: int, how: str, seed: int
) -> None:
    examples = _examples(labels)
    parts = partition(examples, clients, how, seed)
    assert len(parts) == clients
    assert all(parts)
    assert sorted((e for part in parts for e in part), key=examples.index) == examples
    assert all(part == sorted(part, key=examples.index) for part in parts)
    assert parts == partition(examples, clients, how, seed)


@settings(deadline=None)
@given(labels=LABELS, clients=st.integers(1, 8), how=st.sampled_from(("iid", "shards:1", "shards:3")))
def test_these_shares_are_of_equal_size(labels: list[str], clients: int, how: str) -> None:
    sizes = [len(part) for part in partition(_examples(labels), clients, how, 0)]
    # A client's shards each round by one at most.
    assert max(sizes) - min(sizes) <= (3 if how == "shards:3" else 1)


@pytest.mark.parametrize("clients", [2, 4, 8])
def test_shards_hold_few_labels(clients: int) -> None:
    examples = _examples([label for label in "abcdefgh" for _ in range(100)])
    for part in partition(examples, clients, f"shards:{8 // clients}", 3):
        assert set(label_counts(part).values()) == {100}
        assert len(label_counts(part)) == 8 // clients


def _largest_share(how: str) -> float:
    """The mean, over labels, of the share that the client with most of a label has."""
    examples = _examples([label for label in "abcdefghij" for _ in range(100)])
    counts = [label_counts(part) for part in partition(examples, 4, how, 0)]
    return fmean(max(count.get(label, 0) for count in counts) / 100 for label in "abcdefghij")


def test_the_smaller_alpha_the_fewer_clients_share_a_label() -> None:
    alike, usual, apart = (_largest_share(f"dirichlet:{alpha}") for alpha in (1000, 0.5, 0.01))
    assert alike < 0.35
    assert 0.45 < usual < 0.9
    assert apart > 0.95
    assert _largest_share("iid") < 0.4


def test_alphas_too_small_for_a_float_give_each_label_to_one_client() -> None:
    examples = _examples(["a"] * 50 + ["b"] * 50)
    owners = [label_counts(part) for part in partition(examples, 2, "dirichlet:1e-6", 1)]
    assert sum(sum(count.values()) for count in owners) == 100
    assert max(max(count.values()) for count in owners) >= 49


def test_seeds_deal_differently() -> None:
    examples = _examples(list("abcde" * 20))
    for how in HOWS:
        assert partition(examples, 4, how, 0) != partition(examples, 4, how, 1)


@pytest.mark.parametrize(
    "how", ["", "IID", "iid:2", "dirichlet:0", "dirichlet:nan", "dirichlet:-1", "shards:1.5", "x:1"]
)
def test_other_ways_are_refused(how: str) -> None:
    with pytest.raises(UsageError, match="data is dealt out by 'iid', 'dirichlet:ALPHA'"):
        partition(_examples(["a"] * 9), 2, how, 0)


def test_defaults_of_the_ways() -> None:
    assert [len(p) for p in partition(_examples(["a"] * 12), 3, "shards", 0)] == [4, 4, 4]
    assert sum(len(p) for p in partition(_examples(["a"] * 9), 3, "dirichlet", 0)) == 9


@pytest.mark.parametrize(("clients", "how"), [(0, "iid"), (5, "iid"), (2, "shards:3"), (5, "dirichlet:1")])
def test_too_few_examples_are_refused(clients: int, how: str) -> None:
    with pytest.raises(UsageError, match="4 examples cannot be dealt out to"):
        partition(_examples(["a"] * 4), clients, how, 0)


def test_dealing_by_label_needs_labels() -> None:
    examples = [Example("a", "b", label="x"), Example("c", "d")]
    with pytest.raises(UsageError, match="example 1 has none"):
        partition(examples, 2, "dirichlet:1", 0)
    assert sum(len(part) for part in partition(examples, 2, "iid", 0)) == 2
