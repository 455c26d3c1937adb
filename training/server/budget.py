"""How much memory all jobs of a server may hold for what is under way. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Droppable(Protocol):
    """Something held that can be done without: a tape, as what it was computed from is there."""

    nbytes: int

    def drop_tape(self) -> None:
        """Give the memory back."""
        ...


class Budget:
    """Bytes that are held until a backward, of `limit()` that may be. `listeners` hear when some are free again."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self.held = 0
        self.listeners: set[Callable[[], None]] = set()
        self.accounts: set[Account] = set()

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
        self.tell()

    def tell(self) -> None:
        """Have everybody ask again."""
        for listener in list(self.listeners):
            listener()


class Account:
    """What one job holds of a budget, and what of it can be dropped while it waits for a client.

    A client that does not answer must not keep the memory of all jobs. So a job that gets no room takes it from others
    that hold more than it does, first what waits longest of the one that holds most; and its own only where that has
    waited for `patience` seconds: until then it is about to be used.
    """

    def __init__(self, budget: Budget, patience: float) -> None:
        self._budget = budget
        self._patience = patience
        # In the order in which they began to wait.
        self._waiting: dict[Droppable, float] = {}
        self.held = 0

    def take(self, nbytes: int) -> None:
        """Hold so many more."""
        self._budget.take(nbytes)
        self.held += nbytes
        self._budget.accounts.add(self)

    def release(self, nbytes: int) -> None:
        """Hold so many less."""
        self.held -= nbytes
        if not self.held:
            self._budget.accounts.discard(self)
        self._budget.release(nbytes)

    def waits(self, item: Droppable, now: float) -> None:
        """Note that something waits for a client from now on, and can be dropped."""
        self._waiting = {other: since for other, since in self._waiting.items() if other.nbytes}
        self._waiting[item] = now

    def is_used(self, item: Droppable) -> None:
        """Note that something waits no more."""
        self._waiting.pop(item, None)

    def make_room(self, nbytes: int, now: float) -> bool:
        """Have others, or what waits too long, give room for so many bytes; say whether there is some now.

        Nothing is dropped where all of it would not be enough.
        """
        others = [account for account in self._budget.accounts if account is not self and account.held > self.held]
        stale = [item for item, since in self._waiting.items() if item.nbytes and now >= since + self._patience]
        free = sum(account.spare for account in others) + sum(item.nbytes for item in stale)
        if not self._is_enough(nbytes, free):
            return False
        while not self._is_enough(nbytes, 0):
            if stale:
                stale.pop(0).drop_tape()
            else:
                max((account for account in others if account.spare), key=lambda account: account.held).drop_longest()
        return True

    def _is_enough(self, nbytes: int, free: int) -> bool:
        """Say whether so many bytes fit once others are free; with nothing held at all, one has to go."""
        return self._budget.fits(nbytes - free) or self._budget.held == free

    @property
    def spare(self) -> int:
        """Bytes that can be dropped."""
        return sum(item.nbytes for item in self._waiting)

    def drop_longest(self) -> None:
        """Drop what has waited longest."""
        next(item for item in self._waiting if item.nbytes).drop_tape()

    def asks_again_in(self, now: float) -> float | None:
        """Say in how many seconds something more of its own will have waited too long."""
        times = [since + self._patience - now for item, since in self._waiting.items() if item.nbytes]
        return min((seconds for seconds in times if seconds > 0), default=None)
