"""Who may compute now and who waits: a fixed number of places, given out in the order of asking."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from split_llama.errors import LimitExceeded

RETRY_MS = 2000


class Places:
    """`places` answers run at once, and at most `queue` takers wait for theirs."""

    def __init__(self, places: int, queue: int, *, doing: str = "answers are being made") -> None:
        self._doing = doing
        self._places = places
        self._free = places
        self._queue = queue
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def running(self) -> int:
        """Places taken now."""
        return self._places - self._free

    @property
    def waiting(self) -> int:
        """Takers in the line."""
        return len(self._line)

    def check(self) -> None:
        """Raise `LimitExceeded` when a newcomer would find the line full."""
        if (self._line or self._free == 0) and len(self._line) >= self._queue:
            raise LimitExceeded(
                f"{self.running} {self._doing} and {self.waiting} requests wait; try again soon",
                retry_after_ms=RETRY_MS,
            )

    @contextlib.asynccontextmanager
    async def take(self, count: int = 1) -> AsyncIterator[None]:
        """Hold `count` places for the block; waits for them."""
        assert count <= self._places, "nobody can have more places than there are"
        await self.acquire(count)
        try:
            yield
        finally:
            self.release(count)

    async def acquire(self, count: int = 1) -> None:
        """Wait for `count` places, which stay taken until `release`."""
        if not self._line and self._free >= count:
            self._free -= count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, turn)
        self._line.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._line.remove(entry)
                self._grant()
            else:
                # The places came at the very moment of the cancellation.
                self.release(count)
            raise

    def release(self, count: int = 1) -> None:
        """Give places back, to those in the line first."""
        self._free += count
        self._grant()

    def _grant(self) -> None:
        while self._line and self._line[0][0] <= self._free:
            count, turn = self._line.popleft()
            if not turn.cancelled():
                self._free -= count
                turn.set_result(None)
