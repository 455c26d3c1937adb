from __future__ import annotations

import asyncio

import pytest
from transport.peers import FAILURES, PORTAL, closed_port, http_answer, http_server, raw_server

from split_llama import errors
from split_llama.errors import NotAServer, ServerUnreachable, Unauthenticated
from split_llama.transport.base import ChannelClosed
from split_llama.transport.http import HttpTransport

MODEL = http_answer("200 OK", "application/json", b"{}")


def frames(body: bytes) -> bytes:
    return http_answer("200 OK", "application/octet-stream", body)


class Echo:
    """Echoes bodies, notes what came; an empty body is answered with what `waiting` holds."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.waiting = b""
        self.arrived = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def respond(self, head: str, body: bytes) -> bytes:
        self.heads.append(head)
        if head.startswith("GET"):
            return MODEL
        self.bodies.append(body)
        self.arrived.set()
        await self.gate.wait()
        return frames(body or self.waiting)


async def test_messages_go_there_and_back_in_order_under_one_connection() -> None:
    echo = Echo()
    async with http_server(echo.respond) as url:
        channel = await HttpTransport(f"{url}/team", api_key="fl-1").connect()
        for number in range(20):
            await channel.send(b"%02d" % number)
        received = b""
        while len(received) < 40:
            received += await channel.receive()
        await channel.close()
    assert received == b"".join(b"%02d" % number for number in range(20))
    names = {line for head in echo.heads for line in head.splitlines() if line.lower().startswith("x-fl-connection")}
    assert len(names) == 1
    assert all("authorization: bearer fl-1" in head.lower() for head in echo.heads)
    assert all(head.split()[1] in ("/team/v1/model", "/team/v1/frames") for head in echo.heads)


async def test_what_is_sent_during_a_request_goes_together_in_the_next() -> None:
    echo = Echo()
    echo.gate.clear()
    async with http_server(echo.respond) as url:
        channel = await HttpTransport(url, max_body_bytes=5).connect()
        await channel.send(b"a")
        await echo.arrived.wait()
        for message in (b"bb", b"cc", b"dd"):
            await channel.send(message)
        echo.gate.set()
        assert [await channel.receive() for _ in range(3)] == [b"a", b"bbcc", b"dd"]
        await channel.close()


async def test_an_idle_channel_fetches_what_the_server_has() -> None:
    echo = Echo()
    echo.waiting = b"moved"
    async with http_server(echo.respond) as url:
        channel = await HttpTransport(url, poll_seconds=0.01).connect()
        assert await channel.receive() == b"moved"
        await channel.close()
    assert echo.bodies[0] == b""


async def test_while_answers_are_to_come_the_channel_asks_again_at_once() -> None:
    """It would idle for ever otherwise. An own message goes first."""
    bodies: list[bytes] = []

    async def respond(head: str, body: bytes) -> bytes:
        if head.startswith("GET"):
            return MODEL
        bodies.append(body)
        if len(bodies) == 4:
            return frames(b"three")
        status, words = ("200 OK", b"one") if len(bodies) == 1 else ("204 No Content", b"")
        return http_answer(f"{status}\r\nX-FL-Pending: 1", "application/octet-stream", words)

    async with http_server(respond) as url:
        channel = await HttpTransport(url, poll_seconds=3600).connect()
        await channel.send(b"a")
        assert await channel.receive() == b"one"
        await channel.send(b"b")
        assert await channel.receive() == b"three"
        await channel.close()
    assert bodies == [b"a", b"b", b"", b""]


async def test_closing_sends_what_is_queued_and_ends_both_directions() -> None:
    echo = Echo()
    async with http_server(echo.respond) as url:
        channel = await HttpTransport(url).connect()
        await channel.send(b"bye")
        await channel.close()
        assert echo.bodies == [b"bye"]
        assert await channel.receive() == b"bye"
        with pytest.raises(ChannelClosed):
            await channel.receive()
        with pytest.raises(ChannelClosed):
            await channel.send(b"late")


async def test_closing_does_not_wait_for_a_hanging_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_llama.transport.http.CLOSE_SECONDS", 0.01)
    echo = Echo()
    echo.gate.clear()
    async with http_server(echo.respond) as url:
        channel = await HttpTransport(url).connect()
        await channel.send(b"a")
        await echo.arrived.wait()
        await channel.close()
        echo.gate.set()
        with pytest.raises(ChannelClosed):
            await channel.receive()


@pytest.mark.parametrize(("answer", "expected", "words"), FAILURES)
async def test_what_is_no_server_is_told_apart(answer: bytes, expected: str, words: str) -> None:
    async with raw_server(answer) as url:
        with pytest.raises(getattr(errors, expected), match=words) as caught:
            await HttpTransport(url).connect()
    assert caught.value.retry_after_ms == (3000 if expected == "Draining" else 0)


async def test_a_closed_port_says_what_to_check() -> None:
    with pytest.raises(ServerUnreachable, match="nothing listens there"):
        await HttpTransport(closed_port()).connect()


async def test_a_name_that_does_not_resolve_says_so(unknown_host: str) -> None:
    with pytest.raises(ServerUnreachable, match="cannot be resolved"):
        await HttpTransport(unknown_host).connect()


async def test_tls_to_a_plain_server_names_the_reason() -> None:
    async with raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        with pytest.raises(ServerUnreachable, match="TLS failed"):
            await HttpTransport(url.replace("http", "https")).connect()


@pytest.mark.parametrize(
    ("answer", "cls"),
    [
        (PORTAL, NotAServer),
        (http_answer("401 Unauthorized", "text/plain", b""), Unauthenticated),
        (b"", ServerUnreachable),
    ],
)
async def test_a_failure_in_mid_session_closes_the_channel_with_its_error(
    answer: bytes, cls: type[errors.FlLlamaError]
) -> None:
    async def respond(head: str, body: bytes) -> bytes:
        return MODEL if head.startswith("GET") else answer

    async with http_server(respond) as url:
        channel = await HttpTransport(url).connect()
        await channel.send(b"a")
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
        assert type(caught.value.error()) is cls
        with pytest.raises(ChannelClosed):
            await channel.send(b"b")
        await channel.close()
