"""One connection to the server for all sessions of this process; when it is lost, it is made anew and they go on."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

from edge_client.connector import Connector, may_pass
from edge_client.outbox import Outbox
from edge_client.session import RemoteSession, new_opening
from edge_client.session_state import SessionState
from split_llama.errors import ConnectionRefused, FlLlamaError, ServerUnreachable, SlowReader
from split_llama.transport.base import NORMAL_CLOSE, Channel, ChannelClosed
from split_llama.wire.control import HelloReply, Open, error_from_frame
from split_llama.wire.frame import Frame, Kind, encode_message, split_message

CLOSE_SECONDS = 1.0
MESSAGE_BYTES = 128 * 1024
FIRST_BACKOFF = 0.05
LONGEST_BACKOFF = 3.0
SLOW_BACKOFF = 15.0


class ServerLink:
    """Use as `async with ServerLink(connector, ...) as link`. Where a server says that a session moved, all follow.

    A lost link is retried. After `reconnect_seconds` without one every session fails with `ServerUnreachable`, and at
    once with what retrying does not mend (a key, another model); so does `open`, until a server answers again.
    `on_refusal` hears of sessions that a server has no room for: whoever keeps others without need can close some.
    """

    def __init__(self, connector: Connector, *, reconnect_seconds: float = 60.0) -> None:
        self._connector = connector
        self._reconnect_seconds = reconnect_seconds
        self._sessions: dict[int, RemoteSession] = {}
        self._next_handle = 0
        self._dirty: dict[RemoteSession, None] = {}
        self._dirty_event = asyncio.Event()
        self._moved_to: str | None = None
        self._moved = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error: FlLlamaError | None = None
        self.on_refusal: Callable[[], None] = lambda: None

    @property
    def error(self) -> FlLlamaError | None:
        """Why no session can be opened, if that is so."""
        return self._error

    @property
    def hello(self) -> HelloReply:
        """What the server said about itself."""
        return self._connector.hello

    @property
    def address(self) -> str:
        """The server in use, which may be another than at first."""
        return self._connector.addresses.current.base

    async def __aenter__(self) -> ServerLink:
        channel = await self._connector.connect()
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
        session = RemoteSession(state, self._reconnect_seconds, self._kick, self._redirect, lambda: self.on_refusal())
        self._sessions[self._next_handle] = session
        self._attach(self._next_handle, session)
        self._kick(session)
        return session

    def _redirect(self, address: str) -> None:
        """Follow a MOVED: the whole link goes there."""
        self._moved_to = address
        self._moved.set()

    async def close(self, session: RemoteSession) -> None:
        """Close a session on the server and forget it."""
        try:
            await session.close()
        finally:
            self._sessions.pop(session.state.handle, None)

    def _attach(self, handle: int, session: RemoteSession) -> None:
        hello = self.hello
        session.state.attach(handle, hello.max_frame_bytes, hello.max_step_rows)

    def _kick(self, session: RemoteSession) -> None:
        self._dirty[session] = None
        self._dirty_event.set()

    async def _serve(self, channel: Channel) -> None:
        """Read and write until the link is lost, make it anew, and so on."""
        try:
            while True:
                lost = await self._pump(channel)
                for session in self._sessions.values():
                    session.state.detach()
                if isinstance(lost, ConnectionRefused) and not isinstance(lost, SlowReader):
                    self._fail(lost)
                channel = await self._reconnect(lost, 0.0 if self._take_move() else FIRST_BACKOFF)
                self._error = None
                for handle, session in self._sessions.items():
                    self._attach(handle, session)
                    self._kick(session)
        except Exception as error:
            # Nobody may wait for ever because of a fault of ours.
            self._fail(FlLlamaError(f"the edge's link to the server failed: {error!r}"))
            raise

    def _fail(self, error: FlLlamaError) -> None:
        self._error = error
        for session in self._sessions.values():
            session.fail(error)
        self._sessions.clear()

    def _take_move(self) -> bool:
        """Say whether a server named another one, which is asked next."""
        address, self._moved_to = self._moved_to, None
        self._moved.clear()
        if address is None:
            return False
        try:
            self._connector.addresses.move(address)
        except FlLlamaError as error:
            self._fail(error)
            return False
        return True

    async def _reconnect(self, lost: FlLlamaError, backoff: float) -> Channel:
        """Connect, however long it takes; nobody is kept waiting for longer than `reconnect_seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._reconnect_seconds
        while True:
            delay = backoff * random.uniform(0.5, 1.5)
            if self._error is None and loop.time() + delay > deadline:
                self._fail(
                    ServerUnreachable(
                        f"the server was lost and did not come back within {self._reconnect_seconds:.0f} seconds "
                        f"({lost.message})",
                        retry_after_ms=int(LONGEST_BACKOFF * 1000),
                    )
                )
            await asyncio.sleep(delay)
            backoff = max(backoff, min(max(backoff * 2, FIRST_BACKOFF), LONGEST_BACKOFF))
            try:
                return await self._connector.connect()
            except FlLlamaError as error:
                if not may_pass(error):
                    # Trying again does not help those who wait; somebody may mend it, so it is tried now and then.
                    self._fail(error)
                    backoff = SLOW_BACKOFF
                lost = error

    async def _pump(self, channel: Channel) -> FlLlamaError:
        """Move frames both ways until the channel ends; give the reason."""
        reader = asyncio.create_task(self._read(channel), name="server-link-reader")
        writer = asyncio.create_task(self._write(channel), name="server-link-writer")
        leaver = asyncio.create_task(self._leave(), name="server-link-leaver")
        try:
            await asyncio.wait((reader, writer, leaver), return_when=asyncio.FIRST_COMPLETED)
            # The reader knows best why a channel ended, and what came before its end still counts.
            await asyncio.wait((reader,), timeout=0 if reader.done() or leaver.done() else CLOSE_SECONDS)
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
            for task in (reader, writer, leaver):
                task.cancel()
            await asyncio.gather(reader, writer, leaver, return_exceptions=True)
            await channel.close()

    async def _leave(self) -> None:
        """End when a server names another one."""
        await self._moved.wait()

    async def _read(self, channel: Channel) -> None:
        while True:
            for frame in split_message(await channel.receive(), self.hello.max_frame_bytes):
                self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if frame.handle == 0 and frame.kind is Kind.ERROR:
            raise error_from_frame(frame)
        if frame.kind is Kind.REPLY:
            self._connector.addresses.answered()
        session = self._sessions.get(frame.handle)
        if session is not None:
            session.on_frame(frame)

    async def _write(self, channel: Channel) -> None:
        outbox = Outbox[RemoteSession](min(self.hello.max_message_bytes, MESSAGE_BYTES))
        while True:
            if not outbox:
                await self._dirty_event.wait()
            self._dirty_event.clear()
            for session in self._dirty:
                outbox.put(session, session.take_frames())
            self._dirty.clear()
            if frames := outbox.take():
                await channel.send(encode_message(frames))
