"""Prompt lookup: what followed the last time the text ended like this (Saxena 2023; Yang et al. 2023). No model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from edge_client.speculation.drafter import DraftRequest, Guesses

LONGEST_MATCH = 8
SHORTEST_MATCH = 2
# Places where the last tokens occurred before, the latest ones: a text may repeat them thousands of times.
PLACES_LOOKED_AT = 64
LONGEST_CHAIN = 16
# Chance that the token after a match of so many tokens comes again; a pace calibrates what it makes of them.
CHANCES = {2: 0.4, 3: 0.55, 4: 0.65, 5: 0.72, 6: 0.78, 7: 0.82, 8: 0.85}
TOKENS_COMPARED = 64
# Sequences whose index is kept, and their tokens in all (some 200 bytes each); the least recently used ones go.
KEPT_SEQUENCES = 64
KEPT_TOKENS = 2**18
# Of more new tokens than this the last ones are indexed: building an index holds up all other sessions (some 10 ms).
TOKENS_AT_ONCE = 2**14


class TailIndex:
    """Where each pair of tokens in a growing sequence ended, the newest excepted: it has no follower yet.

    Of a long text only the end is known: `size` tokens of the `len` it has. Positions count from where that begins.
    """

    def __init__(self) -> None:
        self._begin(0)

    def _begin(self, start: int) -> None:
        self._start = start
        self._tokens: list[int] = []
        # Where a pair of tokens, as one number, ended last, and for each end that of the same pair before, or 0.
        # Numbers only: thousands of small lists would keep the garbage collector busy.
        self._last: dict[int, int] = {}
        self._before: list[int] = [0, 0]

    def __len__(self) -> int:
        return self._start + len(self._tokens)

    @property
    def size(self) -> int:
        """Tokens that are indexed."""
        return len(self._tokens)

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` continues what is indexed, as far as the last tokens tell.

        Comparing all of a long text at each token would cost more than all else here. Two texts that agree so far back
        at the same place may well share an index: a wrong guess is only a guess.
        """
        count = len(self)
        begin = max(self._start, count - TOKENS_COMPARED)
        return len(tokens) >= count and list(tokens[begin:count]) == self._tokens[begin - self._start :]

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the whole sequence, which continues what is indexed; what is too much is left out at its beginning."""
        if len(tokens) - len(self) > TOKENS_AT_ONCE or len(tokens) - self._start > KEPT_TOKENS:
            self._begin(max(0, len(tokens) - TOKENS_AT_ONCE))
        begin = len(self._tokens)
        self._tokens.extend(tokens[len(self) :])
        # A pair counts once a token follows it.
        for end in range(max(SHORTEST_MATCH, begin), len(self._tokens)):
            pair = self._pair(end)
            self._before.append(self._last.get(pair, 0))
            self._last[pair] = end

    def _pair(self, end: int) -> int:
        return self._tokens[end - 2] << 32 | self._tokens[end - 1]

    def longest(self) -> tuple[int, int] | None:
        """Match the longest tail that came before; give its length, and the position after its latest occurrence.

        Of the places where the last tokens occurred, the latest ones are looked at.
        """
        if len(self._tokens) < SHORTEST_MATCH:
            return None
        best: tuple[int, int] | None = None
        end = self._last.get(self._pair(len(self._tokens)), 0)
        for _ in range(PLACES_LOOKED_AT):
            if end == 0 or (best is not None and best[0] == LONGEST_MATCH):
                break
            length = self._match(end)
            if best is None or length > best[0]:
                best = length, end
            end = self._before[end]
        return best

    def _match(self, end: int) -> int:
        """How many tokens before `end` are those at the end of the sequence."""
        tokens, length = self._tokens, SHORTEST_MATCH
        while length < min(LONGEST_MATCH, end) and tokens[end - length - 1] == tokens[-length - 1]:
            length += 1
        return length

    def after(self, position: int, count: int) -> list[int]:
        """What followed; where that runs into the end of the sequence it goes round, as a repeating text would."""
        found = self._tokens[position : position + count]
        period = len(self._tokens) - position
        while len(found) < count:
            found.append(found[len(found) - period])
        return found


class PromptLookup:
    """Proposes a chain: what followed the latest occurrence of the longest tail of 8 to 2 tokens.

    The index of a sequence is kept and extended as the sequence grows, so that a proposal costs microseconds however
    long the text is.
    """

    def __init__(self) -> None:
        self._indices: OrderedDict[int, TailIndex] = OrderedDict()
        self._next = 0

    def propose(self, requests: Sequence[DraftRequest]) -> list[Guesses]:
        """Guess for each request; see `Drafter.propose`."""
        return [self._chain(request) for request in requests]

    def conditionals(self, tokens: Sequence[int], count: int) -> tuple[list[int], list[float]]:
        """Give what may follow and each token's chance, given that those before it were right."""
        index = self._index(tokens)
        index.extend(tokens)
        self._forget()
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

    def _index(self, tokens: Sequence[int]) -> TailIndex:
        """Find the longest index that `tokens` continues, or begin one."""
        found = [key for key, index in self._indices.items() if index.holds(tokens)]
        if found:
            key = max(found, key=lambda key: len(self._indices[key]))
            self._indices.move_to_end(key)
            return self._indices[key]
        index = self._indices[self._next] = TailIndex()
        self._next += 1
        return index

    def _forget(self) -> None:
        """Drop the least recently used indices beyond what is kept; the one in use is within the limits."""
        size = sum(index.size for index in self._indices.values())
        while len(self._indices) > KEPT_SEQUENCES or size > KEPT_TOKENS:
            _, index = self._indices.popitem(last=False)
            size -= index.size
