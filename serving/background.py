"""Work beside inference, in the thread that computes: resumed for a quantum at a time, one work after the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from serving.memory import give_back, is_out_of_memory
from serving.quanta import Quanta
from serving.threads import WorkThread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Done:
    """What a finished work returned."""

    result: Any


@dataclass(frozen=True, slots=True)
class _Work:
    steps: Generator[None, None, Any]
    result: asyncio.Future[Any]


class Background:
    """A queue of generators. Decodes and prompts go first: see `Quanta`.

    `idle` is set while inference has nothing to do. `settle` waits for the device, so that a quantum has the length
    that it seems to have.
    """

    def __init__(
        self,
        thread: WorkThread,
        idle: asyncio.Event,
        quanta: Quanta,
        clock: Callable[[], float],
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.quanta = quanta
        self.seconds = 0.0
        self._thread = thread
        self._idle = idle
        self._clock = clock
        self._settle = settle
        self._queue: deque[_Work] = deque()
        self._queued = asyncio.Event()

    async def compute(self, work: Generator[None, None, T]) -> T:
        """Run a generator to its end; give what it returns, raise what it raises. A cancelled caller stops nothing."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Whoever asked may be gone: its failure is nobody's then.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._queue.append(_Work(work, future))
        self._queued.set()
        result: T = await asyncio.shield(future)
        return result

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                await self._queued.wait()
                await self._turn()
                await self._quantum(self._queue[0])
        finally:
            for work in self._queue:
                work.result.cancel()

    async def _turn(self) -> None:
        """Wait until a quantum may run."""
        while (wait := self.quanta.wait_seconds(self._clock(), busy=not self._idle.is_set())) > 0:
            if self._idle.is_set():
                await asyncio.sleep(wait)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._idle.wait()

    async def _quantum(self, work: _Work) -> None:
        length = self.quanta.length(self._clock())
        try:
            end, seconds = await self._thread.run(self._resume, work.steps, length)
        except Exception as error:
            if is_out_of_memory(error):
                give_back(error)
            self._finish(work, error=error)
            return
        now = self._clock()
        self.quanta.ran(now - seconds, now)
        self.seconds += seconds
        if end is not None:
            self._finish(work, result=end.result)

    def _finish(self, work: _Work, result: Any = None, error: BaseException | None = None) -> None:
        self._queue.popleft()
        if not self._queue:
            self._queued.clear()
        if work.result.done():
            return
        if error is not None:
            work.result.set_exception(error)
        else:
            work.result.set_result(result)

    def _resume(self, steps: Generator[None, None, Any], length: float) -> tuple[_Done | None, float]:
        """Go on with a work for `length` seconds, in the thread; give its end, if it came, and the seconds taken."""
        began = time.perf_counter()
        try:
            while True:
                next(steps)
                self._settle()
                if (taken := time.perf_counter() - began) >= length:
                    return None, taken
        except StopIteration as end:
            self._settle()
            return _Done(end.value), time.perf_counter() - began
