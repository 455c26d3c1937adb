"""Blocking work of requests: few threads, a bounded line, and nobody who leaves gets another thread started."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edge_client.gateway.blocking import Blocking
from split_llama.errors import LimitExceeded, UsageError
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import StartGateway


class Work:
    """Counts its threads, which wait until they may end."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.go_on = threading.Event()
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.go_on.wait(20)
        with self._lock:
            self.running -= 1
        return "done"

    async def has_begun(self, count: int) -> None:
        async with asyncio.timeout(20):
            while self.running < count:  # noqa: ASYNC110 - it is counted in other threads
                await asyncio.sleep(0.01)


async def test_no_more_threads_than_allowed_and_a_line_with_an_end() -> None:
    blocking, work = Blocking(queue=3, threads=2), Work()
    asked = [asyncio.create_task(blocking.run(work)) for _ in range(5)]
    await work.has_begun(2)
    with pytest.raises(LimitExceeded, match="2 prompts are being read and 3 requests wait"):
        await blocking.run(work)
    work.go_on.set()
    assert await asyncio.gather(*asked) == ["done"] * 5
    assert work.most == 2


async def test_a_thread_whose_caller_left_still_counts() -> None:
    blocking, work = Blocking(queue=3, threads=1), Work()
    left = asyncio.create_task(blocking.run(work))
    await work.has_begun(1)
    in_line = asyncio.create_task(blocking.run(work))
    await asyncio.sleep(0)
    for task in (left, in_line):
        task.cancel()
    await asyncio.gather(left, in_line, return_exceptions=True)
    next_one = asyncio.create_task(blocking.run(work))
    await asyncio.sleep(0.05)
    assert work.running == 1
    work.go_on.set()
    assert await next_one == "done"
    assert work.most == 1


async def test_faults_reach_the_caller_and_free_the_thread() -> None:
    blocking = Blocking(queue=0, threads=1)

    def fail() -> None:
        raise UsageError("no")

    for _ in range(3):
        with pytest.raises(UsageError, match="no"):
            await blocking.run(fail)


async def test_a_full_gateway_reads_no_prompt(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        start_gateway(tiny_checkpoint(), max_concurrent=1, max_queued=0) as gateway,
        gateway.http() as http,
    ):
        read: list[object] = []
        make_ids = gateway.service.prompts.ids

        def ids(*arguments: object) -> list[int]:
            read.append(arguments)
            return make_ids(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(gateway.service.prompts, "ids", ids)
        body = {"messages": [{"role": "user", "content": "dabada"}], "max_tokens": 1}
        async with gateway.service.places.take():
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 429
            assert read == []
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        assert len(read) == 1
