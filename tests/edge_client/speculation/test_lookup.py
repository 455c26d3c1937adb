"""Prompt lookup, the mixture with a head, and how a drafter is found by its name."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_client.speculation import prompt_lookup
from edge_client.speculation.combined import CombinedDrafter
from edge_client.speculation.drafter import DraftRequest, Guesses
from edge_client.speculation.find import find_head, make_drafter
from edge_client.speculation.head_drafter import HeadDrafter
from edge_client.speculation.head_file import head_path, save_head
from edge_client.speculation.prompt_lookup import CHANCES, KEPT_SEQUENCES, LONGEST_CHAIN, LONGEST_MATCH, PromptLookup
from split_llama.checkpoint import Checkpoint
from split_llama.errors import CheckpointError, ModelMismatch, UsageError
from tests.edge_client.speculation.conftest import fresh


def ask(tokens: Sequence[int], most: int = 8, least: float = 0.0) -> DraftRequest:
    return DraftRequest(tokens, torch.zeros(16), most, least)


def slow_lookup(tokens: Sequence[int], count: int) -> tuple[int, list[int]]:
    """What prompt lookup promises, by trying everything: length of the match and what followed."""
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 1, -1):
        tail = list(tokens[-length:])
        for end in range(len(tokens) - 1, length - 1, -1):
            if list(tokens[end - length : end]) == tail:
                longer = list(tokens)
                while len(longer) < end + count:
                    longer.append(longer[end + len(longer) - len(tokens)])
                return length, longer[end : end + count]
    return 0, []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20))
def test_it_finds_what_followed_the_longest_match(tokens: list[int], most: int) -> None:
    (guesses,) = PromptLookup().propose([ask(tokens, most)])
    length, followed = slow_lookup(tokens, min(most, LONGEST_CHAIN))
    assert list(guesses.tokens) == followed
    assert guesses.parents == tuple(range(-1, len(followed) - 1))
    if followed:
        assert guesses.chances[0] == CHANCES[length]


@given(st.lists(st.integers(0, 3), min_size=30, max_size=80), st.lists(st.integers(1, 9), max_size=6))
def test_a_growing_sequence_gets_what_a_fresh_one_gets(tokens: list[int], steps: list[int]) -> None:
    lookup, length = PromptLookup(), 20
    for step in [0, *steps]:
        length = min(len(tokens), length + step)
        assert lookup.propose([ask(tokens[:length])]) == PromptLookup().propose([ask(tokens[:length])])


def test_sequences_apart_and_sequences_taken_back() -> None:
    """Sessions come in turns, one begins anew from an earlier point, and more come than are remembered."""
    draw, lookup = random.Random(2), PromptLookup()
    texts = [[draw.randrange(4) for _ in range(40)] for _ in range(KEPT_SEQUENCES + 10)]
    for length in (30, 35, 33, 40):
        for text in texts:
            assert lookup.propose([ask(text[:length])]) == PromptLookup().propose([ask(text[:length])])


@given(st.lists(st.integers(0, 3), min_size=45, max_size=120), st.lists(st.integers(1, 40), max_size=8))
def test_of_long_texts_the_end_is_known(tokens: list[int], steps: list[int]) -> None:
    """What is proposed is what prompt lookup promises for some end of the text, and never takes more memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_lookup, "TOKENS_AT_ONCE", 16)
        patch.setattr(prompt_lookup, "KEPT_TOKENS", 50)
        lookup, length = PromptLookup(), 20
        for step in [0, *steps]:
            length = min(len(tokens), length + step)
            (guesses,) = lookup.propose([ask(tokens[:length])])
            (index,) = lookup._indices.values()
            assert len(index) == length
            assert 16 <= index.size <= 50
            assert list(guesses.tokens) == slow_lookup(tokens[length - index.size : length], 8)[1]


def test_long_texts_take_the_place_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "KEPT_TOKENS", 100)
    lookup = PromptLookup()
    for text in range(1, 6):
        lookup.propose([ask([text] * 30)])
    assert [index.size for index in lookup._indices.values()] == [30, 30, 30]
    lookup.propose([ask([3] * 50)])
    assert [index.size for index in lookup._indices.values()] == [30, 50]
    lookup.propose([ask([9] * 100)])
    assert [index.size for index in lookup._indices.values()] == [100]


def test_a_repeating_text_goes_round() -> None:
    (guesses,) = PromptLookup().propose([ask([9, 1, 2, 3, 1, 2, 3, 1, 2], 7)])
    assert guesses.tokens == (3, 1, 2, 3, 1, 2, 3)


def test_unlikely_guesses_are_left_out() -> None:
    tokens = [1, 2, 3, 4, 5, 1, 2]
    (guesses,) = PromptLookup().propose([ask(tokens, 8, 0.3)])
    assert guesses.tokens == (3,)
    assert PromptLookup().propose([ask(tokens, 8, 0.9)]) == [Guesses()]


