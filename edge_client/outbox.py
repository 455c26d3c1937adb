"""Frames of many sessions on their way into one connection: short ones first, and every session in its turn. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from split_llama.wire.frame import Frame, Kind

Owner = TypeVar("Owner", bound=Hashable)


class Outbox(Generic[Owner]):
    """Keeps the order of each session's frames. A message has at most `limit` bytes, or one frame that is larger.

    What is in a message cannot be overtaken, so a small limit lets a new token pass a long prompt on a slow line.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Who was served last stands last.
        self._waiting: dict[Owner, deque[Frame]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, owner: Owner, frames: Iterable[Frame]) -> None:
        """Append frames of a session. Once it is closed, steps that still wait need not go."""
        for frame in frames:
            queue = self._waiting.setdefault(owner, deque())
            if frame.kind is Kind.CLOSE:
                kept = [waiting for waiting in queue if waiting.kind is not Kind.STEP]
                queue.clear()
                queue.extend(kept)
            queue.append(frame)

    def take(self) -> list[Frame]:
        """Give the next message's frames: one of each session, the shortest first, and again while there is room."""
        taken: list[Frame] = []
        size = 0
        while self._waiting:
            # Whoever waits for the answer to one row goes before a prompt's chunks; control frames have no rows.
            for owner in sorted(self._waiting, key=lambda owner: self._waiting[owner][0].count):
                queue = self._waiting[owner]
                if taken and size + queue[0].size > self._limit:
                    return taken
                frame = queue.popleft()
                del self._waiting[owner]
                if queue:
                    self._waiting[owner] = queue
                taken.append(frame)
                size += frame.size
        return taken
