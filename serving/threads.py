"""A thread that works for an event loop, one thing after the other.

A round trip costs little more than half of what it does through `run_in_executor`, which makes two futures, a lock and
a condition each time; a pass makes two round trips or three.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_Job = tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]


class WorkThread:
    """Does what it is given in that order. The thread begins with the first job and ends after `stop`."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name)
        self._began = False
        self._stopped = False

    def run(self, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Queue a job; the future of the running loop gives its result or exception."""
        future = asyncio.get_running_loop().create_future()
        self._jobs.put((future, work, arguments))
        if not self._began:
            self._began = True
            self._thread.start()
        return future

    def stop(self) -> None:
        """End once the job that is under way is done; those behind it are dropped."""
        self._stopped = True
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopped:
            future, work, arguments = job
            error: BaseException | None = None
            result = None
            try:
                result = work(*arguments)
            except BaseException as raised:
                # Whatever it is, it belongs to whoever waits; the thread lives on.
                error = raised
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                return  # the loop was closed meanwhile: nobody waits any more


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
