"""How long work in the background may run at a time, and when. Pure; times are monotonic seconds.

A decode that comes while a quantum runs waits for its end. So next to chats a quantum is no longer than a token takes
by itself, whoever has it: a token then comes at most about twice as late as without work in the background. And next to
chats, or while passes are waiting, such work gets its `share` of the time and no more. When nobody generates it runs on
and on.
"""

from __future__ import annotations

LEAST_QUANTUM = 0.001
# A chat goes on as long as its next token is no later than this many times what a token takes, or so many seconds.
PATIENCE = 4.0
LEAST_PATIENCE = 0.1
# How much the newest token counts in what a token takes.
NEWEST = 0.1


class Quanta:
    """Decides over quanta. `decoded` for each token answered, `ran` for each quantum."""

    def __init__(self, quantum: float, share: float) -> None:
        assert quantum > 0, "a quantum has some length"
        assert 0 < share <= 1, "a share is above 0 and at most 1"
        self._quantum = quantum
        self._rest = (1 - share) / share
        self._ready_at = float("-inf")
        self._decoded_at = float("-inf")
        self._token = quantum

    def decoded(self, now: float, alone: float) -> None:
        """Take in that a token was answered which would have taken `alone` seconds without background work."""
        if self._is_quiet(now):
            self._token = max(0.0, alone)
        else:
            self._token += NEWEST * (max(0.0, alone) - self._token)
        self._decoded_at = now

    def ran(self, begin: float, end: float) -> None:
        """Take in that a quantum ran."""
        self._ready_at = end + (end - begin) * self._rest

    def length(self, now: float) -> float:
        """Give the seconds that a quantum may take now."""
        if self._is_quiet(now):
            return self._quantum
        return min(self._quantum, max(LEAST_QUANTUM, self._token))

    def wait_seconds(self, now: float, *, busy: bool) -> float:
        """Give the seconds until the next quantum may begin; `busy` says that inference has work right now."""
        if not busy and self._is_quiet(now):
            return 0.0
        return max(0.0, self._ready_at - now)

    def _is_quiet(self, now: float) -> bool:
        return now - self._decoded_at > max(LEAST_PATIENCE, PATIENCE * self._token)
