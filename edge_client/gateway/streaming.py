"""Server-sent events, and the caller's leaving: it cancels the work at once, streamed or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_client.gateway.errors import describe, error_body
from split_llama.errors import FlLlamaError

CLIENT_CLOSED = 499  # nginx's word for it; nobody reads it, but the metrics show it
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Cache-Control": "no-store",
    # nginx would collect the stream otherwise.
    "X-Accel-Buffering": "no",
}

log = logging.getLogger("fl_llama.gateway")
T = TypeVar("T")


def sse(body: object) -> bytes:
    """Give one event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do `work` for a caller who waits for it; when he leaves, it is cancelled."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=CLIENT_CLOSED)
    finally:
        await _cancel((working, leaving))


class EventStream(Response):
    """Sends the events of `chunks` as they come, `[DONE]` last.

    Nothing is sent before the first one is there, so that a refusal has its proper status; a later one is an event. A
    reader who takes nothing for `reader_seconds` stops the stream, and the work is never further than what is sent.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], reader_seconds: float) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self._chunks = chunks
        self._reader_seconds = reader_seconds
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as the reader stays for."""
        speaking, leaving = asyncio.create_task(self._speak(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if speaking.done() and not speaking.cancelled():
                speaking.result()
        finally:
            await _cancel((speaking, leaving))

    async def _speak(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await self._send(send, chunk)
            await self._send(send, DONE, more=False)
        except _Unread:
            log.warning("a stream was not read for %g s and is ended", self._reader_seconds)
        except FlLlamaError as error:
            if not self._has_begun:
                raise
            await self._fail(send, describe(error)[1])
        except Exception:
            if not self._has_begun:
                raise
            log.exception("a stream failed")
            await self._fail(
                send, error_body("the gateway failed while it answered; its log says more", "server_error")
            )

    async def _fail(self, send: Send, body: object) -> None:
        with contextlib.suppress(_Unread):
            await self._send(send, sse(body) + DONE, more=False)

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._reader_seconds):
                if not self._has_begun:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    self._has_begun = True
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError as error:
            raise _Unread from error


class _Unread(Exception):
    """The reader takes nothing."""


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def merge(
    sources: Sequence[Callable[[], AsyncGenerator[T, None]]], at_once: int
) -> AsyncGenerator[tuple[int, T], None]:
    """Run `at_once` of the sources side by side; give what they give with each one's index. A fault ends all."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]()) as only:
            async for item in only:
                yield 0, item
        return
    found: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(at_once)
    waiting = iter(list(enumerate(sources)))

    async def work() -> None:
        try:
            for index, source in waiting:
                async with contextlib.aclosing(source()) as items:
                    async for item in items:
                        await found.put((index, item))
        except Exception as error:
            await found.put(error)
        await found.put(None)

    workers = [asyncio.create_task(work()) for _ in range(min(at_once, len(sources)))]
    running = len(workers)
    try:
        while running:
            got = await found.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        await _cancel(workers)
