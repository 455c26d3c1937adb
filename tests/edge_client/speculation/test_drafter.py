"""What guesses must be like, and the tree that they are put together in."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_client.speculation.drafter import MAX_GUESSES, DraftRequest, Guesses
from edge_client.speculation.tree import GuessTree
from split_llama.draft_tree import check_tree, is_chain
from split_llama.errors import UsageError

FORK = Guesses((5, 6, 5, 7), (-1, -1, 0, 2), (0.6, 0.3, 0.5, 0.5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": (5, 6, 5)}, "one of each per guess"),
        ({"parents": (-1, 1, 0, 2)}, "an earlier guess"),
        ({"parents": (-1, -2, 0, 2)}, "an earlier guess"),
        ({"chances": (0.6, 0.3, 0.7, 0.5)}, "0 to its parent's"),
        ({"chances": (0.6, -0.1, 0.5, 0.5)}, "0 to its parent's"),
        ({"chances": (0.6, float("nan"), 0.5, 0.5)}, "0 to its parent's"),
        ({"tokens": (5, 5, 5, 7)}, "twice after the same token"),
        ({"tokens": (5, -6, 5, 7)}, "no token at all"),
    ],
)
def test_a_drafters_mistake_is_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(FORK, **changes)


def test_more_guesses_than_a_tree_holds_are_refused() -> None:
    many = MAX_GUESSES + 1
    with pytest.raises(UsageError, match=f"at most {MAX_GUESSES}"):
        Guesses(tuple(range(many)), (-1,) * many, (0.01,) * many)


def test_a_fork_in_other_words() -> None:
    assert FORK.depths() == (1, 1, 2, 3)
    assert FORK.tree() == (0b1, 0b11, 0b101, 0b1011, 0b11011)
    assert (FORK.child(-1, 6), FORK.child(0, 5), FORK.child(2, 7), FORK.child(1, 5)) == (1, 2, 3, None)
    assert len(FORK) == 4
    check_tree(FORK.tree())
    assert is_chain(Guesses((1, 2), (-1, 0), (0.5, 0.5)).tree())
    assert Guesses().tree() == (1,)


def test_a_request_asks_for_something() -> None:
    with pytest.raises(AssertionError):
        DraftRequest([1], torch.zeros(4), 0, 0.1)
    with pytest.raises(AssertionError):
        DraftRequest([], torch.zeros(4), 1, 0.1)


nodes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4), st.floats(0, 1)), max_size=100)


@given(nodes, st.integers(1, MAX_GUESSES), st.floats(0, 1))
def test_the_likeliest_part_of_a_tree_is_a_tree(
    drawn: list[tuple[int, int, float]], max_guesses: int, min_chance: float
) -> None:
    tree = GuessTree()
    for place, token, conditional in drawn:
        parent = place % (len(tree) + 1) - 1
        if tree.find(parent, token) is None:
            tree.add(parent, token, conditional)
    guesses = tree.best(max_guesses, min_chance)
    assert len(guesses) <= max_guesses
    assert all(chance >= min_chance for chance in guesses.chances)
    assert list(guesses.chances) == sorted(guesses.chances, reverse=True)
    check_tree(guesses.tree())
    left = sorted(tree.chances(), reverse=True)[len(guesses) :]
    assert all(chance < min_chance for chance in left) or len(guesses) == max_guesses
    paths = {_path(tree.tokens, tree.parents, node) for node in range(len(tree))}
    assert {_path(guesses.tokens, guesses.parents, node) for node in range(len(guesses))} <= paths


def _path(tokens: Any, parents: Any, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(path)


def test_siblings_are_distinct_and_parents_first() -> None:
    tree = GuessTree()
    top = tree.add(-1, 4, 0.5)
    tree.add(top, 4, 0.5)
    assert list(tree.children(-1)) == [0]
    assert list(itertools.chain(tree.children(0), tree.children(1))) == [1]
    with pytest.raises(AssertionError):
        tree.add(-1, 4, 0.2)
    with pytest.raises(AssertionError):
        tree.add(7, 4, 0.2)
