"""The REST side of a server as the edge needs it: its model's card, the manifest of a slice, and the slice's files."""

from __future__ import annotations

import contextlib
import ssl as ssl_module
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from edge_client.addresses import Addresses
from edge_client.settings import EdgeSettings
from split_llama.config import BlockRange, Partition
from split_llama.errors import CheckpointError, FlLlamaError, NotAServer, ServerUnreachable, UsageError
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.trust import tls_context

MAX_JSON_BYTES = 16 * 2**20
MAX_ADAPTER_BYTES = 2**30

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """An adapter that the server holds, and the blocks that it has weights for."""

    name: str
    blocks: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: Any) -> AdapterCard:
        """Read an entry. Raises as `ModelCard.from_json`."""
        blocks = tuple(raw["blocks"])
        if not all(type(block) is int and block >= 0 for block in blocks):
            raise ValueError("an adapter's blocks must be whole numbers")
        return cls(str(raw["name"]), blocks)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `/v1/model` says about the model served, as far as the edge uses it."""

    id: str
    geometry: str
    blocks: BlockRange
    num_hidden_layers: int
    hidden_size: int
    max_model_len: int
    dtype: str
    adapters: tuple[AdapterCard, ...] = ()

    @classmethod
    def from_json(cls, raw: Any) -> ModelCard:
        """Read the card. Raises `ValueError`, `TypeError` or `KeyError` when it is none."""
        start, stop = raw["blocks"]
        numbers = (start, stop, raw["num_hidden_layers"], raw["hidden_size"], raw["max_model_len"])
        if not all(type(number) is int and number >= 0 for number in numbers) or not start < stop <= numbers[2]:
            raise ValueError("blocks and sizes must be whole numbers in order")
        return cls(
            id=str(raw["id"]),
            geometry=str(raw["geometry"]),
            blocks=BlockRange(start, stop),
            num_hidden_layers=numbers[2],
            hidden_size=numbers[3],
            max_model_len=numbers[4],
            dtype=str(raw.get("dtype", "float32")),
            adapters=tuple(AdapterCard.from_json(entry) for entry in raw.get("adapters", ())),
        )

    def find_adapter(self, name: str) -> AdapterCard:
        """Look an adapter up. Raises `UsageError` that names those there are."""
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        known = ", ".join(adapter.name for adapter in self.adapters) or "none"
        raise UsageError(f"the server has no adapter {name!r}; it has {known}")

    def check_partition(self, partition: Partition) -> BlockRange:
        """Give the blocks the server has to run for `partition`. Raises `UsageError` when it does not host them."""
        count = self.num_hidden_layers
        if partition.p + partition.q >= count:
            raise UsageError(
                f"--partition {partition}: the model has {count} blocks, so p + q must be less than {count}"
            )
        wanted = BlockRange(partition.p, count - partition.q)
        if not self.blocks.contains(wanted):
            lowest = f"{self.blocks.start},{count - self.blocks.stop}"
            raise UsageError(
                f"--partition {partition} needs blocks {wanted} on the server, which hosts {self.blocks}; "
                f"p and q must be at least {lowest}"
            )
        return wanted


class RestClient:
    """Blocking HTTP client of a server; call it from worker threads. Redirects are not followed.

    A server that says when to come back (it is still loading, or busy) is asked again for `retry_seconds`. Where none
    answers at `url`, those of `fallbacks` are asked in turn, and `address` is the one that did.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        fallbacks: Sequence[str] = (),
        ssl: ssl_module.SSLContext | None = None,
        timeout: float = 30.0,
        retry_seconds: float = 0.0,
    ) -> None:
        self._addresses = Addresses((url, *fallbacks))
        self._retry_seconds = retry_seconds
        with failures.proxy_errors(self.address.base):
            self._client = httpx.Client(
                headers={"User-Agent": "fl-llama", **authorization(api_key)},
                verify=ssl if ssl is not None else True,
                timeout=httpx.Timeout(timeout, connect=10.0),
            )

    @classmethod
    def of(cls, settings: EdgeSettings) -> RestClient:
        """Make the client that the settings ask for. Raises `UsageError`."""
        return cls(
            settings.server_url(),
            settings.api_key,
            fallbacks=settings.fallback_server,
            ssl=tls_context(settings.ca_certs),
            retry_seconds=settings.reconnect_seconds,
        )

    @property
    def address(self) -> ServerAddress:
        """The server that is asked now."""
        return self._addresses.current

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def model_card(self) -> ModelCard:
        """Ask what the server serves. Raises `ServerUnreachable`, `NotAServer`, `Unauthenticated`."""
        raw = self._json("/v1/model")
        try:
            return ModelCard.from_json(raw)
        except (ValueError, TypeError, KeyError, FlLlamaError) as error:
            raise NotAServer(
                f"{self.address.base}: the answer describes no model of a split-server ({error!r})"
            ) from error

    def slice_manifest(self, partition: Partition) -> Any:
        """Ask for the manifest of the edge's slice, as parsed JSON. Raises what `model_card` raises."""
        return self._json("/v1/model/edge", {"p": str(partition.p), "q": str(partition.q)})

    @contextlib.contextmanager
    def slice_file(self, partition: Partition, name: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open a slice's file from byte `start` on: gives where the stream really begins, and its pieces.

        A server or proxy that ignores ranges begins at 0. Raises what `model_card` raises, also while streaming.
        """
        parameters = {"p": str(partition.p), "q": str(partition.q)}
        # Compressed bytes would make offsets meaningless.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        path = f"{self.address.base}/v1/model/edge/files/{name}"
        with self._translated(), self._client.stream("GET", path, params=parameters, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise self._refusal(response, response.read())
            if "html" in response.headers.get("content-type", ""):
                raise failures.refused(self.address.base, response.status_code, "text/html", b"")
            begin = start if response.status_code == 206 else 0
            # Pieces as they come: a chunk size would lose what a breaking connection had brought.
            yield begin, response.iter_raw()

    def adapter_part(self, name: str, partition: Partition) -> bytes:
        """Fetch A's and C's part of an adapter, a safetensors file. Raises what `model_card` raises."""
        parameters = {"p": str(partition.p), "q": str(partition.q)}
        return self._ask(f"/v1/adapters/{quote(name, safe='')}/edge", parameters, self._adapter)

    def _json(self, path: str, parameters: dict[str, str] | None = None) -> Any:
        return self._ask(path, parameters, self._parsed)

    def _ask(self, path: str, parameters: dict[str, str] | None, read: Callable[[httpx.Response], T]) -> T:
        deadline = time.monotonic() + self._retry_seconds
        while True:
            try:
                return self._ask_somewhere(path, parameters, read)
            except FlLlamaError as error:
                delay = error.retry_after_ms / 1000
                if not delay or time.monotonic() + delay > deadline:
                    raise
                time.sleep(delay)

    def _ask_somewhere(self, path: str, parameters: dict[str, str] | None, read: Callable[[httpx.Response], T]) -> T:
        """Ask the current server, and the others where it is not there."""
        failures: list[FlLlamaError] = []
        order = self._addresses.round()
        for address in order:
            self._addresses.use(address)
            try:
                return self._ask_once(path, parameters, read)
            except ServerUnreachable as error:
                failures.append(error)
        self._addresses.use(order[0])
        raise failures[0]

    def _ask_once(self, path: str, parameters: dict[str, str] | None, read: Callable[[httpx.Response], T]) -> T:
        with self._translated():
            response = self._client.get(f"{self.address.base}{path}", params=parameters)
        if response.status_code != 200:
            raise self._refusal(response, response.content)
        return read(response)

    def _adapter(self, response: httpx.Response) -> bytes:
        if len(response.content) > MAX_ADAPTER_BYTES or "html" in response.headers.get("content-type", ""):
            raise self._refusal(response, b"")
        return response.content

    def _parsed(self, response: httpx.Response) -> Any:
        if len(response.content) > MAX_JSON_BYTES:
            raise self._refusal(response, response.content)
        try:
            return response.json()
        except ValueError:
            raise self._refusal(response, b"") from None

    def _refusal(self, response: httpx.Response, body: bytes) -> FlLlamaError:
        headers = response.headers
        kind, retry_after = headers.get("content-type", ""), headers.get("retry-after", "")
        return failures.refused(self.address.base, response.status_code, kind, body, retry_after)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.RemoteProtocolError as error:
            if "illegal" in str(error).lower() or "status line" in str(error).lower():
                raise failures.not_http(self.address.base) from error
            raise failures.unreachable(self.address.base, error) from error
        except httpx.DecodingError as error:
            raise CheckpointError(f"{self.address.base}: the answer cannot be decoded: {error}") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise failures.unreachable(self.address.base, error) from error
