"""Links that break in mid-answer, through real processes: the same text, each token once, the same bytes sent again."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from edge_client import connector
from edge_client.model_source import ModelSource
from edge_client.runtime import EdgeRuntime, prepare
from edge_client.settings import EdgeSettings
from loadtest.link_proxy import Link, LinkProxy
from split_llama.transport.websocket import WebSocketTransport
from split_llama.wire.control import Moved
from split_llama.wire.frame import Frame, Kind, encode_message, split_message
from tests.edge_client.conftest import MakeSettings, ServeModel, ServerProcess
from tests.edge_client.sent_rows import SentRows

PROMPT = [1, 5, 9, 70, 33]
COUNT = 200
WIDTH = 32

MakeServer = Callable[..., ServerProcess]
OnToken = Callable[[int], Awaitable[None]]


async def nothing(_: int) -> None:
    """Let the answer come undisturbed."""


async def answer(
    settings: EdgeSettings, on_token: OnToken = nothing, *, source: ModelSource | None = None
) -> tuple[list[int], str]:
    """Make one answer; `on_token` is called with each token's number as it comes."""
    async with EdgeRuntime.connect(settings, source=source) as edge:
        turn = edge.turn(PROMPT, edge.params(max_new_tokens=COUNT, ignore_eos=True))
        tokens, text = [], ""
        async with edge.open() as session:
            async for event in session.generate(PROMPT, turn):
                tokens.append(event.token)
                text += event.text
                await on_token(len(tokens))
    assert tokens == turn.tokens, "the stream has each token once"
    assert len(tokens) == COUNT
    return tokens, text


@asynccontextmanager
async def watched(target: ServerProcess | str, sent: SentRows, link: Link | None = None) -> AsyncIterator[LinkProxy]:
    port = target.port if isinstance(target, ServerProcess) else int(target.rpartition(":")[2])
    async with LinkProxy("127.0.0.1", port, link, tap=sent.tap) as proxy:
        yield proxy


def test_the_rows_sent_are_what_the_proxy_hears() -> None:
    """The witness of the other tests: it must notice a row that differs."""
    sent = SentRows(WIDTH)
    sent.rows["a", 0] += [b"x", b"x"]
    sent.rows["a", 1] += [b"y"]
    assert (sent.sent_again, sent.differing()) == (1, [])
    sent.rows["a", 1] += [b"z"]
    assert (sent.sent_again, sent.differing()) == (2, [("a", 1)])


@pytest.mark.parametrize("speculate", ["off", "auto"])
async def test_a_connection_cut_twenty_times_in_one_answer(
    speculate: str, tiny_checkpoint: Any, server_process: MakeServer, edge_settings: MakeSettings
) -> None:
    server = server_process(tiny_checkpoint(), "--threads", "1")
    await asyncio.to_thread(server.start)
    expected = await answer(edge_settings(server.url, speculate="off"))
    sent, chance = SentRows(WIDTH), random.Random(3)
    loop = asyncio.get_running_loop()
    async with watched(server, sent, Link(delay_ms=2)) as proxy:

        async def cut_now_and_then(number: int) -> None:
            if number % 10 == 5:
                # Somewhere in the round trip: before the step leaves, under way, or with the reply.
                loop.call_later(chance.uniform(0, 0.006), proxy.cut)

        settings = edge_settings(proxy.url, speculate=speculate, noise="0.05", clip="1e6")
        undisturbed = await answer(settings) if speculate == "off" else None
        noisy = await answer(settings, cut_now_and_then)
        assert proxy.counters.cuts == 20
        assert proxy.counters.connections > 20
        if undisturbed is not None:
            assert noisy == undisturbed
        assert await answer(edge_settings(proxy.url, speculate=speculate), cut_now_and_then) == expected
    if speculate == "off":
        assert sent.sent_again > 0
        assert sent.differing() == []


async def test_a_server_killed_and_restarted_in_mid_answer(
    tiny_checkpoint: Any, server_process: MakeServer, edge_settings: MakeSettings
) -> None:
    server = server_process(tiny_checkpoint(), "--threads", "1")
    await asyncio.to_thread(server.start)
    sent = SentRows(WIDTH)
    async with watched(server, sent) as proxy:
        settings = edge_settings(proxy.url, speculate="off", noise="0.05", clip="1e6")
        expected = await answer(settings)
        sent.rows.clear()

        async def kill(number: int) -> None:
            if number == 60:
                await asyncio.to_thread(server.kill)
                server.start(wait=False)

        assert await answer(settings, kill) == expected
    assert sent.sent_again >= 60, "the new process had nothing"
    assert sent.differing() == []


