"""Which drafter a session's guesses come from, and at which pace: what `--speculate` and `--drafter` say."""

from __future__ import annotations

from collections.abc import Callable

from edge_client.decoding import Pace
from edge_client.settings import EdgeSettings
from edge_client.speculation.drafter import MAX_GUESSES
from edge_client.speculation.fixed_pace import FixedPace
from edge_client.speculation.pace import DraftPace

# Gives the pace of a new session, from that of the session before.
MakePace = Callable[[Pace | None], Pace | None]


def make_pace(settings: EdgeSettings) -> MakePace:
    """Read `--speculate`."""
    if settings.speculate == "off":
        return lambda _before: None
    if settings.speculate == "auto":
        return lambda before: before.successor() if isinstance(before, DraftPace) else DraftPace()
    guesses = min(int(settings.speculate), MAX_GUESSES)
    return lambda _before: FixedPace(guesses)
