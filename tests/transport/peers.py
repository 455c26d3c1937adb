"""Tiny real servers on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

Respond = Callable[[str, bytes], Awaitable[bytes]]
Exchange = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def tcp_server(exchange: Exchange) -> AsyncIterator[str]:
    """Run `exchange(reader, writer)` for each connection; yields the URL, and ends what still runs on the way out."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return
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
        await asyncio.sleep(0)  # closed transports let go of their sockets one turn later


def raw_server(answer: bytes) -> AbstractAsyncContextManager[str]:
    """Answer whatever comes with fixed bytes, then close."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(answer)
        await writer.drain()

    return tcp_server(exchange)


def http_server(respond: Respond) -> AbstractAsyncContextManager[str]:
    """Serve one HTTP/1.1 exchange per connection: `respond(head, body)` gives the whole answer."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        sizes = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
        writer.write(await respond(head, await reader.readexactly(int(sizes[0]) if sizes else 0)))
        await writer.drain()

    return tcp_server(exchange)


def silent_server() -> AbstractAsyncContextManager[str]:
    """Accept and never answer."""

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    return tcp_server(exchange)


def http_answer(status: str, content_type: str, body: bytes, *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join((*lines, "Connection: close", "", "")).encode() + body


def closed_port() -> str:
    """Give a URL where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


PORTAL = http_answer("200 OK", "text/html; charset=utf-8", b"<html>Please log in to Hotel Wi-Fi</html>")
REDIRECT = http_answer("302 Found", "text/html", b"", "Location: http://portal.example/login")
DRAINING = http_answer(
    "503 Service Unavailable",
    "application/json",
    b'{"error": {"code": 63, "type": "Draining", "message": "the server is going down"}}',
    "Retry-After: 3",
)
FAILURES: list[tuple[bytes, str, str]] = [
    (PORTAL, "NotAServer", "captive portal"),
    (REDIRECT, "NotAServer", "302"),
    (http_answer("404 Not Found", "application/json", b'{"detail": "Not Found"}'), "NotAServer", "404"),
    (http_answer("401 Unauthorized", "text/plain", b"no"), "Unauthenticated", "--api-key"),
    (http_answer("403 Forbidden", "text/plain", b"no"), "Unauthenticated", "--api-key"),
    (http_answer("502 Bad Gateway", "text/html", b"<html>"), "ServerUnreachable", "proxy in between answered 502"),
    (DRAINING, "Draining", "the server is going down"),
    (b"", "ServerUnreachable", "connection failed"),
]
