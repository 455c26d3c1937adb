"""Where each client has a weight set of its own: who goes through passes together, and what waiting is worth. Pure."""

from __future__ import annotations

from collections.abc import Iterable

# The machine stands idle for this part of a pass at most, so that those who went together last time go together again:
# a second pass for the later ones costs its fixed part, often most of it, once more.
WORTH = 0.25


class Company:
    """Keeps who was in the newest pass of each client, and what the last pass took."""

    def __init__(self) -> None:
        self._with: dict[int, frozenset[int]] = {}
        self._left_at = 0.0
        self._took = 0.0

    def leave(self, clients: Iterable[int], now: float) -> None:
        """Note that clients' rows go forward together."""
        together = frozenset(clients)
        self._with |= dict.fromkeys(together, together)
        self._left_at = now

    def arrive(self, now: float) -> None:
        """Note that they are through."""
        self._took = now - self._left_at

    @property
    def patience(self) -> float:
        """How many seconds those who are there wait at most for others, counted from when the first came."""
        return WORTH * self._took

    def missing(self, there: Iterable[int]) -> frozenset[int]:
        """Give who went last with any of those who are there, and is not there."""
        clients = frozenset(there)
        return frozenset[int]().union(*(self._with.get(client, ()) for client in clients)) - clients
