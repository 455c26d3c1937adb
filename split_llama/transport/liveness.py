"""Notices that a link is dead although nobody closed it. Pure logic: no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """What to do now."""

    WAIT = "look again later"
    PING = "send a ping: it is too quiet"
    DEAD = "give the link up"


@dataclass(slots=True)
class Liveness:
    """Looked at now and then, says whether a link still lives; all times are seconds of one clock.

    After `quiet` seconds without a sign of life it wants a ping, and `patience` seconds later, still without one, the
    link is dead. Signs of life are bytes that come, and bytes of ours that leave (`backlog` shrinks): on a slow line a
    ping waits behind all that was sent before it.
    """

    quiet: float
    patience: float
    now: float
    _heard: float = field(init=False)
    _pinged: float | None = None
    _backlog: int = 0

    def __post_init__(self) -> None:
        self._heard = self.now

    def heard(self, now: float) -> None:
        """Bytes came."""
        self._heard, self._pinged = now, None

    def look(self, now: float, backlog: int) -> Verdict:
        """Judge; `backlog` is how many bytes of ours still wait to leave. After `PING` a ping is taken to be sent."""
        if backlog < self._backlog:
            self.heard(now)
        self._backlog = backlog
        if self._pinged is not None:
            return Verdict.DEAD if now - self._pinged >= self.patience else Verdict.WAIT
        if now - self._heard < self.quiet:
            return Verdict.WAIT
        self._pinged = now
        return Verdict.PING

    @property
    def interval(self) -> float:
        """How often to look: often enough that nothing is noticed much later than promised."""
        return min(self.quiet, self.patience) / 4
