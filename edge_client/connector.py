"""Makes the next connection: over the addresses in turn, WebSocket first, and only to the model that is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from edge_client.addresses import Addresses
from edge_client.settings import EdgeSettings
from split_llama.errors import Draining, FlLlamaError, ModelMismatch, NotAServer, RemoteError, ServerUnreachable
from split_llama.transport.address import ServerAddress
from split_llama.transport.base import Channel, ChannelClosed, Transport
from split_llama.transport.http import HttpTransport
from split_llama.transport.trust import tls_context
from split_llama.transport.websocket import WebSocketTransport
from split_llama.wire.control import Hello, HelloReply, error_from_frame
from split_llama.wire.frame import VERSION, Frame, Kind, split_message

HELLO_SECONDS = 15.0
# While another transport is left to try: some proxies let a WebSocket open and then swallow what it carries.
SHORT_HELLO_SECONDS = 5.0
# A lost server is asked so often over the transport that worked before; then the others may have their chance. Sooner,
# a server that is just starting would be met by the second one.
LOYAL_ROUNDS = 8
CLIENT_NAME = "fl-llama edge-client"

MakeTransports = Callable[[ServerAddress], Sequence[Transport]]


class Connector:
    """Gives channels that have said HELLO. `transports` makes those of one server, the preferred one first."""

    def __init__(self, addresses: Addresses, transports: MakeTransports) -> None:
        self.addresses = addresses
        self._transports = transports
        self._hello: HelloReply | None = None
        self._orders: dict[ServerAddress, list[Transport]] = {}
        self._proven: set[ServerAddress] = set()
        self._failures = 0

    @classmethod
    def of(cls, settings: EdgeSettings) -> Connector:
        """Make what the settings ask for. Raises `UsageError`."""
        context, key = tls_context(settings.ca_certs), settings.api_key
        addresses = Addresses((settings.server_url(), *settings.fallback_server))

        def transports(address: ServerAddress) -> list[Transport]:
            every: dict[str, Transport] = {
                "ws": WebSocketTransport(address.base, key, ssl=context),
                "http": HttpTransport(address.base, key, ssl=context),
            }
            return list(every.values()) if settings.transport == "auto" else [every[settings.transport]]

        return cls(addresses, transports)

    @property
    def hello(self) -> HelloReply:
        """What the server said about itself."""
        assert self._hello is not None, "nothing was connected yet"
        return self._hello

    async def connect(self) -> Channel:
        """Ask every server once, the current one first. Raises the first failure, of those that may pass if any may."""
        failures: list[FlLlamaError] = []
        for address in self.addresses.round():
            try:
                channel = await self._reach(address)
            except FlLlamaError as failure:
                failures.append(failure)
                continue
            self.addresses.use(address)
            self._failures = 0
            return channel
        self._failures += 1
        raise next((failure for failure in failures if may_pass(failure)), failures[0])

    async def _reach(self, address: ServerAddress) -> Channel:
        """Try the transports in turn; WebSocket may be blocked on the way, and the next one says what is there."""
        if self._failures == LOYAL_ROUNDS:
            self._proven.discard(address)
            self._orders.pop(address, None)
        order = self._orders.setdefault(address, list(self._transports(address)))
        for transport in list(order):
            patience = HELLO_SECONDS if transport == order[-1] else SHORT_HELLO_SECONDS
            try:
                channel = await self._greet(transport, patience)
            except TimeoutError:
                failure: FlLlamaError = ServerUnreachable(f"the server did not answer HELLO in {patience:.0f} seconds")
            except ServerUnreachable as error:
                if address in self._proven and transport == order[0]:
                    raise
                failure = error
            except NotAServer as error:
                failure = error
            else:
                order.remove(transport)
                order.insert(0, transport)
                self._proven.add(address)
                return channel
        raise failure

    async def _greet(self, transport: Transport, patience: float) -> Channel:
        """Connect and say HELLO; raises `TimeoutError` when nothing comes back."""
        channel = await transport.connect()
        try:
            async with asyncio.timeout(patience):
                hello = await say_hello(channel)
            if self._hello is not None and self._hello.geometry != hello.geometry:
                raise ModelMismatch("the server came back with another model; start again to use it")
        except ChannelClosed as closed:
            await channel.close()
            raise closed.error() from closed
        except BaseException:
            await channel.close()
            raise
        self._hello = hello
        return channel


def may_pass(failure: FlLlamaError) -> bool:
    """Say whether it is worth asking again later."""
    return isinstance(failure, (RemoteError, Draining))


async def say_hello(channel: Channel) -> HelloReply:
    """Say HELLO and give the answer. Raises `NotAServer`, what the server refused with, `ChannelClosed`."""
    hello = Frame(Kind.HELLO, payload=Hello(protocol=VERSION, client=CLIENT_NAME).to_bytes())
    await channel.send(hello.encode())
    frame = next(split_message(await channel.receive()), None)
    if frame is not None and frame.kind is Kind.ERROR:
        raise error_from_frame(frame)
    if frame is None or frame.kind is not Kind.HELLO:
        raise NotAServer("the server did not answer HELLO with HELLO")
    return HelloReply.from_bytes(frame.payload)
