"""One connection to the server for all sessions of this process; when it is lost, it is made anew and they go on."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence

from edge_client.session import RemoteSession, new_opening
from edge_client.session_state import SessionState
from split_llama.errors import (
    ConnectionRefused,
    Draining,
    FlLlamaError,
    ModelMismatch,
    NotAServer,
    RemoteError,
    ServerUnreachable,
    SlowReader,
)
from split_llama.transport.base import NORMAL_CLOSE, Channel, ChannelClosed, Transport
from split_llama.wire.control import Hello, HelloReply, Open, error_from_frame
from split_llama.wire.frame import VERSION, Frame, Kind, encode_message, split_message

HELLO_SECONDS = 15.0
CLOSE_SECONDS = 1.0
FIRST_BACKOFF = 0.05
LONGEST_BACKOFF = 3.0
CLIENT_NAME = "fl-llama edge-client"


class ServerLink:
    """Use as `async with ServerLink(transports, ...) as link`. `transports` are tried in order at first; the one that
    works is kept. A lost link is retried for `reconnect_seconds`, then every session fails with `ServerUnreachable`.
    """

    def __init__(self, transports: Sequence[Transport], *, reconnect_seconds: float = 60.0) -> None:
        self._transports = list(transports)
        self._reconnect_seconds = reconnect_seconds
        self._sessions: dict[int, RemoteSession] = {}
        self._next_handle = 0
        self._dirty: dict[RemoteSession, None] = {}
        self._dirty_event = asyncio.Event()
        self._hello: HelloReply | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: FlLlamaError | None = None

    @property
    def hello(self) -> HelloReply:
        """What the server said about itself."""
        assert self._hello is not None, "the link is not connected"
        return self._hello

    async def __aenter__(self) -> ServerLink:
        channel = await self._first_connect()
        self._task = asyncio.create_task(self._serve(channel), name="server-link")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(self.close(session) for session in list(self._sessions.values())))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def open(self, opening: Open) -> RemoteSession:
        """Open a session over `opening.blocks`; its id and secret are drawn here. Steps may be submitted at once."""
        if self._error is not None:
            raise self._error
        return self._start(SessionState(new_opening(opening), self.hello.hidden_size))

    def fork(self, parent: RemoteSession, at: int) -> RemoteSession:
        """Open a session with the first `at` positions of an idle one, which stays; steps may be submitted at once."""
        if self._error is not None:
            raise self._error
        return self._start(parent.state.fork(new_opening(parent.state.opening), at))

    def _start(self, state: SessionState) -> RemoteSession:
        self._next_handle += 1
        session = RemoteSession(state, self._reconnect_seconds, self._kick, self._redirect)
        self._sessions[self._next_handle] = session
        self._attach(self._next_handle, session)
        self._kick(session)
        return session

    def _redirect(self, address: str) -> None:
        """Follow a MOVED."""
        self._fail(RemoteError(f"the server moved this session to {address}; start again with --server {address}"))

    async def close(self, session: RemoteSession) -> None:
        """Close a session on the server and forget it."""
        await session.close()
        self._sessions.pop(session.state.handle, None)

    def _attach(self, handle: int, session: RemoteSession) -> None:
        hello = self.hello
        session.state.attach(handle, hello.max_frame_bytes, hello.max_step_rows)

    def _kick(self, session: RemoteSession) -> None:
        self._dirty[session] = None
        self._dirty_event.set()

    async def _first_connect(self) -> Channel:
        while True:
            try:
                return await self._connect()
            except (NotAServer, ServerUnreachable):
                # WebSocket may be blocked on the way; the next transport says whether anything is there at all.
                if len(self._transports) == 1:
                    raise
                del self._transports[0]

    async def _connect(self) -> Channel:
        channel = await self._transports[0].connect()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await self._greet(channel)
        except TimeoutError:
            await channel.close()
            raise ServerUnreachable(f"the server did not answer HELLO in {HELLO_SECONDS:.0f} seconds") from None
        except ChannelClosed as closed:
            raise closed.error() from closed
        except BaseException:
            await channel.close()
            raise
        known = self._hello
        if known is not None and (known.geometry, known.blocks) != (hello.geometry, hello.blocks):
            await channel.close()
            raise ModelMismatch("the server came back with another model; start again to use it")
        self._hello = hello
        return channel

    async def _greet(self, channel: Channel) -> HelloReply:
        hello = Frame(Kind.HELLO, payload=Hello(protocol=VERSION, client=CLIENT_NAME).to_bytes())
        await channel.send(hello.encode())
        frame = next(split_message(await channel.receive()), None)
        if frame is not None and frame.kind is Kind.ERROR:
            raise error_from_frame(frame)
        if frame is None or frame.kind is not Kind.HELLO:
            raise NotAServer("the server did not answer HELLO with HELLO")
        return HelloReply.from_bytes(frame.payload)

    async def _serve(self, channel: Channel) -> None:
        """Read and write until the link is lost, make it anew, and so on; an error that stays ends all sessions."""
        try:
            while True:
                lost = await self._pump(channel)
                for session in self._sessions.values():
                    session.state.detach()
                if isinstance(lost, ConnectionRefused) and not isinstance(lost, SlowReader):
                    raise lost
                channel = await self._reconnect(lost)
                for handle, session in self._sessions.items():
                    self._attach(handle, session)
                    self._kick(session)
        except FlLlamaError as error:
            self._fail(error)
        except Exception as error:
            # Nobody may wait for ever because of a fault of ours.
            self._fail(FlLlamaError(f"the edge's link to the server failed: {error!r}"))
            raise

    def _fail(self, error: FlLlamaError) -> None:
        self._error = error
        for session in self._sessions.values():
            session.fail(error)

    async def _reconnect(self, lost: FlLlamaError) -> Channel:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._reconnect_seconds
        backoff = FIRST_BACKOFF
        while True:
            delay = backoff * random.uniform(0.5, 1.5)
            if loop.time() + delay > deadline:
                raise ServerUnreachable(
                    f"the server was lost and did not come back within {self._reconnect_seconds:.0f} seconds "
                    f"({lost.message})"
                ) from lost
            await asyncio.sleep(delay)
            backoff = min(backoff * 2, LONGEST_BACKOFF)
            try:
                return await self._connect()
            except (RemoteError, Draining) as error:
                lost = error

    async def _pump(self, channel: Channel) -> FlLlamaError:
        """Move frames both ways until the channel ends; give the reason."""
        reader = asyncio.create_task(self._read(channel), name="server-link-reader")
        writer = asyncio.create_task(self._write(channel), name="server-link-writer")
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            # The reader knows best why a channel ended, and what came before its end still counts.
            await asyncio.wait((reader,), timeout=0 if reader.done() else CLOSE_SECONDS)
            for task in (reader, writer):
                if task.done():
                    await task
            raise ServerUnreachable("the connection was lost")
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

    async def _read(self, channel: Channel) -> None:
        while True:
            for frame in split_message(await channel.receive(), self.hello.max_frame_bytes):
                self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if frame.handle == 0 and frame.kind is Kind.ERROR:
            raise error_from_frame(frame)
        session = self._sessions.get(frame.handle)
        if session is not None:
            session.on_frame(frame)

    async def _write(self, channel: Channel) -> None:
        limit = self.hello.max_message_bytes
        while True:
            await self._dirty_event.wait()
            self._dirty_event.clear()
            batches = [session.take_frames() for session in self._dirty]
            self._dirty.clear()
            # One new token is waited for by somebody; a prompt's chunks can follow.
            batches.sort(key=lambda frames: max((frame.count for frame in frames), default=0))
            for message in _messages([frame for frames in batches for frame in frames], limit):
                await channel.send(message)


def _messages(frames: Sequence[Frame], limit: int) -> list[bytes]:
    """Join frames into messages of at most `limit` bytes."""
    messages: list[bytes] = []
    batch: list[Frame] = []
    size = 0
    for frame in frames:
        if batch and size + frame.size > limit:
            messages.append(encode_message(batch))
            batch, size = [], 0
        batch.append(frame)
        size += frame.size
    if batch:
        messages.append(encode_message(batch))
    return messages
