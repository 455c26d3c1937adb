"""Questions to the server and their answers: each FORWARD and BACKWARD waits for what comes back under its place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from split_llama.errors import FlLlamaError, UnknownStep
from split_llama.wire.codec import Codec, row_bytes
from split_llama.wire.control import Request
from split_llama.wire.frame import Kind
from split_llama.wire.training import Answer, Backward, Forward, Message

Key = tuple[Kind, int, int]


class Exchange:
    """The answers that one generation of a job waits for. Lives on the event loop."""

    def __init__(self, send: Callable[[Message], int], width: int, generation: int) -> None:
        self._send = send
        self._width = width
        self.generation = generation
        self._waiting: dict[Key, asyncio.Future[Message]] = {}
        self._by_seq: dict[int, Key] = {}

    async def ask(self, kind: Kind, header: Forward | Backward, codec: Codec, rows: bytes) -> Message:
        """Send a micro-batch's rows and give the answer. Raises what the server refuses them with."""
        return await self.post(kind, header, codec, rows)

    def post(self, kind: Kind, header: Forward | Backward, codec: Codec, rows: bytes) -> asyncio.Future[Message]:
        """Send a micro-batch's rows; the answer, or what the server refuses them with, comes by the future."""
        key = (kind, header.step, header.micro)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        seq = self.tell(kind, header, codec, rows)
        self._by_seq[seq] = key

        def forget(done: asyncio.Future[Message]) -> None:
            del self._by_seq[seq]
            if self._waiting.get(key) is done:
                del self._waiting[key]

        future.add_done_callback(forget)
        return future

    def tell(self, kind: Kind, header: Request, codec: Codec = Codec.FP32, rows: bytes = b"") -> int:
        """Send a message that is answered in its own time, or not; give its seq."""
        count = len(rows) // row_bytes(codec, self._width)
        # With nulls: that a loss is null is what a commit says by it.
        return self._send(Message(kind, 0, header.model_dump_json().encode(), codec, count, rows))

    def answered(self, message: Message) -> None:
        """Take an answer; one that nobody waits for (any more), or of another generation, is dropped."""
        answer = Answer.from_bytes(message.header)
        future = self._waiting.get((message.kind, answer.step, answer.micro))
        if answer.generation == self.generation and future is not None and not future.done():
            future.set_result(replace(message, header=b""))

    def waits_for(self, step: int) -> bool:
        """Say whether answers about a step are still to come."""
        return any(asked == step and not future.done() for (_, asked, _), future in self._waiting.items())

    def give_up(self, step: int) -> None:
        """Wait no longer for answers about a step that is closed: the server sends what it has before it says so."""
        for (_, asked, _), future in list(self._waiting.items()):
            if asked == step and not future.done():
                future.set_exception(UnknownStep(f"step {step} was closed before this was answered"))

    def refused(self, seq: int, error: FlLlamaError) -> bool:
        """Take a refusal; give whether somebody waited for that message."""
        future = self._waiting.get(self._by_seq.get(seq, (Kind.ERROR, 0, 0)))
        if future is None or future.done():
            return False
        future.set_exception(error)
        return True