class Fixed:
    """Answers every request with the same guesses."""

    def __init__(self, guesses: Guesses) -> None:
        self._guesses = guesses

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        return [self._guesses for _ in requests]


def test_the_mixture_shares_paths_and_chances() -> None:
    """After 1 2 the lookup says 3 4 ...; the head says 3 (0.5) then 7 (0.4), or 8 (0.3)."""
    head = Fixed(Guesses((3, 8, 7), (-1, -1, 0), (0.5, 0.3, 0.2)))
    mixed = CombinedDrafter(PromptLookup(), head, trust=0.5)
    (guesses,) = mixed.propose([ask([1, 2, 3, 4, 5, 1, 2])])
    chances = {(guesses.parents[i], token): guesses.chances[i] for i, token in enumerate(guesses.tokens)}
    weight = 0.5 * CHANCES[2]
    assert guesses.tokens[0] == 3
    assert chances[-1, 3] == pytest.approx(weight + (1 - weight) * 0.5)
    assert chances[-1, 8] == pytest.approx((1 - weight) * 0.3)
    deeper = 0.5 * CHANCES[3]
    assert chances[0, 4] == pytest.approx(chances[-1, 3] * deeper)
    assert chances[0, 7] == pytest.approx(chances[-1, 3] * 0.4 * (1 - deeper))


def test_without_a_match_the_head_is_alone() -> None:
    guesses = Guesses((3, 8), (-1, 0), (0.5, 0.25))
    assert CombinedDrafter(PromptLookup(), Fixed(guesses)).propose([ask([1, 2, 3])]) == [guesses]
    assert CombinedDrafter(PromptLookup(), Fixed(Guesses())).propose([ask([1, 2, 3])]) == [Guesses()]


def test_the_mixture_keeps_to_what_is_asked() -> None:
    head = Fixed(Guesses((3, 8, 7), (-1, -1, 0), (0.5, 0.3, 0.2)))
    (guesses,) = CombinedDrafter(PromptLookup(), head).propose([ask([1, 2, 3, 4, 5, 1, 2], 2, 0.25)])
    assert len(guesses) <= 2
    assert min(guesses.chances) >= 0.25


class OwnDrafter:
    """A user's drafter: the token after the last one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.size = checkpoint.config.vocab_size

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        return [Guesses(((request.tokens[-1] + 1) % self.size,), (-1,), (0.5,)) for request in requests]


class NoDrafter:
    def __init__(self, checkpoint: Checkpoint) -> None:
        pass


def test_names(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert isinstance(make_drafter("lookup", checkpoint, tmp_path), PromptLookup)
    assert isinstance(make_drafter("auto", checkpoint, tmp_path), PromptLookup)
    with pytest.raises(UsageError, match="train one with edge-client train-drafter"):
        make_drafter("head", checkpoint, tmp_path)
    for name in ("best", "", "head:"):
        with pytest.raises(UsageError, match="drafter"):
            make_drafter(name, checkpoint, tmp_path)


def test_a_trained_head_is_found(checkpoint: Checkpoint, other_checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = fresh(checkpoint)
    path = head_path(tmp_path, trained.ends)
    save_head(path, trained)
    assert find_head(checkpoint, tmp_path) == path
    assert isinstance(make_drafter("head", checkpoint, tmp_path), HeadDrafter)
    assert isinstance(make_drafter("auto", checkpoint, tmp_path), CombinedDrafter)
    assert isinstance(make_drafter(str(path), checkpoint, tmp_path), HeadDrafter)
    assert isinstance(make_drafter("auto", other_checkpoint, tmp_path), PromptLookup)
    with pytest.raises(ModelMismatch):
        make_drafter(str(path), other_checkpoint, tmp_path)


def test_a_damaged_head_stops_only_who_insists(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = head_path(tmp_path, fresh(checkpoint).ends)
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    notes: list[str] = []
    assert isinstance(make_drafter("auto", checkpoint, tmp_path, notify=notes.append), PromptLookup)
    assert "without the draft head" in notes[0]
    with pytest.raises(CheckpointError):
        make_drafter("head", checkpoint, tmp_path)


def test_a_users_own_drafter(checkpoint: Checkpoint, tmp_path: Path) -> None:
    drafter = make_drafter(f"{__name__}:OwnDrafter", checkpoint, tmp_path)
    assert drafter.propose([ask([318]), ask([319])]) == [Guesses((319,), (-1,), (0.5,)), Guesses((0,), (-1,), (0.5,))]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:X", "there is no module 'no_such_module'"),
        (f"{__name__}:Missing", "has no 'Missing'"),
        (f"{__name__}:NoDrafter", "no method propose"),
        ("random:random", "cannot be made with 1 argument"),
    ],
)
def test_a_wrong_drafter_is_told(name: str, said: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    paths = list(sys.path)
    with pytest.raises(UsageError, match=said):
        make_drafter(name, checkpoint, tmp_path)
    assert sys.path == paths
