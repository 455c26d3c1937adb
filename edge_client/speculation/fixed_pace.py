"""Drafting at every step, a given number of guesses: for experiments, and for links that one knows."""

from __future__ import annotations

from edge_client.speculation.pace import LEAST_CHANCE, Round, Wish


class FixedPace:
    """Wishes for `guesses` guesses whatever they bring."""

    def __init__(self, guesses: int) -> None:
        self._wish = Wish(guesses, LEAST_CHANCE)

    def wish(self) -> Wish:
        """What the next round should be: always the same."""
        return self._wish

    def observe(self, this: Round) -> None:
        """Take what a round brought; it changes nothing."""
