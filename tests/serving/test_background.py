"""Generators in the computing thread: in order, in quanta, beside whatever else that thread does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator

import pytest

from serving.background import Background
from serving.quanta import Quanta
from serving.threads import WorkThread


class Stage:
    """A background with its thread."""

    def __init__(self, quantum: float = 0.005, share: float = 0.5) -> None:
        self.thread = WorkThread("compute")
        self.idle = asyncio.Event()
        self.idle.set()
        self.background = Background(self.thread, self.idle, Quanta(quantum, share), time.monotonic)
        self.task = asyncio.create_task(self.background.run())

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.thread.stop()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    yield made
    await made.close()


def count(log: list[str], name: str, steps: int, seconds: float = 0.0) -> Generator[None, None, str]:
    for step in range(steps):
        log.append(f"{name}{step}")
        time.sleep(seconds)
        yield
    return name


async def test_works_run_in_order_and_give_what_they_return(stage: Stage) -> None:
    log: list[str] = []
    results = await asyncio.gather(*(stage.background.compute(count(log, name, 3)) for name in "ab"))
    assert results == ["a", "b"]
    assert log == ["a0", "a1", "a2", "b0", "b1", "b2"]


async def test_a_work_that_raises_fails_alone(stage: Stage) -> None:
    def broken() -> Generator[None, None, None]:
        yield
        raise ValueError("no")

    first = asyncio.create_task(stage.background.compute(broken()))
    second = asyncio.create_task(stage.background.compute(count([], "b", 2)))
    with pytest.raises(ValueError, match="no"):
        await first
    assert await second == "b"


async def test_a_cancelled_caller_stops_nothing(stage: Stage) -> None:
    log: list[str] = []
    first = asyncio.create_task(stage.background.compute(count(log, "a", 50, 0.001)))
    await asyncio.sleep(0.005)
    first.cancel()
    assert await stage.background.compute(count(log, "b", 1)) == "b"
    assert log[-2:] == ["a49", "b0"]


async def test_the_thread_is_free_between_quanta(stage: Stage) -> None:
    """Something else for the same thread waits for one quantum, not for the whole work."""
    log: list[str] = []
    long = asyncio.create_task(stage.background.compute(count(log, "a", 400, 0.001)))
    await asyncio.sleep(0.02)
    await stage.thread.run(log.append, "decode")
    assert not long.done()
    assert log[-1] == "decode"
    long.cancel()


async def test_while_inference_is_busy_it_waits_for_its_share() -> None:
    stage = Stage(quantum=0.002, share=0.001)
    try:
        log: list[str] = []
        stage.idle.clear()
        work = asyncio.create_task(stage.background.compute(count(log, "a", 10, 0.003)))
        # The first quantum is its due; two seconds of rest follow.
        await asyncio.sleep(0.1)
        assert log == ["a0"]
        stage.idle.set()
        assert await work == "a"
    finally:
        await stage.close()


async def test_a_generator_is_resumed_in_one_thread(stage: Stage) -> None:
    threads: set[int] = set()

    def work() -> Generator[None, None, None]:
        for _ in range(3):
            threads.add(threading.get_ident())
            time.sleep(0.006)
            yield

    await stage.background.compute(work())
    assert len(threads) == 1
    assert threading.get_ident() not in threads
