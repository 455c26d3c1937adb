"""One answer from prompt to last token: A here, B on the server, C here, with as much of it at once as possible."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from edge_client.edge_model import Encoded, LocalSession, Work
from edge_client.session import RemoteSession
from edge_client.session_state import Answer
from edge_client.turn import TokenEvent, Turn
from edge_client.worker import EdgeWorker
from split_llama.wire.frame import Flag

PREFILL_ROWS = 128


@dataclass(slots=True)
class GenerationStats:
    """Times are milliseconds since the prompt was handed in. Bytes are frames with their headers, of this session;
    what WebSocket, TLS and TCP add is not counted. A round trip is one wait for the server: one for the prompt, one
    per token after the first."""

    prompt_tokens: int = 0
    round_trips: int = 0
    ttft_ms: float = 0.0
    itl_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


class EdgeSession:
    """One sequence, here and on the server. Use `EdgeRuntime.open` to make one; one answer per session."""

    def __init__(self, local: LocalSession, remote: RemoteSession, worker: EdgeWorker, *, all_rows: bool) -> None:
        self.stats = GenerationStats()
        self._local = local
        self._remote = remote
        self._worker = worker
        # Without blocks in C only the last position's output is of use.
        self._all_rows = all_rows

    @property
    def remote(self) -> RemoteSession:
        """The session on the server."""
        return self._remote

    @property
    def local(self) -> LocalSession:
        """The session's state at the edge."""
        return self._local

    async def generate(self, prompt_ids: Sequence[int], turn: Turn) -> AsyncIterator[TokenEvent]:
        """Feed the prompt, then yield each token as it is chosen until `turn` is over."""
        assert self._local.length == 0, "a session makes one answer"
        stats, begin = self.stats, time.perf_counter()
        stats.prompt_tokens = len(prompt_ids)
        feeder = asyncio.create_task(self._feed(prompt_ids), name="prefill")
        try:
            waiting_for = len(prompt_ids)
            last = begin
            while turn.finish_reason is None:
                rows = await self._round_trip(waiting_for, turn, feeder)
                now = time.perf_counter()
                if len(turn.tokens) == 1:
                    stats.ttft_ms = (now - begin) * 1000
                else:
                    stats.itl_ms.append((now - last) * 1000)
                last = now
                stats.total_ms = (now - begin) * 1000
                self._send(rows, 0)
                waiting_for += len(rows)
                self._count_bytes()
                for event in turn.take_events():
                    yield event
        finally:
            feeder.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await feeder
            self._count_bytes()

    async def _feed(self, prompt_ids: Sequence[int]) -> None:
        """Run the prompt through A and send it, chunk by chunk, while answers to earlier chunks are worked on."""
        for start in range(0, len(prompt_ids), PREFILL_ROWS):
            chunk = tuple(prompt_ids[start : start + PREFILL_ROWS])
            rows = await self._worker.do(Work(self._local, tokens=chunk))
            final = start + len(chunk) == len(prompt_ids)
            self._send(rows, Flag.REPLY_LAST if final else Flag.REPLY_NONE)

    def _send(self, rows: Sequence[Encoded], unless_all: int) -> None:
        for part in rows:
            self._remote.submit(part.first, part.rows, 0 if self._all_rows else unless_all)

    async def _round_trip(self, stop: int, turn: Turn, feeder: asyncio.Task[None]) -> tuple[Encoded, ...]:
        """Take answers up to position `stop` through C as they come; the last one gives the next token and its rows."""
        self.stats.round_trips += 1
        while True:
            answers = await self._answers(feeder)
            final = answers[-1].end == stop
            replies = tuple(answer.rows for answer in answers if answer.rows is not None)
            if final:
                return await self._worker.do(Work(self._local, replies, turn.choose))
            if replies and self._all_rows:
                await self._worker.do(Work(self._local, replies))

    async def _answers(self, feeder: asyncio.Task[None]) -> list[Answer]:
        """Wait for the server; a fault while the prompt is fed ends the wait."""
        take = asyncio.ensure_future(self._remote.take())
        try:
            if not feeder.done():
                await asyncio.wait((take, feeder), return_when=asyncio.FIRST_COMPLETED)
            if feeder.done() and (error := feeder.exception()) is not None:
                raise error
            return await take
        finally:
            take.cancel()

    def _count_bytes(self) -> None:
        self.stats.bytes_up, self.stats.bytes_down = self._remote.bytes_up, self._remote.bytes_down
