"""A job's own time: it stands still while the job is paused, so that nobody's time runs out meanwhile."""

from __future__ import annotations

from collections.abc import Callable


class JobClock:
    """Seconds since the job was made or loaded, pauses left out, on top of `clock`."""

    def __init__(self, clock: Callable[[], float], spent: float = 0.0) -> None:
        self._clock = clock
        self._begin = clock() - spent
        self._stopped: float | None = None

    def now(self) -> float:
        """Give the job's time."""
        return (self._clock() if self._stopped is None else self._stopped) - self._begin

    def stop(self) -> None:
        """Stand still."""
        self._stopped = self._clock() if self._stopped is None else self._stopped

    def go(self) -> None:
        """Go on."""
        if self._stopped is not None:
            self._begin += self._clock() - self._stopped
            self._stopped = None
