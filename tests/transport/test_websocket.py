from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from transport.peers import FAILURES, closed_port, raw_server, silent_server
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import Frame as SocketFrame
from websockets.frames import Opcode

from split_llama import errors
from split_llama.errors import BadFrame, NotAServer, ServerUnreachable, SlowReader
from split_llama.transport.base import ChannelClosed
from split_llama.transport.websocket import WebSocketTransport
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.step import build_step


@asynccontextmanager
async def server(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0, compression=None) as running:
        yield f"http://127.0.0.1:{next(iter(running.sockets)).getsockname()[1]}"


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_messages_go_there_and_back_in_order() -> None:
    async with server(echo) as url:
        channel = await WebSocketTransport(url).connect()
        messages = [bytes([number]) * number * 1000 for number in range(20)]
        for message in messages:
            await channel.send(message)
        assert [await channel.receive() for _ in messages] == messages
        await channel.close()
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
        assert caught.value.code == 1000
        with pytest.raises(ChannelClosed):
            await channel.send(b"late")
        await channel.close()


async def test_the_stream_lies_below_the_root_path_with_the_key_and_without_compression() -> None:
    seen: list[tuple[str, str, str | None]] = []

    async def handler(connection: ServerConnection) -> None:
        request = connection.request
        assert request is not None
        headers = request.headers
        seen.append((request.path, headers["Authorization"], headers.get("Sec-WebSocket-Extensions")))

    async with server(handler) as url:
        channel = await WebSocketTransport(f"{url}/team", api_key="fl-1").connect()
        await channel.close()
    assert seen == [("/team/v1/stream", "Bearer fl-1", None)]
    assert "fl-1" not in repr(WebSocketTransport(url, api_key="fl-1"))


@pytest.mark.parametrize("cls", [BadFrame, SlowReader])
async def test_a_close_code_leads_back_to_its_error(cls: type[errors.ConnectionRefused]) -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.close(cls.close_code or 0, "that was it")

    async with server(handler) as url:
        channel = await WebSocketTransport(url).connect()
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
    assert type(caught.value.error()) is cls
    assert caught.value.reason == "that was it"


async def test_a_link_that_breaks_is_an_unreachable_server() -> None:
    async def handler(connection: ServerConnection) -> None:
        connection.transport.abort()

    async with server(handler) as url:
        channel = await WebSocketTransport(url).connect()
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
    assert caught.value.code == 1006
    assert isinstance(caught.value.error(), ServerUnreachable)


async def test_a_message_over_the_limit_ends_the_connection_by_name() -> None:
    async with server(echo) as url:
        channel = await WebSocketTransport(url, max_message_bytes=100).connect()
        await channel.send(bytes(101))
        with pytest.raises(ChannelClosed) as caught:
            await channel.receive()
    assert isinstance(caught.value.error(), errors.FrameTooLarge)


@pytest.mark.parametrize(("answer", "expected", "words"), FAILURES)
async def test_what_is_no_server_is_told_apart(answer: bytes, expected: str, words: str) -> None:
    async with raw_server(answer) as url:
        with pytest.raises(getattr(errors, expected), match=words) as caught:
            await WebSocketTransport(url).connect()
    assert caught.value.retry_after_ms == (3000 if expected == "Draining" else 0)


async def test_a_peer_that_speaks_no_http_is_no_server() -> None:
    async with raw_server(b"220 mail.example ESMTP\r\n") as url:
        with pytest.raises(NotAServer, match="does not speak HTTP"):
            await WebSocketTransport(url).connect()


async def test_a_closed_port_says_what_to_check() -> None:
    url = closed_port()
    with pytest.raises(ServerUnreachable, match=f"{url}: nothing listens there; is split-server running"):
        await WebSocketTransport(url).connect()


async def test_a_name_that_does_not_resolve_says_so(unknown_host: str) -> None:
    with pytest.raises(ServerUnreachable, match="cannot be resolved"):
        await WebSocketTransport(unknown_host).connect()


async def test_a_silent_peer_times_out() -> None:
    async with silent_server() as url:
        with pytest.raises(ServerUnreachable, match="no answer in time"):
            await WebSocketTransport(url, open_timeout=0.05).connect()


async def test_tls_to_a_plain_server_names_the_reason() -> None:
    async with raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        with pytest.raises(ServerUnreachable, match="TLS failed"):
            await WebSocketTransport(url.replace("http", "https"), ssl=ssl.create_default_context()).connect()


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("width", [64, 2048, 4096, 8192])
def test_a_one_token_step_has_at_most_48_bytes_more_than_its_row(codec: Codec, width: int) -> None:
    row = bytes(row_bytes(codec, width))
    message = build_step(handle=1, seq=1, first=0, count=1, codec=codec, rows=row).encode()
    for from_client in (True, False):
        on_the_wire = SocketFrame(Opcode.BINARY, message).serialize(mask=from_client)
        assert len(on_the_wire) - len(row) <= (40 if from_client else 36) + 6 * (len(message) >= 65536)
        assert len(on_the_wire) - len(row) <= 48
