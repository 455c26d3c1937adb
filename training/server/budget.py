"""How much memory all jobs of a server may hold for what is under way. Pure."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Bytes that are held until a backward, of `limit()` that may be. `listeners` hear when some are free again."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.held = 0
        self.listeners: set[Callable[[], None]] = set()

    @property
    def limit(self) -> int:
        """Bytes that may be held."""
        return self._limit()

    def fits(self, nbytes: int) -> bool:
        """Say whether so many more may be held now."""
        return self.held + nbytes <= self.limit

    def take(self, nbytes: int) -> None:
        """Hold so many more."""
        self.held += nbytes

    def release(self, nbytes: int) -> None:
        """Hold so many less."""
        self.held -= nbytes
        assert self.held >= 0, "more was released than was held"
        for listener in list(self.listeners):
            listener()
