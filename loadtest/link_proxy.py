"""A slow or broken link on loopback: a TCP proxy with delay, jitter and bandwidth, which can cut, refuse and stall.

    async with LinkProxy("127.0.0.1", 8700, Link(delay_ms=40, up_mbit=50, down_mbit=50)) as proxy:
        ...                      # connect to proxy.url instead of http://127.0.0.1:8700
        proxy.cut()              # all connections are reset
        print(proxy.counters)

Each direction is a wire that all connections share: bytes leave one after the other at the bandwidth and then take the
delay; the order is kept under jitter. A connection's first bytes wait for the round trip of TCP's handshake.
To measure with it, run it as a process (`split-loadtest proxy`): an event loop that also computes delivers late.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

from loadtest.link_pair import Direction, Pair, Side, make_socket
from loadtest.link_wire import Gate, Lane, Wire
from split_llama.errors import UsageError

# Hears what the sender sent, as it was read: number of the connection, direction, bytes.
Tap = Callable[[int, Direction, bytes], None]
BYTES_PER_MBIT = 1e6 / 8


@dataclass(frozen=True, slots=True)
class Link:
    """What the link is like: `delay_ms` one way, `jitter_ms` more or less, Mbit/s each way (`None`: unbounded)."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    up_mbit: float | None = None
    down_mbit: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.delay_ms < math.inf or not 0 <= self.jitter_ms <= self.delay_ms:
            raise UsageError(
                "a link needs a delay of 0 ms or more, and jitter that is no larger, so that nothing arrives before "
                f"it was sent; got delay {self.delay_ms} ms, jitter {self.jitter_ms} ms"
            )
        for rate in (self.up_mbit, self.down_mbit):
            if rate is not None and not 0 < rate < math.inf:
                raise UsageError(f"a link needs a bandwidth above 0 Mbit/s, or none at all; got {rate}")

    def wire(self, direction: Direction) -> Wire:
        """Make one direction's clock."""
        rate = self.up_mbit if direction == "up" else self.down_mbit
        seed = 2 * self.seed + (direction == "down")
        per_second = None if rate is None else rate * BYTES_PER_MBIT
        return Wire(per_second, self.delay_ms / 1000, self.jitter_ms / 1000, seed)


@dataclass(frozen=True, slots=True)
class Counters:
    """What went through so far; bytes as they were read from the sender."""

    connections: int = 0
    refused: int = 0
    cuts: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class LinkProxy:
    """Listens on loopback and forwards to one target over an emulated link. Use as `async with LinkProxy(...)`."""

    def __init__(
        self, target_host: str, target_port: int, link: Link | None = None, *, port: int = 0, tap: Tap | None = None
    ) -> None:
        self.link = link or Link()
        self.counters = Counters()
        self._target = (target_host, target_port)
        self._port = port
        self._tap = tap
        self._wires: dict[Direction, Wire] = {"up": self.link.wire("up"), "down": self.link.wire("down")}
        self._gate = Gate()
        self._refused_until = 0.0
        self._pairs: set[Pair] = set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """Port that is listened on."""
        return self._port

    @property
    def url(self) -> str:
        """Address to use instead of the target's, for plain http."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def live(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    async def __aenter__(self) -> LinkProxy:
        listener = make_socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self._port))
        except OSError as error:
            listener.close()
            raise UsageError(f"the proxy cannot listen on port {self._port}: {error.strerror or error}") from error
        self._port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Side(self._accept()), sock=listener)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = [pair.joining for pair in self._pairs if pair.joining is not None]
        self._reset_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
        await asyncio.sleep(0)  # closed transports let go of their sockets one turn later

    def cut(self) -> int:
        """Reset all connections at once; give their number. New ones are welcome."""
        self.counters = replace(self.counters, cuts=self.counters.cuts + 1)
        return self._reset_all()

    def refuse(self, seconds: float) -> None:
        """Reset connections that are made within the next `seconds`, as soon as they are made."""
        self._refused_until = asyncio.get_running_loop().time() + seconds

    def stall(self, seconds: float) -> None:
        """Let nothing arrive for `seconds`, on any connection; nothing is lost and nothing is closed."""
        self._gate.shut_until = asyncio.get_running_loop().time() + seconds

    def freeze(self) -> int:
        """Let nothing arrive any more on the connections of now, and tell nobody; give their number. New ones work.

        So dies a link whose entry in a router was lost.
        """
        for pair in self._pairs:
            pair.freeze()
        return len(self._pairs)

    def _reset_all(self) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            pair.reset()
        return len(pairs)

    def _accept(self) -> Pair:
        return Pair(self)

    # The pairs' side of the proxy follows.

    def admit(self, pair: Pair) -> int | None:
        """Take a new connection, and give its number; `None` while they are refused."""
        if asyncio.get_running_loop().time() < self._refused_until:
            self.counters = replace(self.counters, refused=self.counters.refused + 1)
            return None
        self.counters = replace(self.counters, connections=self.counters.connections + 1)
        self._pairs.add(pair)
        return self.counters.connections

    def forget(self, pair: Pair) -> None:
        """Both ends of a connection are gone."""
        self._pairs.discard(pair)

    def lane(self, direction: Direction, source: asyncio.Transport, sink: asyncio.Transport) -> Lane:
        """Make one direction of a connection."""
        return Lane(self._wires[direction], self._gate, source, sink)

    def saw(self, number: int, direction: Direction, data: bytes) -> None:
        """Count what was read, and let the tap hear it."""
        if direction == "up":
            self.counters = replace(self.counters, bytes_up=self.counters.bytes_up + len(data))
        else:
            self.counters = replace(self.counters, bytes_down=self.counters.bytes_down + len(data))
        if self._tap is not None:
            self._tap(number, direction, data)

    async def reach(self, pair: Pair) -> asyncio.Transport:
        """Connect to the target, no sooner than a handshake over this link would. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        opens = loop.time() + 2 * self.link.delay_ms / 1000
        family = socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET
        connection = make_socket(family)
        try:
            await loop.sock_connect(connection, self._target)
            await asyncio.sleep(opens - loop.time())
        except BaseException:
            connection.close()
            raise
        transport, _ = await loop.create_connection(lambda: Side(pair), sock=connection)
        return transport
