from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport.peers import http_answer, http_server, silent_server
from websockets.asyncio.server import ServerConnection, serve

from split_llama.errors import ServerUnreachable, UsageError
from split_llama.transport.backlog import backlog
from split_llama.transport.base import ChannelClosed
from split_llama.transport.http import HttpTransport
from split_llama.transport.liveness import Liveness, Verdict
from split_llama.transport.websocket import WebSocketTransport


def test_a_quiet_link_is_pinged_and_then_given_up() -> None:
    link = Liveness(quiet=10, patience=5, now=100)
    assert link.look(109, 0) is Verdict.WAIT
    assert link.look(110, 0) is Verdict.PING
    assert link.look(114, 0) is Verdict.WAIT, "pinged once"
    assert link.look(115, 0) is Verdict.DEAD


def test_any_byte_that_comes_is_life() -> None:
    link = Liveness(quiet=10, patience=5, now=0)
    assert link.look(10, 0) is Verdict.PING
    link.heard(14)
    assert link.look(23, 0) is Verdict.WAIT
    assert link.look(24, 0) is Verdict.PING


def test_bytes_that_leave_slowly_are_life_and_bytes_that_stay_are_not() -> None:
    slow = Liveness(quiet=10, patience=5, now=0)
    assert {slow.look(second, 10**6 - second) for second in range(1000)} == {Verdict.WAIT}
    stuck = Liveness(quiet=10, patience=5, now=0)
    assert stuck.look(10, 10**6) is Verdict.PING
    assert stuck.look(15, 10**6 + 6) is Verdict.DEAD


@given(st.lists(st.tuples(st.floats(0, 4), st.booleans()), max_size=60))
def test_only_silence_as_long_as_promised_kills(steps: list[tuple[float, bool]]) -> None:
    link, now, heard = Liveness(quiet=10, patience=5, now=0), 0.0, 0.0
    for pause, life in steps:
        now += pause
        if life:
            link.heard(now)
            heard = now
        verdict = link.look(now, 0)
        assert verdict is not Verdict.DEAD or now - heard >= 15
        if verdict is Verdict.DEAD:
            return
        # A look each `pause` of at most 4 seconds: ping by 14, death by 14 + 9.
        assert now - heard < 23


async def test_a_dead_websocket_ends_and_says_why() -> None:
    over = asyncio.Event()

    async def answer_no_ping(connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await over.wait()
        connection.transport.abort()

    async with serve(answer_no_ping, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        channel = await WebSocketTransport(f"http://127.0.0.1:{port}", quiet_seconds=0.1, pong_seconds=0.1).connect()
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
        assert isinstance(caught.value.error(), ServerUnreachable)
        assert "not even the answer to a ping" in caught.value.reason
        with pytest.raises(ChannelClosed):
            await channel.send(b"late")
        await channel.close()
        over.set()


async def test_a_server_that_thinks_long_but_answers_pings_is_waited_for() -> None:
    async def think(connection: ServerConnection) -> None:
        await asyncio.sleep(0.6)
        await connection.send(b"done")
        await connection.wait_closed()

    async with serve(think, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        channel = await WebSocketTransport(f"http://127.0.0.1:{port}", quiet_seconds=0.05, pong_seconds=10).connect()
        assert await channel.receive() == b"done"
        await channel.close()


async def test_a_poll_that_is_not_answered_ends_the_http_channel() -> None:
    model = http_answer("200 OK", "application/json", b"{}")

    async def respond(head: str, _: bytes) -> bytes:
        if head.startswith("POST"):
            await asyncio.sleep(600)
        return model

    async with http_server(respond) as url:
        channel = await HttpTransport(url, poll_seconds=0.01, poll_timeout=0.1).connect()
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
        assert isinstance(caught.value.error(), ServerUnreachable)
        await channel.close()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "gopher://127.0.0.1:9"])
async def test_a_proxy_that_cannot_be_used_is_a_mistake_of_usage(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    for transport in (WebSocketTransport("http://192.0.2.1:9"), HttpTransport("http://192.0.2.1:9")):
        with pytest.raises(UsageError, match="proxy of the environment"):
            await transport.connect()


async def test_the_backlog_counts_what_has_not_left() -> None:
    async with silent_server() as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        assert backlog(writer.transport) == 0  # type: ignore[arg-type]
        writer.write(bytes(32 * 2**20))
        waiting = backlog(writer.transport)  # type: ignore[arg-type]
        assert 2**20 < waiting <= 32 * 2**20
        writer.transport.abort()
        await asyncio.sleep(0)
        assert backlog(writer.transport) <= waiting  # type: ignore[arg-type]
        assert reader.at_eof()
