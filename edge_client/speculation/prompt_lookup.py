"""Prompt lookup: what followed the last time the text ended like this (Saxena 2023; Yang et al. 2023). No model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from edge_client.speculation.drafter import DraftRequest, Guesses

LONGEST_MATCH = 8
SHORTEST_MATCH = 2
LONGEST_CHAIN = 16
# Chance that the token after a match of so many tokens comes again; a pace calibrates what it makes of them.
CHANCES = {1: 0.2, 2: 0.4, 3: 0.55, 4: 0.65, 5: 0.72, 6: 0.78, 7: 0.82, 8: 0.85}
# Sequences whose index is kept; the least recently used one goes.
KEPT_SEQUENCES = 64


class NgramIndex:
    """Where each n-gram of a growing sequence last ended, the newest token excepted: it has no follower yet."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        # Never empty once it was extended, which comes right after it was made.
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` continues what is indexed."""
        count = len(self._tokens)
        # The last token tells most foreign sequences apart without comparing them.
        if len(tokens) < count or tokens[count - 1] != self._tokens[-1]:
            return False
        return list(tokens[:count]) == self._tokens

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the whole sequence, which continues what is indexed."""
        begin = len(self._tokens)
        self._tokens.extend(tokens[begin:])
        # An n-gram counts once a token follows it.
        for end in range(max(1, begin), len(self._tokens)):
            for length in range(self._shortest, min(self._longest, end) + 1):
                self._ends[tuple(self._tokens[end - length : end])] = end

    def longest(self) -> tuple[int, int] | None:
        """Match the longest tail that came before; give its length, and the position after its latest occurrence."""
        count = len(self._tokens)
        for length in range(min(self._longest, count - 1), self._shortest - 1, -1):
            end = self._ends.get(tuple(self._tokens[count - length :]))
            if end is not None:
                return length, end
        return None

    def after(self, position: int, count: int) -> list[int]:
        """What followed; where that runs into the end of the sequence it goes round, as a repeating text would."""
        found = self._tokens[position : position + count]
        period = len(self._tokens) - position
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


class PromptLookup:
    """Proposes a chain: what followed the latest occurrence of the longest tail of 8 to 2 tokens.

    The index of a sequence is kept under its first tokens and extended as the sequence grows, so that a proposal costs
    microseconds however long the text is.
    """

    def __init__(self, *, shortest: int = SHORTEST_MATCH, longest: int = LONGEST_MATCH) -> None:
        assert 1 <= shortest <= longest <= LONGEST_MATCH, "lengths of matches"
        self._shortest, self._longest = shortest, longest
        self._indices: OrderedDict[int, NgramIndex] = OrderedDict()
        self._next = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Guess for each request; see `Drafter.propose`."""
        return [self._chain(request) for request in requests]

    def conditionals(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Give what may follow and each token's chance, given that those before it were right."""
        index = self._index(tokens)
        index.extend(tokens)
        match = index.longest()
        if match is None:
            return [], []
        length, position = match
        # Each further token that comes true makes the match longer.
        chances = [CHANCES[min(LONGEST_MATCH, length + step)] for step in range(count)]
        return index.after(position, count), chances

    def _chain(self, request: DraftRequest) -> Guesses:
        found, conditionals = self.conditionals(request.tokens, min(request.max_guesses, LONGEST_CHAIN))
        tokens: list[int] = []
        chances: list[float] = []
        chance = 1.0
        for token, conditional in zip(found, conditionals, strict=True):
            chance *= conditional
            if chance < request.min_chance:
                break
            tokens.append(token)
            chances.append(chance)
        return Guesses(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(chances))

    def _index(self, tokens: Sequence[int]) -> NgramIndex:
        """Find the longest index that `tokens` continues, or begin one."""
        found = [key for key, index in self._indices.items() if index.holds(tokens)]
        if found:
            key = max(found, key=lambda key: len(self._indices[key]))
            self._indices.move_to_end(key)
            return self._indices[key]
        index = self._indices[self._next] = NgramIndex(self._shortest, self._longest)
        self._next += 1
        if len(self._indices) > KEPT_SEQUENCES:
            self._indices.popitem(last=False)
        return index
