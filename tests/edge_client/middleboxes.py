"""What stands between an edge and its server in real networks: a proxy, and one that swallows WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

Exchange = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@asynccontextmanager
async def listening(exchange: Exchange) -> AsyncIterator[str]:
    """Run `exchange` for each connection; give the URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await exchange(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(
        lambda reader, writer: tasks.add(asyncio.create_task(handle(reader, writer))), "127.0.0.1", 0
    )
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until their end."""
    try:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()


async def relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, first: bytes, answer: bytes = b""
) -> None:
    """Join a client with `host:port`; `first` goes there at once, `answer` to the client."""
    far_reader, far_writer = await asyncio.open_connection(host, port)
    far_writer.write(first)
    writer.write(answer)
    try:
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
    finally:
        far_writer.close()


@asynccontextmanager
async def web_proxy(seen: list[str]) -> AsyncIterator[str]:
    """An HTTP proxy that knows CONNECT and whole URLs; `seen` gets the first line of each connection."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0].decode()
        seen.append(line)
        method, target, _ = line.split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            await relay(reader, writer, host, int(port), b"", ESTABLISHED)
        else:
            url = urlsplit(target)
            await relay(reader, writer, url.hostname or "", url.port or 80, head)

    async with listening(exchange) as url:
        yield url


@asynccontextmanager
async def websocket_swallower(behind: str, swallowed: list[str]) -> AsyncIterator[str]:
    """Passes everything on but what a WebSocket carries, after its handshake."""
    host, port = behind.removeprefix("http://").split(":")

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"upgrade: websocket" not in head.lower():
            await relay(reader, writer, host, int(port), head)
            return
        swallowed.append(head.split(b"\r\n", 1)[0].decode())
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        far_writer.write(head)
        writer.write(await far_reader.readuntil(b"\r\n\r\n"))
        try:
            await reader.read()
        finally:
            far_writer.close()

    async with listening(exchange) as url:
        yield url
