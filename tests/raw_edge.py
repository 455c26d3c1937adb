"""A bare client of the wire protocol for tests: it sends exactly what it is told, and waits for what comes."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from split_llama.errors import FlLlamaError
from split_llama.transport.base import Channel
from split_llama.wire.codec import Codec, decode_rows, encode_rows
from split_llama.wire.control import Fork, Grant, Hello, HelloReply, Open, error_from_frame
from split_llama.wire.frame import Flag, Frame, Kind, encode_message, split_message
from split_llama.wire.step import build_step

Floats = npt.NDArray[np.float32]
PATIENCE = 20.0
PLAIN = Flag(0)
MAX_FRAME = 1 << 20


class RawEdge:
    """One connection. `hello` is the server's greeting; frames that nobody waited for stay in `inbox`."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.inbox: deque[Frame] = deque()
        self.hello: HelloReply | None = None

    @classmethod
    async def greet(cls, channel: Channel, model: str | None = None) -> RawEdge:
        edge = cls(channel)
        await edge.send(Frame(Kind.HELLO, payload=Hello(protocol=1, client="test", model=model).to_bytes()))
        edge.hello = HelloReply.from_bytes((await edge.expect(Kind.HELLO)).payload)
        return edge

    async def send(self, *frames: Frame) -> None:
        await self.channel.send(encode_message(frames))

    async def next(self) -> Frame:
        """Give the next frame; an empty message (HTTP) is skipped."""
        async with asyncio.timeout(PATIENCE):
            while not self.inbox:
                message = await self.channel.receive()
                # Payloads outlive the message here.
                self.inbox += [
                    replace(frame, payload=bytes(frame.payload)) for frame in split_message(message, MAX_FRAME)
                ]
        return self.inbox.popleft()

    async def expect(self, kind: Kind, handle: int | None = None) -> Frame:
        """Give the next frame, which must be of this kind; an ERROR that is not asked for is raised."""
        frame = await self.next()
        if frame.kind is Kind.ERROR and kind is not Kind.ERROR:
            raise error_from_frame(frame)
        assert frame.kind is kind, f"expected {kind.name}, {frame} came"
        assert handle is None or frame.handle == handle
        return frame

    async def error(self, handle: int | None = None, seq: int | None = None) -> FlLlamaError:
        frame = await self.expect(Kind.ERROR, handle)
        assert seq is None or frame.seq == seq
        return error_from_frame(frame)

    async def open(self, handle: int, blocks: tuple[int, int], **fields: Any) -> RawSession:
        session = RawSession(self, handle, blocks, **fields)
        await self.send(session.opening(Kind.OPEN))
        session.grant = Grant.from_bytes((await self.expect(Kind.OPEN, handle)).payload)
        return session


class RawSession:
    """One session as the client numbers it."""

    def __init__(self, edge: RawEdge, handle: int, blocks: tuple[int, int], **fields: Any) -> None:
        self.edge = edge
        self.handle = handle
        self.blocks = blocks
        self.payload = Open(
            **({"session": secrets.token_hex(16), "secret": secrets.token_hex(32), "blocks": blocks} | fields)
        )
        self.grant: Grant | None = None
        self.seq = 0
        self.ack = 0

    def opening(self, kind: Kind) -> Frame:
        return Frame(kind, handle=self.handle, payload=self.payload.to_bytes())

    def step(self, first: int, states: Floats, *, flags: Flag = PLAIN, codec: Codec = Codec.FP32, **more: Any) -> Frame:
        """Build the next step."""
        self.seq += 1
        fields = {"seq": self.seq, "ack": self.ack} | more
        rows = encode_rows(codec, states)
        return build_step(
            handle=self.handle, first=first, count=len(states), codec=codec, rows=rows, flags=flags, **fields
        )

    async def run(self, first: int, states: Floats, **more: Any) -> Floats:
        """Send a step and give the rows of its reply."""
        await self.edge.send(self.step(first, states, **more))
        return await self.reply()

    async def reply(self) -> Floats:
        frame = await self.edge.expect(Kind.REPLY, self.handle)
        assert frame.seq == self.ack + 1
        self.ack = frame.seq
        return self.rows(frame)

    def rows(self, frame: Frame) -> Floats:
        assert self.edge.hello is not None
        out = np.empty((frame.count, self.edge.hello.hidden_size), np.float32)
        decode_rows(Codec(frame.codec), frame.payload, out)
        return out

    async def attach(self, edge: RawEdge, handle: int | None = None) -> Frame:
        """Attach over another connection; give the answer."""
        self.edge, self.handle = edge, handle or self.handle
        await edge.send(self.opening(Kind.ATTACH))
        return await edge.next()

    async def fork(self, handle: int, at: int) -> RawSession:
        child = RawSession(self.edge, handle, self.blocks)
        fork = Fork(parent=self.handle, at=at, session=child.payload.session, secret=child.payload.secret)
        await self.edge.send(Frame(Kind.FORK, handle=handle, payload=fork.to_bytes()))
        child.grant = Grant.from_bytes((await self.edge.expect(Kind.FORK, handle)).payload)
        return child

    async def close(self) -> None:
        await self.edge.send(Frame(Kind.CLOSE, handle=self.handle))
        await self.edge.expect(Kind.CLOSE, self.handle)
