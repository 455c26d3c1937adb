"""Templates, tokenizers and grammars take a request a while: in threads, few at once, with a line of bounded length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from edge_client.gateway.places import Places
from edge_client.threads import in_thread

THREADS = 4

T = TypeVar("T")


class Blocking:
    """Runs blocking work for requests; `queue` of them may wait for a thread."""

    def __init__(self, queue: int, threads: int = THREADS) -> None:
        self._places = Places(threads, queue, doing="prompts are being read")

    async def run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, as soon as one is free. Raises `LimitExceeded`, and what `work` raises."""
        self._places.check()
        await self._places.acquire()
        running = asyncio.ensure_future(in_thread(work))
        running.add_done_callback(self._end)
        # No thread can be stopped: one whose caller has left still counts until it is done.
        return await asyncio.shield(running)

    def _end(self, done: asyncio.Future[T]) -> None:
        self._places.release()
        if not done.cancelled():
            # Retrieved, for a caller who has left.
            done.exception()
