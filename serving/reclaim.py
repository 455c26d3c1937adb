"""Which session gives its pages up when they run out."""

from __future__ import annotations

from collections.abc import Iterable

from serving.registry import Entry
from serving.session import Phase


def idle_longest(entries: Iterable[Entry], horizon: float) -> Entry | None:
    """Give the session that holds pages and was last active before `horizon`, the one idle longest; none if none is."""
    idle = [
        entry
        for entry in entries
        if entry.active_at <= horizon
        and entry.session.phase is Phase.ACTIVE
        and entry.session.sequence.length
        and not (entry.session.queued or entry.session.running)
    ]
    return min(idle, key=lambda entry: entry.active_at, default=None)
