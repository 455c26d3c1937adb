"""What the doctor asks a server: who it is, over which transports, and which weights it offers."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ssl as ssl_module
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from edge_client.connector import say_hello
from edge_client.rest import ModelCard
from edge_client.settings import EdgeSettings
from edge_client.state_files import StateFolder
from split_llama.config import Partition
from split_llama.errors import NotAServer, ServerUnreachable
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.base import ChannelClosed, Transport
from split_llama.wire.control import HelloReply
from split_llama.wire.frame import VERSION

if TYPE_CHECKING:
    from edge_client.weights import Offer

WEB_SECONDS = 10.0


class Web:
    """Plain requests to the server, redirects not followed. Close it in the end."""

    def __init__(self, address: ServerAddress, api_key: str | None, trust: ssl_module.SSLContext) -> None:
        self._base = address.base
        with failures.proxy_errors(address.base):
            self._client = httpx.Client(
                headers={"User-Agent": "fl-llama", **authorization(api_key)},
                verify=trust,
                timeout=WEB_SECONDS,
            )

    def close(self) -> None:
        """Close what is open."""
        self._client.close()

    def version(self) -> tuple[dict[str, Any], str | None]:
        """Ask for `/version`; gives the answer and the `Date` header. Raises `NotAServer`, `ServerUnreachable`."""
        response = self._get("/version")
        kind, retry_after = response.headers.get("content-type", ""), response.headers.get("retry-after", "")
        refusal = failures.refused(self._base, response.status_code, kind, response.content, retry_after)
        if response.status_code != 200:
            raise refusal
        with contextlib.suppress(ValueError):
            answer = response.json()
            if isinstance(answer, dict) and isinstance(answer.get("protocol"), int):
                return answer, response.headers.get("date")
        raise refusal

    def round_trips(self, count: int) -> list[float]:
        """Time `count` small requests over one connection, in milliseconds. Raises `ServerUnreachable`."""
        self._get("/healthz")
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            self._get("/healthz")
            times.append((time.perf_counter() - begin) * 1000)
        return times

    def _get(self, path: str) -> httpx.Response:
        try:
            return self._client.get(self._base + path)
        except httpx.RemoteProtocolError as error:
            raise failures.not_http(self._base) from error
        except httpx.TransportError as error:
            raise failures.unreachable(self._base, error) from error


def greet(transport: Transport, patience: float) -> HelloReply:
    """Say HELLO over a connection of its own. Raises `ServerUnreachable`, `NotAServer` or what the server refused."""

    async def say() -> HelloReply:
        channel = await transport.connect()
        try:
            async with asyncio.timeout(patience):
                return await say_hello(channel)
        except TimeoutError:
            raise ServerUnreachable("it opens, but nothing comes through: something on the way swallows it") from None
        except ChannelClosed as closed:
            raise closed.error() from closed
        finally:
            await channel.close()

    return asyncio.run(say())


def check_protocol(answer: dict[str, Any]) -> None:
    """Raise `NotAServer` when the server speaks another version of the protocol."""
    if answer["protocol"] != VERSION:
        raise NotAServer(
            f"the server speaks version {answer['protocol']} of the protocol, this edge version {VERSION}: "
            "update the older one"
        )


def partition_of(settings: EdgeSettings, card: ModelCard) -> Partition:
    """Read `--partition`; `auto` stands for the fewest blocks that may be kept."""
    if settings.partition == "auto":
        return Partition(max(1, card.blocks.start), card.num_hidden_layers - card.blocks.stop)
    return Partition.parse(settings.partition)


class PeekingState(StateFolder):
    """The state folder, to look at: nothing is pinned by looking."""

    @contextlib.contextmanager
    def edit_pins(self) -> Iterator[dict[str, Any]]:
        """Give a copy of the pins; changes are forgotten."""
        with super().edit_pins() as pins:
            yield copy.deepcopy(pins)


def still_to_fetch(offer: Offer, caches: Path) -> int:
    """Count the bytes of the slice that are not in the cache yet."""
    name = offer.identity[:32]
    if (caches / "slices" / name / "complete").is_file():
        return 0
    total = sum(file.size for file in offer.manifest.files)
    with contextlib.suppress(OSError):
        present = sum(file.stat().st_size for file in (caches / "partial" / name).iterdir() if file.is_file())
        return max(1, total - present)
    return total


def weights_in_memory(offer: Offer, stored: str, settings: EdgeSettings) -> int:
    """Estimate the bytes of the edge's weights once loaded."""
    from split_llama.checkpoint import WEIGHTS_FILE

    bits = {"float32": 32, "bfloat16": 16, "float16": 16}
    kept = bits.get(settings.dtype, 32)
    if settings.quantization != "none":
        kept = 8
    total = sum(file.size for file in offer.manifest.files if file.name == WEIGHTS_FILE)
    return total * kept // bits.get(stored, 16)
