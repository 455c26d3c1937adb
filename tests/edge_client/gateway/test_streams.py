"""Callers who leave, who do not read, who wait too long or are too many; servers that are busy or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import openai
import pytest

from edge_client.gateway.streaming import DONE, EventStream, merge, sse
from split_llama.errors import LimitExceeded, OutOfPages, ServerFault, ServerUnreachable, Unauthenticated
from tests.conftest import TinyCheckpoint
from tests.edge_client.gateway.conftest import Gateway, StartGateway
from tests.edge_client.gateway.test_completions import read_metrics

LONG = {"prompt": "dabada kilo", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
SECONDS = 20.0


async def until(is_so: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    """Wait for something that comes about by itself; the bound is for a broken gateway."""
    deadline = time.monotonic() + seconds
    while True:
        found = is_so()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds} s"
        await asyncio.sleep(0.02)


async def used_pages(gateway: Gateway) -> int:
    return sum(session["pages"] for session in await gateway.sessions())


async def figures(gateway: Gateway) -> dict[str, float]:
    async with gateway.http() as http:
        return read_metrics(await http.get("/metrics"))


@contextlib.asynccontextmanager
async def streaming(gateway: Gateway, **body: Any) -> AsyncGenerator[AsyncIterator[str], None]:
    """Begin a long answer; give the lines of its stream, of which the first few are read."""
    async with (
        gateway.http() as http,
        http.stream("POST", "/v1/completions", json={**LONG, "stream": True, **body}) as reply,
    ):
        assert reply.status_code == 200
        lines = reply.aiter_lines()
        for _ in range(6):
            await anext(lines)
        yield lines


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"prompt": ["a", "b", "c"]}])
async def test_leaving_in_mid_stream_frees_all_pages(
    body: dict[str, Any], tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    async with start_gateway(folder, max_concurrent=4) as gateway:
        async with streaming(gateway, **body):
            assert await used_pages(gateway) > 0
        await until(lambda: gateway.service.places.running == 0, "free places")
        # A session of several choices leaves its prompt behind at most; an answer's own is gone.
        await until(lambda: _no_sessions(gateway), "no sessions")
        found = await figures(gateway)
        assert found['answers_total{ended="cancelled"}'] == max(body.get("n", 1), len(body.get("prompt", "x")))
        assert found["num_requests_running"] == 0


async def _no_sessions(gateway: Gateway) -> bool:
    return not await gateway.sessions()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_leaving_while_waiting_for_the_whole_answer(
    path: str, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    async with start_gateway(folder) as gateway, gateway.http() as http:
        messages = [{"role": "user", "content": "dabada"}]
        asking = asyncio.create_task(http.post(path, json={**LONG, "messages": messages}))
        await until(lambda: _are_sessions(gateway), "a session")
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await until(lambda: _no_sessions(gateway), "no sessions")
        assert gateway.service.places.running == 0


async def _are_sessions(gateway: Gateway) -> bool:
    return bool(await gateway.sessions())


async def test_leaving_from_the_line(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    async with start_gateway(folder, max_concurrent=1) as gateway, gateway.http() as http:
        async with streaming(gateway):
            waiting = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await until(lambda: gateway.service.places.waiting == 1, "a line")
            waiting.cancel()
            await until(lambda: gateway.service.places.waiting == 0, "no line")
        await until(lambda: gateway.service.places.running == 0, "free places")
        answered = await http.post("/v1/completions", json=LONG | {"max_tokens": 2})
        assert answered.status_code == 200


async def test_what_a_cancelled_turn_forked_from_stays(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    prompt = list(range(3, 60))
    async with start_gateway(folder) as gateway, gateway.http() as http:
        await http.post("/v1/completions", json=LONG | {"prompt": prompt, "max_tokens": 4})
        async with streaming(gateway, prompt=prompt):
            pass
        await until(lambda: gateway.service.places.running == 0, "free places")
        again = await http.post("/v1/completions", json=LONG | {"prompt": prompt, "max_tokens": 4})
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


async def test_too_many_are_told_to_come_again(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    folder = tiny_checkpoint(max_positions=4096)
    async with (
        start_gateway(folder, max_concurrent=1, max_queued=0) as gateway,
        gateway.http() as http,
        gateway.openai() as client,
    ):
        async with streaming(gateway):
            for stream in (False, True):
                refused = await http.post("/v1/completions", json=LONG | {"stream": stream})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model=gateway.model, prompt="x")
        await until(lambda: gateway.service.places.running == 0, "free places")
        assert (await http.post("/v1/completions", json=LONG | {"max_tokens": 2})).status_code == 200


async def test_many_prompts_are_one_request_in_the_line(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    async with start_gateway(tiny_checkpoint(), max_concurrent=2, max_queued=1) as gateway, gateway.http() as http:
        prompts = [[1, 3 + i, 4 + i] for i in range(30)]
        reply = await http.post("/v1/completions", json=LONG | {"prompt": prompts, "max_tokens": 3})
        assert reply.status_code == 200
        assert len(reply.json()["choices"]) == 30


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_ends_the_request(
    stream: bool, tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    folder = tiny_checkpoint(max_positions=8192, layers=8)
    async with start_gateway(folder, edge={"request_timeout": 0.5}) as gateway, gateway.http() as http:
        reply = await http.post("/v1/completions", json=LONG | {"stream": stream})
        if stream:
            assert reply.status_code == 200
            last = [line for line in reply.text.splitlines() if line][-2:]
            error = json.loads(last[0].removeprefix("data: "))["error"]
            assert last[1] == "data: [DONE]"
        else:
            assert reply.status_code == 504
            assert reply.headers["x-should-retry"] == "false"
            error = reply.json()["error"]
        assert error["code"] == "deadline_exceeded"
        assert "0.5 s" in error["message"]
        await until(lambda: _no_sessions(gateway), "no sessions")


@pytest.mark.parametrize(
    ("fault", "status", "code", "wait"),
    [
        (OutOfPages("no pages", retry_after_ms=1500), 503, "overloaded", "2"),
        (LimitExceeded("too many", retry_after_ms=10), 429, "rate_limit_exceeded", "1"),
        (ServerUnreachable("gone"), 503, "overloaded", "5"),
        (Unauthenticated("the edge's key is unknown"), 502, "upstream_error", None),
        (ServerFault("broken"), 502, "upstream_error", None),
    ],
)
async def test_the_servers_refusals_reach_the_caller(
    fault: Exception,
    status: int,
    code: str,
    wait: str | None,
    tiny_checkpoint: TinyCheckpoint,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with start_gateway(tiny_checkpoint()) as gateway, gateway.http() as http, gateway.openai() as client:

        @contextlib.asynccontextmanager
        async def refusing(*_: Any, **__: Any) -> AsyncGenerator[Any, None]:
            raise fault
            yield

        monkeypatch.setattr(gateway.service.edge.conversations, "session", refusing)
        for stream in (False, True):
            reply = await http.post("/v1/completions", json=LONG | {"stream": stream})
            assert reply.status_code == status
            assert reply.headers.get("retry-after") == wait
            assert reply.json()["error"]["code"] == code
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model=gateway.model, prompt="x", stream=True)
        assert caught.value.status_code == status


async def test_a_server_that_is_full(tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway) -> None:
    """A real one, with room for one session and no patience at the edge."""
    folder = tiny_checkpoint(max_positions=4096)
    async with start_gateway(
        folder, server={"max_sessions": 1}, edge={"reconnect_seconds": 0.0}, max_concurrent=4
    ) as gateway:
        async with streaming(gateway), gateway.http() as http:
            refused = await http.post("/v1/completions", json=LONG | {"prompt": "something else"})
            assert refused.status_code in (429, 503), refused.text
            assert int(refused.headers["retry-after"]) >= 1
        await until(lambda: _no_sessions(gateway), "no sessions")


class SlowReader:
    """An ASGI `send` that takes a few pieces and then nothing, and a caller who stays."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.taken: list[dict[str, Any]] = []

    async def send(self, message: Any) -> None:
        if len(self.taken) >= self.takes:
            await asyncio.Event().wait()
        self.taken.append(message)

    async def receive(self) -> Any:
        await asyncio.Event().wait()


