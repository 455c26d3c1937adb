"""Where each client has a weight set of its own: for whom a pass waits a moment, and what waiting is worth. Pure.

What a pass takes is a fixed part and a part by its rows. Two clients in one pass instead of two save the fixed part, so
it is worth waiting for the second one for some of it. Left to themselves, clients whose turns do not coincide never
would: each finds the machine busy with another one.
"""

from __future__ import annotations

from collections.abc import Iterable

# The machine stands idle for this part of what is saved at most, in the hope of taking more clients along.
WORTH = 0.5
# How much the newest time counts in what a client takes, and the newest pass in what passes take.
NEWEST = 0.5
NEWEST_PASS = 0.1


class PassCost:
    """Learns the fixed part of a pass: a straight line through what passes of different sizes took, least squares."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._rows = self._seconds = 0.0
        self._spread = self._together = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Take in a pass."""
        self._weight += NEWEST_PASS * (1 - self._weight)
        newest = NEWEST_PASS / self._weight
        rows_off, seconds_off = rows - self._rows, seconds - self._seconds
        self._rows += newest * rows_off
        self._seconds += newest * seconds_off
        self._spread = (1 - newest) * (self._spread + newest * rows_off**2)
        self._together = (1 - newest) * (self._together + newest * rows_off * seconds_off)

    @property
    def fixed(self) -> float:
        """Seconds that a pass takes whatever its rows; as long as all were of one size, all of it may be that."""
        if self._spread <= 1e-6 * self._rows**2:
            return self._seconds
        return min(self._seconds, max(0.0, self._seconds - self._together / self._spread * self._rows))


class Company:
    """Learns how long each client takes from an answer to its next states, and what a pass costs."""

    def __init__(self) -> None:
        self._cost = PassCost()
        self._answered_at: dict[int, float] = {}
        self._takes: dict[int, float] = {}
        self._left_at = 0.0
        self._free_at = 0.0
        # Once somebody waits it is settled until when, whatever comes in between.
        self._until: float | None = None

    @property
    def patience(self) -> float:
        """How many seconds waiting is worth."""
        return WORTH * self._cost.fixed

    def leave(self, arrivals: Iterable[tuple[int, float]], now: float) -> None:
        """Note that clients' rows, which came when `arrivals` says, go forward together."""
        for client, arrived_at in arrivals:
            if client in self._answered_at:
                took = max(0.0, arrived_at - self._answered_at[client])
                self._takes[client] = took + (1 - NEWEST) * (self._takes.get(client, took) - took)
        self._left_at, self._until = now, None

    def arrive(self, clients: Iterable[int], rows: int, now: float) -> None:
        """Note that they are through, with so many rows, and answered."""
        self._cost.add(rows, now - self._left_at)
        self.answer(clients, now)

    def answer(self, clients: Iterable[int], now: float) -> None:
        """Note that a backward is done and its clients are answered."""
        self._answered_at |= dict.fromkeys(clients, now)
        self._free_at = now

    def wait_until(self, first: float, missing: Iterable[int]) -> float | None:
        """Say until when those who are there, the first since `first`, wait for any of `missing`; null for nobody.

        A client that was never answered is not expected, one that was never timed at any moment.
        """
        until = self._until
        if until is None:
            until = max(first, self._free_at) + self.patience
        known = [client for client in missing if client in self._answered_at]
        if not any(self._answered_at[client] + self._takes.get(client, 0.0) <= until for client in known):
            return None
        self._until = until
        return until
