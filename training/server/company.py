"""Where each client has a weight set of its own: for whom a pass waits a moment, and what waiting is worth. Pure.

A pass for one client more costs its rows; a pass of its own costs the fixed part once more, often most of it. Left to
themselves, clients whose turns do not coincide never would: each finds the machine busy with another one.
"""

from __future__ import annotations

from collections.abc import Iterable

# The machine stands idle for this part of a pass at most, in the hope of taking more clients along.
WORTH = 0.25
# How much the newest time counts in what a client takes.
NEWEST = 0.5


class Company:
    """Learns how long each client takes from an answer to its next states, and how long a pass takes."""

    def __init__(self) -> None:
        self._answered_at: dict[int, float] = {}
        self._takes: dict[int, float] = {}
        self._left_at = 0.0
        self._took = 0.0
        self._free_at = 0.0
        # Once somebody waits it is settled until when, whatever comes in between.
        self._until: float | None = None

    def leave(self, arrivals: Iterable[tuple[int, float]], now: float) -> None:
        """Note that clients' rows, which came when `arrivals` says, go forward together."""
        for client, arrived_at in arrivals:
            if client in self._answered_at:
                took = max(0.0, arrived_at - self._answered_at[client])
                self._takes[client] = took + (1 - NEWEST) * (self._takes.get(client, took) - took)
        self._left_at, self._until = now, None

    def arrive(self, clients: Iterable[int], now: float) -> None:
        """Note that they are through, and answered."""
        self._took = now - self._left_at
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
            until = max(first, self._free_at) + WORTH * self._took
        known = [client for client in missing if client in self._answered_at]
        if not any(self._answered_at[client] + self._takes.get(client, 0.0) <= until for client in known):
            return None
        self._until = until
        return until
