"""Two channels back to back in one event loop: tests, and both parties in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from split_llama.errors import FlLlamaError
from split_llama.transport.base import INTERNAL_ERROR, NORMAL_CLOSE, Channel, Pipe

DEFAULT_QUEUED_MESSAGES = 64


class PipeChannel:
    """One end of a pair: reads one pipe, writes the other."""

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def send(self, message: bytes) -> None:
        """Hand a message to the other end; waits while it has too many unread."""
        await self._outgoing.put(message)

    async def receive(self) -> bytes:
        """Give the next message of the other end."""
        return await self._incoming.get()

    async def close(self, code: int = NORMAL_CLOSE, reason: str = "") -> None:
        """Close both directions; either end can still read what was sent before."""
        self.fail(code, reason, None)

    def fail(self, code: int, reason: str, cause: BaseException | None) -> None:
        """Close both directions because of `cause`."""
        self._incoming.close(code, reason, cause)
        self._outgoing.close(code, reason, cause)


def channel_pair(queued_messages: int = DEFAULT_QUEUED_MESSAGES) -> tuple[PipeChannel, PipeChannel]:
    """Give two connected channels, each of which buffers `queued_messages` unread ones."""
    there, back = Pipe(queued_messages), Pipe(queued_messages)
    return PipeChannel(back, there), PipeChannel(there, back)


class InProcessTransport:
    """Opens channels to `accept`, which runs as a task of its own for each, as a server's connection handler does."""

    def __init__(self, accept: Callable[[Channel], Awaitable[None]]) -> None:
        self._accept = accept
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self) -> Channel:
        """Open a channel. When `accept` fails, the channel closes and `ChannelClosed` is chained to the failure."""
        near, far = channel_pair()
        task = asyncio.create_task(self._serve(near, far), name="in-process-connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return near

    async def aclose(self) -> None:
        """End all connections and wait for their tasks."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, near: PipeChannel, far: PipeChannel) -> None:
        try:
            await self._accept(far)
        except FlLlamaError as error:
            near.fail(error.close_code or INTERNAL_ERROR, error.message, error)
        except Exception as error:
            near.fail(INTERNAL_ERROR, f"the other end failed: {error!r}", error)
        finally:
            near.fail(NORMAL_CLOSE, "the other end is done", None)