async def test_a_server_lost_for_good_is_replaced_by_its_fallback(
    tiny_checkpoint: Any, server_process: MakeServer, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    first, second = server_process(folder, "--threads", "1"), server_process(folder, "--threads", "1")
    await asyncio.gather(asyncio.to_thread(first.start), asyncio.to_thread(second.start))
    sent = SentRows(WIDTH)
    later = SentRows(WIDTH, sent.rows)
    async with watched(first, sent) as one, watched(second, later) as other:
        settings = edge_settings(
            one.url, fallback_server=(other.url,), speculate="off", noise="0.05", clip="1e6", reconnect_seconds=20.0
        )
        expected = await answer(settings)
        sent.rows.clear()

        async def kill(number: int) -> None:
            if number == 60:
                await asyncio.to_thread(first.kill)

        assert await answer(settings, kill) == expected
        assert sent.sent_again >= 60
        assert sent.differing() == []
        assert await answer(settings) == expected, "at the start, too, the one that is there will do"


async def test_a_server_that_is_stopped_sends_us_to_its_successor(
    tiny_checkpoint: Any, server_process: MakeServer, edge_settings: MakeSettings
) -> None:
    folder = tiny_checkpoint()
    second = server_process(folder, "--threads", "1")
    sent = SentRows(WIDTH)
    later = SentRows(WIDTH, sent.rows)
    async with watched(second, later) as other:
        first = server_process(folder, "--threads", "1", "--successor", other.url)
        await asyncio.gather(asyncio.to_thread(first.start), asyncio.to_thread(second.start))
        async with watched(first, sent) as one:
            settings = edge_settings(one.url, speculate="off", noise="0.05", clip="1e6")
            expected = await answer(settings)
            sent.rows.clear()

            async def stop(number: int) -> None:
                if number == 60:
                    first.stop()

            assert await answer(settings, stop) == expected
            assert other.counters.connections == 1
    assert sent.sent_again >= 60
    assert sent.differing() == []


class Mover:
    """Stands before a server and passes everything on, up to the `limit`-th step: then it says that it has moved."""

    def __init__(self, behind: str, limit: int, address: str) -> None:
        self._behind = behind
        self._left = limit
        self._address = address

    async def __call__(self, edge: ServerConnection) -> None:
        server = await WebSocketTransport(self._behind).connect()

        async def back() -> None:
            while True:
                await edge.send(await server.receive())

        backward = asyncio.create_task(back())
        try:
            async for message in edge:
                assert isinstance(message, bytes)
                await self._pass_on(edge, server, list(split_message(message)))
        finally:
            backward.cancel()
            await asyncio.gather(backward, return_exceptions=True)
            await server.close()

    async def _pass_on(self, edge: ServerConnection, server: Any, frames: list[Frame]) -> None:
        for frame in frames:
            self._left -= frame.kind is Kind.STEP
            if self._left < 0:
                moved = Frame(Kind.MOVED, handle=frame.handle, payload=Moved(address=self._address).to_bytes())
                await edge.send(moved.encode())
            else:
                await server.send(encode_message([frame]))


async def test_a_server_that_moved_is_followed(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    folder: Path = tiny_checkpoint()
    async with serve_model(folder) as old, serve_model(folder) as new:
        given: dict[str, Any] = {"speculate": "off", "noise": "0.05", "clip": "1e6"}
        settings = edge_settings(old, **given)
        source = await asyncio.to_thread(prepare, settings)
        expected = await answer(settings, source=source)
        sent = SentRows(WIDTH)
        later = SentRows(WIDTH, sent.rows)
        async with watched(new, later) as target, serve(Mover(old, 60, target.url), "127.0.0.1", 0) as mover:
            port = next(iter(mover.sockets)).getsockname()[1]
            async with watched(f"http://127.0.0.1:{port}", sent) as front:
                assert await answer(edge_settings(front.url, **given), source=source) == expected
                assert front.counters.connections == 1, "nobody went back"
                assert target.counters.connections == 1
    assert sent.sent_again >= 60
    assert sent.differing() == []


async def test_a_link_that_dies_silently_is_noticed(
    tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = functools.partial(WebSocketTransport, quiet_seconds=0.5, pong_seconds=0.5)
    monkeypatch.setattr(connector, "WebSocketTransport", impatient)
    async with serve_model(tiny_checkpoint()) as url:
        expected = await answer(edge_settings(url))
        async with watched(url, SentRows(WIDTH)) as proxy:

            async def freeze(number: int) -> None:
                if number in (20, 120):
                    assert proxy.freeze() >= 1

            assert await answer(edge_settings(proxy.url), freeze) == expected
