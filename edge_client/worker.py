"""The one thread that computes at the edge: it joins what all sessions want done into passes over `EdgeModel`."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from edge_client.edge_model import EdgeModel
from edge_client.work import Fed, Work, WorkResult
from split_llama.errors import FlLlamaError

MAX_PASS_ROWS = 1024

log = logging.getLogger("fl_llama.edge")

T = TypeVar("T")

_Job = tuple[Work, "asyncio.Future[Fed]"]


class EdgeWorker:
    """Runs passes while there is work. Submit from one event loop; results come back to it."""

    def __init__(self, model: EdgeModel) -> None:
        self._model = model
        self._jobs: deque[_Job] = deque()
        self._calls: deque[Callable[[], Any]] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self.fault: FlLlamaError | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="edge-worker", daemon=True)
        self._thread.start()

    async def do(self, work: Work) -> Fed:
        """Do one piece of work; raises what went wrong with it."""
        future: asyncio.Future[Fed] = self._loop.create_future()
        with self._wake:
            self._check()
            self._jobs.append((work, future))
            self._wake.notify()
        return await future

    def call(self, function: Callable[[], Any]) -> None:
        """Run a short function in the worker's thread, before the next pass."""
        with self._wake:
            self._calls.append(function)
            self._wake.notify()

    async def ask(self, function: Callable[[], T]) -> T:
        """Do the same with a function whose result, or exception, is wanted."""
        self._check()
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                self._loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                self._loop.call_soon_threadsafe(_settle, future, result, None)

        self.call(run)
        return await future

    async def close(self) -> None:
        """Finish what was submitted and end the thread."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault
        assert not self._stopped, "the worker is closed"

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            # Whoever waits, and whoever comes, has to hear of it.
            log.exception("the edge's worker has ended")
            with self._wake:
                self.fault = FlLlamaError(f"the edge's worker has ended: {error!r}; start again")
                jobs, self._jobs = list(self._jobs), deque()
            self._deliver([future for _, future in jobs], [self.fault] * len(jobs))

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._calls or self._stopped):
                    self._wake.wait()
                if self._stopped and not self._jobs and not self._calls:
                    return
                calls = list(self._calls)
                self._calls.clear()
                batch = self._take_batch()
            for call in calls:
                try:
                    call()
                except Exception:
                    log.exception("a call in the edge's worker failed")
            if batch:
                self._run_batch(batch)

    def _take_batch(self) -> list[_Job]:
        """Take jobs in order, each session once on either side, up to the row limit; the others wait."""
        batch: list[_Job] = []
        waiting: deque[_Job] = deque()
        busy: set[tuple[int, str]] = set()
        rows = 0
        for job in self._jobs:
            work, future = job
            if future.cancelled():
                # Its session may be freed already; nobody waits for it.
                continue
            sides = {(id(work.session), side) for side in _sides(work)}
            size = len(work.tokens) + sum(reply.count for reply in work.replies)
            if sides & busy or (batch and rows + size > MAX_PASS_ROWS):
                waiting.append(job)
            else:
                batch.append(job)
                rows += size
            busy |= sides
        self._jobs = waiting
        return batch

    def _run_batch(self, batch: list[_Job]) -> None:
        results: list[WorkResult]
        try:
            results = self._model.run([work for work, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        except BaseException:
            self._jobs.extendleft(reversed(batch))
            raise
        self._deliver([future for _, future in batch], results)

    def _deliver(self, futures: list[asyncio.Future[Fed]], results: Sequence[WorkResult]) -> None:
        self._loop.call_soon_threadsafe(_deliver, futures, results)


def _sides(work: Work) -> tuple[str, ...]:
    feeds = work.decide is not None or bool(work.tokens)
    return ("c",) * bool(work.replies) + ("a",) * feeds


def _deliver(futures: list[asyncio.Future[Fed]], results: Sequence[WorkResult]) -> None:
    for future, result in zip(futures, results, strict=True):
        if isinstance(result, Exception):
            _settle(future, None, result)
        else:
            _settle(future, result, None)


def _settle(future: asyncio.Future[T], result: T | None, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # type: ignore[arg-type]