async def _numbers(ended: list[str]) -> AsyncGenerator[bytes, None]:
    try:
        for number in range(1000):
            yield sse({"number": number})
            await asyncio.sleep(0)
    finally:
        ended.append("closed")


@pytest.mark.parametrize("takes", [0, 1, 5])
async def test_a_stream_that_nobody_reads_is_ended(takes: int) -> None:
    ended: list[str] = []
    reader = SlowReader(takes)
    await EventStream(_numbers(ended), 0.05)({"type": "http"}, reader.receive, reader.send)
    assert ended == ["closed"]
    assert len(reader.taken) == takes


async def test_a_fault_before_the_first_piece_is_a_refusal_and_later_an_event() -> None:
    async def failing(after: int) -> AsyncGenerator[bytes, None]:
        for number in range(after):
            yield sse(number)
        raise OutOfPages("no pages", retry_after_ms=10)

    reader = SlowReader(100)
    with pytest.raises(OutOfPages):
        await EventStream(failing(0), 1.0)({"type": "http"}, reader.receive, reader.send)
    assert reader.taken == []
    await EventStream(failing(2), 1.0)({"type": "http"}, reader.receive, reader.send)
    assert reader.taken[0]["status"] == 200
    assert b"no pages" in reader.taken[-1]["body"]
    assert reader.taken[-1]["body"].endswith(DONE)


