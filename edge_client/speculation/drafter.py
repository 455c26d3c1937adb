"""What a drafter is asked and what it answers. Guesses change the speed of an answer, never its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from split_llama.errors import UsageError
from split_llama.mask import MAX_TREE_NODES

# The root, the token that was sampled, takes one node of the tree.
MAX_GUESSES = MAX_TREE_NODES - 1
# Chances are products of float32 numbers: a child may come out above its parent by rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One session's wish for guesses.

    `tokens` is the whole sequence: prompt, answer, last the token just sampled, which was not fed yet. `state [d]`
    float32 is the output of the final norm at the position that predicted this last token.
    """

    tokens: Sequence[int]
    state: Tensor
    max_guesses: int
    min_chance: float

    def __post_init__(self) -> None:
        assert len(self.tokens) > 0, "a draft follows a token"
        assert 1 <= self.max_guesses <= MAX_GUESSES, f"1 to {MAX_GUESSES} guesses can be asked for"


@dataclass(frozen=True, slots=True)
class Guesses:
    """A forest behind the root (the sampled token, which is not listed).

    `parents[i]` is -1 (the root) or an earlier guess's index. `chances[i]` estimates the probability that guess `i` and
    all above it are accepted, and is never above its parent's. Siblings have distinct tokens. Raises `UsageError`
    where a drafter breaks this: it may be a user's own.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not len(self.parents) == len(self.chances) == count <= MAX_GUESSES:
            raise UsageError(
                f"a drafter gave {count} tokens, {len(self.parents)} parents and {len(self.chances)} chances; one of "
                f"each per guess was expected, and at most {MAX_GUESSES} guesses"
            )
        seen: set[tuple[int, int]] = set()
        for guess, (token, parent, chance) in enumerate(zip(self.tokens, self.parents, self.chances, strict=True)):
            if not -1 <= parent < guess:
                raise UsageError(f"a drafter gave guess {guess} the parent {parent}; an earlier guess or -1 can be one")
            if not 0 <= chance <= (1.0 if parent < 0 else self.chances[parent]) + ROUNDING:
                raise UsageError(f"a drafter gave guess {guess} the chance {chance}; 0 to its parent's was expected")
            if token < 0 or (parent, token) in seen:
                raise UsageError(f"a drafter gave token {token} twice after the same token, or it is no token at all")
            seen.add((parent, token))

    def __len__(self) -> int:
        return len(self.tokens)

    def within(self, most: int, vocab_size: int) -> Guesses:
        """Give the first `most` guesses; none at all if a token is not one of the model's `vocab_size`."""
        if any(token >= vocab_size for token in self.tokens):
            return Guesses()
        if len(self) <= most:
            return self
        return Guesses(self.tokens[:most], self.parents[:most], self.chances[:most])

    def depths(self) -> tuple[int, ...]:
        """Depth of each guess; those right behind the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def tree(self) -> tuple[int, ...]:
        """Ancestor bits of the root and of every guess, guess `i` as node `i + 1` (see `split_llama.draft_tree`)."""
        bits = [1]
        for guess, parent in enumerate(self.parents):
            bits.append(bits[parent + 1] | 2 << guess)
        return tuple(bits)

    def child(self, parent: int, token: int) -> int | None:
        """Give the guess of `token` right after guess `parent` (-1: the root), if there is one."""
        for guess in range(parent + 1, len(self.tokens)):
            if self.parents[guess] == parent and self.tokens[guess] == token:
                return guess
        return None


class Drafter(Protocol):
    """Whatever guesses. It belongs to the worker's thread and keeps no state per session but caches of its own."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Guess for each request, in order: at most `max_guesses`, none with a chance below `min_chance`."""
        ...
