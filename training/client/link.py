"""A client's connection to its job: JOIN, frames cut and put together, and all of it again when the link was lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from edge_client.connector import Connector, may_pass
from split_llama.errors import ConnectionRefused, FlLlamaError, RequestRefused, ServerUnreachable, SlowReader
from split_llama.transport.base import NORMAL_CLOSE, Channel, ChannelClosed
from split_llama.wire.control import HelloReply, error_from_frame
from split_llama.wire.frame import Frame, Kind, encode_message, split_message
from split_llama.wire.training import Assembler, Join, Joined, Message, cut

HANDLE = 1
MESSAGE_BYTES = 256 * 1024
CLOSE_SECONDS = 1.0
FIRST_BACKOFF = 0.05
LONGEST_BACKOFF = 3.0


@dataclass(frozen=True, slots=True)
class Lost:
    """The link is down; whatever was under way is void. It is being made anew."""

    error: FlLlamaError


@dataclass(frozen=True, slots=True)
class Refused:
    """The server refuses the message of this seq."""

    seq: int
    error: FlLlamaError


Event = Joined | Message | Refused | Lost


class JobLink:
    """Use as `async with JobLink(...) as link`, and read `link.events()`.

    `make_join` gives the JOIN for each connection: what the client can restore changes. It is asked only when the
    reader of `events` has dealt with all that came before, `Lost` included. `adapter_rows` is the size of the largest
    message apart from states. A lost server is asked again for `reconnect_seconds`; where that does not help, or
    cannot, `events` raises.
    """

    def __init__(
        self,
        connector: Connector,
        make_join: Callable[[], Awaitable[Join]],
        *,
        reconnect_seconds: float,
        adapter_rows: int = 0,
    ) -> None:
        self._connector = connector
        self._make_join = make_join
        self._reconnect_seconds = reconnect_seconds
        self._adapter_rows = adapter_rows
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._frames: deque[Iterator[Frame]] = deque()
        self._frames_event = asyncio.Event()
        self._sent = asyncio.Event()
        # Whether the reader of `events` knows of the last loss and is done with what that means.
        self._heard = asyncio.Event()
        self._heard.set()
        self._dropped: asyncio.Future[FlLlamaError] | None = None
        self._seq = 0
        self._assembler: Assembler | None = None
        self._task: asyncio.Task[None] | None = None
        self.bytes_up = 0
        self.bytes_down = 0

    async def __aenter__(self) -> JobLink:
        self._task = asyncio.create_task(self._serve(), name="job-link")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def hello(self) -> HelloReply:
        """What the server said about itself."""
        return self._connector.hello

    async def events(self) -> AsyncIterator[Event]:
        """Give what happens, in order. Raises `FlLlamaError` when the link is lost for good or the job refuses."""
        while True:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Lost):
                self._heard.set()

    def fail(self, failure: BaseException) -> None:
        """Let `events` raise: what used the link cannot go on."""
        self._events.put_nowait(failure)

    def send(self, message: Message) -> int:
        """Queue a message; give the seq under which it goes. Nothing goes out, or waits, before the job was joined."""
        self._seq += 1
        if self._assembler is not None:
            numbered = Message(message.kind, self._seq, message.header, message.codec, message.count, message.rows)
            self._put(cut(numbered, HANDLE, self.hello.hidden_size, self.hello.max_frame_bytes))
        return self._seq

    def join_again(self, why: str) -> None:
        """Drop this connection and JOIN on another, so that the server hears anew what the client can restore."""
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(ServerUnreachable(why))

    async def leave(self) -> None:
        """Say that this client does not come back, if the server can be told."""
        if self._assembler is None:
            return
        self._put(iter([Frame(Kind.CLOSE, handle=HANDLE, seq=self._seq + 1)]))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._sent.wait()

    def _put(self, frames: Iterator[Frame]) -> None:
        self._frames.append(frames)
        self._sent.clear()
        self._frames_event.set()

    async def _serve(self) -> None:
        """Connect, read and write until the link is lost, and so on."""
        loop = asyncio.get_running_loop()
        lost: FlLlamaError = ServerUnreachable("the server was not reached yet")
        backoff, deadline = 0.0, loop.time() + self._reconnect_seconds
        try:
            while True:
                channel = await self._connect(lost, backoff, deadline)
                lost = await self._pump(channel)
                if self._assembler is not None:
                    backoff, deadline = FIRST_BACKOFF, loop.time() + self._reconnect_seconds
                    self._heard.clear()
                    self._events.put_nowait(Lost(lost))
                self._disconnected()
                if not _may_mend(lost) or loop.time() > deadline:
                    raise lost
                backoff = max(_longer(backoff), lost.retry_after_ms / 1000)
        except FlLlamaError as error:
            self._events.put_nowait(error)
        except Exception as error:
            # Nobody may wait for ever because of a fault of ours.
            self._events.put_nowait(FlLlamaError(f"the client's link to the server failed: {error!r}"))
            raise

    def _disconnected(self) -> None:
        self._assembler = None
        self._frames.clear()

    async def _connect(self, lost: FlLlamaError, backoff: float, deadline: float) -> Channel:
        """Connect, asking again as long as that may help. Raises what stood in the way."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
            try:
                return await self._connector.connect()
            except FlLlamaError as error:
                backoff = _longer(backoff)
                if not may_pass(error):
                    raise
                if loop.time() + backoff > deadline:
                    raise ServerUnreachable(
                        f"no server within {self._reconnect_seconds:.0f} seconds: {error.message} (before: "
                        f"{lost.message}). Come back with the same command, or wait longer with --reconnect-seconds"
                    ) from error

    async def _pump(self, channel: Channel) -> FlLlamaError:
        """Join, then move frames both ways until the channel ends; give the reason."""
        reader = asyncio.create_task(self._read(channel), name="job-link-reader")
        writer = asyncio.create_task(self._write(channel), name="job-link-writer")
        dropped: asyncio.Future[FlLlamaError] = asyncio.get_running_loop().create_future()
        self._dropped = dropped
        try:
            await self._join()
            await asyncio.wait((reader, writer, dropped), return_when=asyncio.FIRST_COMPLETED)
            if dropped.done():
                return dropped.result()
            # The reader knows best why a channel ended, and what came before its end still counts.
            await asyncio.wait((reader,), timeout=0 if reader.done() else CLOSE_SECONDS)
            for task in (reader, writer):
                if task.done():
                    await task
            return ServerUnreachable("the connection was lost")
        except ChannelClosed as closed:
            return closed.error()
        except FlLlamaError as error:
            await channel.close(error.close_code or NORMAL_CLOSE, error.message)
            return error
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            await channel.close()

    async def _join(self) -> None:
        await self._heard.wait()
        join = await self._make_join()
        self._seq += 1
        message = Message(Kind.JOIN, self._seq, join.to_bytes())
        self._put(cut(message, HANDLE, self.hello.hidden_size, self.hello.max_frame_bytes))

    async def _read(self, channel: Channel) -> None:
        while True:
            data = await channel.receive()
            self.bytes_down += len(data)
            for frame in split_message(data, self.hello.max_frame_bytes):
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.ERROR:
            self._take_error(frame)
        elif frame.handle != HANDLE:
            return
        elif frame.kind is Kind.JOIN:
            joined = Joined.from_bytes(frame.payload)
            self._assembler = Assembler(self.hello.hidden_size, max(joined.max_rows, self._adapter_rows))
            self._events.put_nowait(joined)
        elif self._assembler is not None and (frame.aux or frame.count):
            message = self._assembler.add(frame)
            if message is not None:
                self._events.put_nowait(message)

    def _take_error(self, frame: Frame) -> None:
        error = error_from_frame(frame)
        if frame.handle == 0 or self._assembler is None:
            # About the connection, or about JOIN: this connection is of no use. The error says whether another is.
            raise error
        self._events.put_nowait(Refused(frame.seq, error))

    async def _write(self, channel: Channel) -> None:
        while True:
            await self._frames_event.wait()
            self._frames_event.clear()
            while batch := self._take_frames(min(self.hello.max_message_bytes, MESSAGE_BYTES)):
                data = encode_message(batch)
                await channel.send(data)
                self.bytes_up += len(data)
            self._sent.set()

    def _take_frames(self, limit: int) -> list[Frame]:
        """Take frames for one message; the parts of a large one are cut only when they go."""
        taken: list[Frame] = []
        room = limit - self.hello.max_frame_bytes
        while self._frames and (not taken or sum(frame.size for frame in taken) <= room):
            frame = next(self._frames[0], None)
            if frame is None:
                self._frames.popleft()
            else:
                taken.append(frame)
        return taken


def _longer(backoff: float) -> float:
    return min(max(backoff * 2, FIRST_BACKOFF), LONGEST_BACKOFF)


def _may_mend(error: FlLlamaError) -> bool:
    """Say whether a new connection may help."""
    if isinstance(error, (ConnectionRefused, RequestRefused)):
        return isinstance(error, SlowReader) or may_pass(error) or error.retry_after_ms > 0
    return may_pass(error)
