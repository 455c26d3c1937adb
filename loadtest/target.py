"""The server under test, seen from outside: a first HELLO, and its metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

from edge_client.connector import CLIENT_NAME
from edge_client.settings import EdgeSettings
from split_llama.errors import NotAServer, ServerUnreachable
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.base import Channel, ChannelClosed, Transport
from split_llama.transport.http import HttpTransport
from split_llama.transport.trust import tls_context
from split_llama.transport.websocket import WebSocketTransport
from split_llama.wire.control import Hello, HelloReply, error_from_frame
from split_llama.wire.frame import VERSION, Frame, Kind, split_message

HELLO_SECONDS = 15.0
METRICS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the server said, and the bytes that every connection costs for HELLO, up and down."""

    reply: HelloReply
    bytes_up: int
    bytes_down: int


async def greet(settings: EdgeSettings) -> Greeting:
    """Say HELLO over a connection of our own, as an edge does. Raises `ServerUnreachable`, `NotAServer` ..."""
    channel = await _connect(settings)
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            hello = Frame(Kind.HELLO, payload=Hello(protocol=VERSION, client=CLIENT_NAME).to_bytes()).encode()
            await channel.send(hello)
            answer = await channel.receive()
        frame = next(split_message(answer), None)
        if frame is not None and frame.kind is Kind.ERROR:
            raise error_from_frame(frame)
        if frame is None or frame.kind is not Kind.HELLO:
            raise NotAServer(f"{settings.server_url()} did not answer HELLO with HELLO")
        return Greeting(HelloReply.from_bytes(frame.payload), len(hello), frame.size)
    except TimeoutError:
        raise ServerUnreachable(f"the server did not answer HELLO in {HELLO_SECONDS:.0f} seconds") from None
    except ChannelClosed as closed:
        raise closed.error() from closed
    finally:
        await channel.close()


async def _connect(settings: EdgeSettings) -> Channel:
    url, key, tls = settings.server_url(), settings.api_key, tls_context(settings.ca_certs)
    transports: dict[str, Transport] = {
        "ws": WebSocketTransport(url, key, ssl=tls),
        "http": HttpTransport(url, key, ssl=tls),
    }
    if settings.transport != "auto":
        return await transports[settings.transport].connect()
    try:
        return await transports["ws"].connect()
    except (NotAServer, ServerUnreachable):
        return await transports["http"].connect()


async def scrape(settings: EdgeSettings) -> str:
    """Read the server's `/metrics`. Raises `ServerUnreachable`, `NotAServer`."""
    address = ServerAddress.parse(settings.server_url())
    try:
        async with httpx.AsyncClient(
            headers=authorization(settings.api_key),
            timeout=METRICS_SECONDS,
            verify=tls_context(settings.ca_certs),
        ) as client:
            response = await client.get(f"{address.base}/metrics")
    except httpx.HTTPError as error:
        raise failures.unreachable(address.base, error) from error
    if response.status_code != 200:
        raise NotAServer(f"{address.base}/metrics answered with status {response.status_code} instead of metrics")
    return response.text