async def test_a_reader_who_stops_reading_a_real_stream(
    tiny_checkpoint: TinyCheckpoint, start_gateway: StartGateway
) -> None:
    """Many alternatives per token fill all buffers on the way soon; the answer is ended, others go on."""
    folder = tiny_checkpoint(max_positions=8192)
    async with start_gateway(folder, reader_timeout=0.3) as gateway, gateway.http() as http:
        host, port = gateway.url.removeprefix("http://").split(":")
        # A small window at the reader's side, so that little fits on the way.
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
        body = json.dumps({**LONG, "stream": True, "logprobs": 20, "prompt": ["dabada"] * 4}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readline()
        await until(lambda: gateway.service.places.running > 0, "a running answer")
        await until(lambda: gateway.service.places.running == 0, "the end of it", seconds=120)
        assert (await figures(gateway))['answers_total{ended="cancelled"}'] == 4
        assert (await http.post("/v1/completions", json=LONG | {"max_tokens": 2})).status_code == 200
        writer.close()


async def test_merge_gives_all_and_ends_all() -> None:
    closed: list[int] = []

    def source(number: int, items: int, fault: bool = False) -> Callable[[], AsyncGenerator[str, None]]:
        async def run() -> AsyncGenerator[str, None]:
            try:
                for item in range(items):
                    await asyncio.sleep(0)
                    yield f"{number}.{item}"
                if fault:
                    raise ServerFault("broken")
            finally:
                closed.append(number)

        return run

    found = [pair async for pair in merge([source(number, 3) for number in range(5)], 2)]
    assert sorted(found) == [(n, f"{n}.{i}") for n in range(5) for i in range(3)]
    assert sorted(closed) == list(range(5))
    closed.clear()
    with pytest.raises(ServerFault):
        async for _ in merge([source(0, 1000), source(1, 2, fault=True)], 2):
            pass
    assert sorted(closed) == [0, 1]
    closed.clear()
    async with contextlib.aclosing(merge([source(0, 1000), source(1, 1000)], 2)) as items:
        await anext(items)
    assert sorted(closed) == [0, 1]
