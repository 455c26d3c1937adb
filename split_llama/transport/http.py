"""The same frames by HTTP POST, where WebSocket is blocked.

One request is under way at a time, so neither requests nor their answers can overtake each other; what is sent
meanwhile goes together in the next one. A channel asks with an empty body whether there is something to fetch: at once
while the server says that answers are still to come, else now and then.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl as ssl_module
from dataclasses import dataclass, field

import httpx

from split_llama.errors import FlLlamaError
from split_llama.transport import failures
from split_llama.transport.address import ServerAddress, authorization
from split_llama.transport.base import INTERNAL_ERROR, LINK_LOST, NORMAL_CLOSE, Channel, ChannelClosed, Pipe

CONNECTION_HEADER = "X-FL-Connection"
PENDING_HEADER = "X-FL-Pending"
FRAMES_TYPE = "application/octet-stream"
DEFAULT_MAX_BODY_BYTES = 2**20
QUEUED_MESSAGES = 64
CLOSE_SECONDS = 2.0
# A question is held back by the server, and holds up what is sent meanwhile: what was just answered may lead to more.
GRACE_SECONDS = 0.05


@dataclass(frozen=True)
class HttpTransport:
    """Opens channels that POST to `url` (`http(s)://host:port[/root-path]`).

    `read_timeout` must exceed the second or so that a server holds a request back; `poll_seconds` is how long an idle
    channel waits before it asks, and such a question is answered about as soon, or `poll_timeout` ends the channel.
    Proxies of the environment are honoured, redirects are not followed.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    ssl: ssl_module.SSLContext | None = None
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    connect_timeout: float = 10.0
    read_timeout: float = 40.0
    poll_seconds: float = 1.0
    poll_timeout: float = 15.0

    async def connect(self) -> Channel:
        """Open a channel, after asking the server for its model. Raises as `WebSocketTransport.connect` does."""
        address = ServerAddress.parse(self.url)
        with failures.proxy_errors(address.base):
            client = httpx.AsyncClient(
                headers={CONNECTION_HEADER: secrets.token_hex(16), **authorization(self.api_key)},
                verify=self.ssl if self.ssl is not None else True,
                timeout=httpx.Timeout(self.read_timeout, connect=self.connect_timeout),
            )
        try:
            await _request(client, "GET", f"{address.base}/v1/model", b"", "application/json", client.timeout)
        except BaseException:
            await client.aclose()
            raise
        return HttpChannel(client, address.frames, self.max_body_bytes, self.poll_seconds, self.poll_timeout)


class HttpChannel:
    """A channel over a connection named by a header, with one request under way at a time."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, max_body_bytes: int, poll_seconds: float, poll_timeout: float
    ) -> None:
        self._client = client
        self._url = url
        self._max_body_bytes = max_body_bytes
        self._poll_seconds = poll_seconds
        self._poll_timeout = httpx.Timeout(poll_timeout)
        self._outgoing = Pipe(QUEUED_MESSAGES)
        self._incoming = Pipe(QUEUED_MESSAGES)
        self._worker = asyncio.create_task(self._work(), name="http-channel")

    async def send(self, message: bytes) -> None:
        """Queue one message for the next request; waits while too many are queued."""
        await self._outgoing.put(message)

    async def receive(self) -> bytes:
        """Give the body of the next answer that holds frames."""
        return await self._incoming.get()

    async def close(self, code: int = NORMAL_CLOSE, reason: str = "") -> None:
        """Send what is queued, within `CLOSE_SECONDS`, then stop; the server lets the connection lapse."""
        self._outgoing.close(code, reason)
        _, unfinished = await asyncio.wait({self._worker}, timeout=CLOSE_SECONDS)
        if unfinished:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        self._incoming.close(code, reason)
        await self._client.aclose()

    async def _work(self) -> None:
        try:
            idle_seconds = self._poll_seconds
            while True:
                body = await self._next_body(idle_seconds)
                patience = self._client.timeout if body else self._poll_timeout
                response = await _request(self._client, "POST", self._url, body, FRAMES_TYPE, patience)
                answer: bytes = response.content
                if answer:
                    await self._incoming.put(answer)
                idle_seconds = self._poll_seconds
                if PENDING_HEADER in response.headers:
                    idle_seconds = min(GRACE_SECONDS, idle_seconds) if answer else 0.0
        except ChannelClosed as closed:
            self._end(closed.code, closed.reason, None)
        except FlLlamaError as error:
            self._end(error.close_code or LINK_LOST, error.message, error)
        except Exception as error:
            self._end(INTERNAL_ERROR, f"the HTTP channel failed: {error!r}", error)

    async def _next_body(self, idle_seconds: float) -> bytes:
        """Give what is to be sent; nothing if that takes longer than `idle_seconds`."""
        try:
            async with asyncio.timeout(idle_seconds):
                first = await self._outgoing.get()
        except TimeoutError:
            return b""
        return b"".join((first, *self._outgoing.take_more(self._max_body_bytes - len(first))))

    def _end(self, code: int, reason: str, cause: BaseException | None) -> None:
        self._outgoing.close(code, reason, cause)
        self._incoming.close(code, reason, cause)


async def _request(
    client: httpx.AsyncClient, method: str, url: str, body: bytes, expected_type: str, patience: httpx.Timeout
) -> httpx.Response:
    headers = {"Content-Type": FRAMES_TYPE} if body else {}
    try:
        response = await client.request(method, url, content=body, headers=headers, timeout=patience)
    except httpx.RequestError as failure:
        raise failures.unreachable(url, failure) from failure
    content_type = response.headers.get("Content-Type", "")
    if response.status_code == httpx.codes.NO_CONTENT:
        return response
    if response.status_code != httpx.codes.OK or expected_type not in content_type:
        retry_after = response.headers.get("Retry-After", "")
        raise failures.refused(url, response.status_code, content_type, response.content, retry_after)
    return response
