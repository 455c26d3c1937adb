"""When to make the next pass ready while another one runs. Pure; the clock is given.

Too early, and the steps that come while the pass runs find the next one closed already: batches get smaller, though a
small pass takes a device about as long as a large one. Too late, and the device waits for the host. So the next pass is
picked when the running one is expected to have as much time left as the host needs, a margin included. A guess that
was wrong costs little: a pass that ends early wakes the loop anyway.
"""

from __future__ import annotations

# Timers of an event loop are a millisecond late.
MARGIN_SECONDS = 0.002
SMOOTHING = 0.2


class Pace:
    """Expects a pass to take as long as the last one, and the host as long as it took on average."""

    def __init__(self) -> None:
        self._model_seconds = 0.0
        self._host_seconds = 0.0
        self._busy_until = 0.0

    def started(self, picked: float, now: float) -> None:
        """Take in that a pass that was picked at `picked` was started."""
        self._host_seconds += SMOOTHING * (now - picked - self._host_seconds)
        self._busy_until = max(self._busy_until, now) + self._model_seconds

    def finished(self, model_seconds: float, now: float, unfinished: int) -> None:
        """Take in how long the model took for a pass, with so many passes still unfinished."""
        self._model_seconds = model_seconds
        self._busy_until = now + unfinished * model_seconds

    def wait_seconds(self, now: float) -> float:
        """Give how long to wait before the next pass is picked."""
        return max(0.0, self._busy_until - now - 2 * self._host_seconds - MARGIN_SECONDS)
