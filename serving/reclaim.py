"""Which session gives its pages up when they run out."""

from __future__ import annotations

from collections.abc import Iterable

from serving.registry import Entry
from serving.session import Phase


def idle_since(entries: Iterable[Entry], horizon: float) -> list[Entry]:
    """List the sessions that hold pages and were last active before `horizon`, the one idle longest first."""
    idle = [
        entry
        for entry in entries
        if entry.active_at <= horizon
        and entry.session.phase is Phase.ACTIVE
        and entry.session.sequence.block_table
        and not (entry.session.queued or entry.session.running)
    ]
    return sorted(idle, key=lambda entry: entry.active_at)


def swapped_first(entries: Iterable[Entry]) -> list[Entry]:
    """List the sessions in host memory that may be lost: those nobody waits for first, then the one longest there."""

    def place(entry: Entry) -> tuple[bool, int]:
        # Tickets ascend with time.
        return bool(entry.session.queued), entry.session.sequence.ticket or 0

    return sorted(
        (entry for entry in entries if entry.session.sequence.ticket is not None and not entry.session.running),
        key=place,
    )
