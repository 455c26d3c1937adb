"""The closed loop inside one edge process: every client sends its next request when its last answer ended."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator

from edge_client.generate import PREFILL_ROWS, EdgeSession, GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.turn import GenerationParams
from loadtest.records import Footprint, Record
from loadtest.settings import LoadSettings
from loadtest.workload import RequestSpec, Workload
from split_llama.errors import ConnectionRefused, FlLlamaError, ServerUnreachable

BREATH_SECONDS = 0.2
TIMED_OUT = "TimedOut"
INTERRUPTED = "Interrupted"


class Runner:
    """Sends requests over one edge; `started` and `ended` hear of each of them."""

    def __init__(
        self,
        edge: EdgeRuntime,
        workload: Workload,
        settings: LoadSettings,
        process: int,
        started: Callable[[], None],
        ended: Callable[[Record], None],
    ) -> None:
        self._edge = edge
        self._workload = workload
        self._settings = settings
        self._process = process
        self._started = started
        self._ended = ended
        self._begin = time.monotonic()
        self._lost = False

    async def run(self, clients: int, indices: Iterator[int], *, warmup: bool = False) -> None:
        """Let `clients` work through `indices`, until the duration is over (not in warm-up) or the server is lost."""
        self._begin = time.monotonic()
        duration = None if warmup else self._settings.duration
        deadline = self._begin + duration if duration is not None else None
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(indices, deadline, warmup), name=f"client-{number}")

    async def _client(self, indices: Iterator[int], deadline: float | None, warmup: bool) -> None:
        while not self._lost and (deadline is None or time.monotonic() < deadline):
            index = next(indices, None)
            if index is None:
                return
            record = await self._request(self._workload.request(index), warmup)
            # A refusal comes back at once; without a pause a client would repeat it in a busy loop.
            pause = self._settings.think_time if record.answered else max(BREATH_SECONDS, self._settings.think_time)
            if pause:
                await asyncio.sleep(pause)

    async def _request(self, spec: RequestSpec, warmup: bool) -> Record:
        """Make one request and report it; only a cancellation gets out of here, after it was reported too."""
        self._started()
        start_s = time.monotonic() - self._begin
        error: tuple[str, str] | None = (INTERRUPTED, "stopped before the answer was complete")
        session: EdgeSession | None = None
        tokens = 0
        try:
            turn = self._edge.turn(spec.prompt_ids, self._params(spec))
            async with asyncio.timeout(self._settings.request_timeout), self._edge.open() as session:
                async for _ in session.generate(spec.prompt_ids, turn):
                    tokens += 1
            error = None
        except TimeoutError:
            error = (TIMED_OUT, f"no complete answer within {self._settings.request_timeout:g} seconds")
        except FlLlamaError as failure:
            # The edge has tried to reconnect by then, and will not do so again.
            self._lost = self._lost or isinstance(failure, ServerUnreachable | ConnectionRefused)
            error = (type(failure).__name__, failure.message)
        finally:
            record = self._record(spec, warmup, start_s, session, tokens, error)
            self._ended(record)
        return record

    def _params(self, spec: RequestSpec) -> GenerationParams:
        settings = self._settings
        return self._edge.params(
            max_new_tokens=spec.max_new_tokens,
            ignore_eos=not settings.stop_at_eos,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=spec.seed,
        )

    def _record(
        self,
        spec: RequestSpec,
        warmup: bool,
        start_s: float,
        session: EdgeSession | None,
        tokens: int,
        error: tuple[str, str] | None,
    ) -> Record:
        stats = session.stats if session is not None else GenerationStats()
        return Record(
            index=spec.index,
            process=self._process,
            warmup=warmup,
            start_s=round(start_s, 6),
            prompt_tokens=len(spec.prompt_ids),
            output_tokens=tokens,
            ttft_ms=round(stats.ttft_ms, 4),
            itl_ms=[round(value, 4) for value in stats.itl_ms],
            total_ms=round(stats.total_ms, 4),
            round_trips=stats.round_trips,
            error=error[0] if error is not None else None,
            message=error[1] if error is not None else "",
            footprint=None if session is None else footprint(session, len(spec.prompt_ids), answered=error is None),
        )


def footprint(session: EdgeSession, prompt_tokens: int, *, answered: bool) -> Footprint:
    """Count what a closed session was answered, from its replay log: that holds a row once its step is answered.

    The log has rows, not steps; the steps follow from how the edge cuts a prompt: into chunks, at changes of codec, and
    at the most rows a frame may carry. After the prompt each step has one row.
    """
    state = session.remote.state
    length = len(state.log)
    sizes: list[int] = []
    for start in range(0, min(length, prompt_tokens), PREFILL_ROWS):
        stop = min(start + PREFILL_ROWS, prompt_tokens, length)
        for _, rows in state.log.read(start, stop):
            sizes.extend(piece.count for piece in rows.cut(state.rows_per_step(rows.codec)))
    generated = max(0, length - prompt_tokens)
    # A prompt's later step of one row looks like generation, if the server had a moment without work before it.
    either = sizes[1:].count(1)
    return Footprint(
        prompt_rows=sum(sizes) - either,
        decode_rows=generated,
        either_rows=either,
        steps=len(sizes) + generated,
        open_rows=0 if answered else max(1, prompt_tokens - length),
        bytes_up=session.remote.bytes_up,
        bytes_down=session.remote.bytes_down,
    )


def shares(process: int, processes: int, requests: int | None) -> Iterator[int]:
    """Give the numbers of one process's requests: every `processes`-th, without end if `requests` is `None`."""
    return iter(range(process, requests, processes)) if requests is not None else itertools.count(process, processes)
