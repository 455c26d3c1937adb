"""The answers of a batch: all at once over one connection, as far as there are places."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_client.api.batch import Batch
from edge_client.api.options import GenerateOptions
from edge_client.api.outputs import LogitsRecorder
from edge_client.deadline import deadline
from edge_client.generate import GenerationStats
from edge_client.runtime import EdgeRuntime
from edge_client.turn import FinishReason, GenerationParams, TokenEvent, Turn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One finished answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: GenerationStats
    recorder: LogitsRecorder | None


class Answers:
    """Makes answers on the edge's conversations, so that a prompt that continues an earlier one sends what is new."""

    def __init__(self, edge: EdgeRuntime, most: int, timeout: float | None) -> None:
        self._edge = edge
        self._timeout = timeout
        self.places = asyncio.Semaphore(most)

    async def generate(self, batch: Batch, options: GenerateOptions, show: Callable[[TokenEvent], None]) -> list[Row]:
        """Answer each row `options.sequences` times, in order. Raises `FlLlamaError`."""
        async with deadline(self._timeout):
            if options.sequences > 1:
                await run_all(self._compute(row) for row in batch.rows)
            prompts = [row for row in batch.rows for _ in range(options.sequences)]
            return await run_all(self._make(prompt, options, at, show) for at, prompt in enumerate(prompts))

    async def _compute(self, ids: tuple[int, ...]) -> None:
        """Have a prompt computed once for all the answers that are to follow it."""
        if len(ids) > 1:
            async with self.places, self._edge.conversations.session(ids) as session:
                if len(session.tokens) < len(ids) - 1:
                    await session.prefill(ids[:-1])

    async def _make(
        self, ids: tuple[int, ...], options: GenerateOptions, at: int, show: Callable[[TokenEvent], None]
    ) -> Row:
        recorder = LogitsRecorder() if options.scores or options.logits else None
        turn = self._turn(ids, options, at, recorder)
        async with (
            self.places,
            self._edge.conversations.session(ids) as session,
            contextlib.aclosing(session.generate(ids, turn)) as events,
        ):
            async for event in events:
                show(event)
        return Row(ids, tuple(turn.tokens), turn.finish_reason, session.stats, recorder)

    def _turn(self, ids: tuple[int, ...], options: GenerateOptions, at: int, recorder: LogitsRecorder | None) -> Turn:
        sampling = options.sampling
        if sampling.seed is not None:
            # Rows with one seed would all draw the same numbers.
            sampling = dataclasses.replace(sampling, seed=sampling.seed + at)
        params = GenerationParams(
            max_new_tokens=options.max_new_tokens, sampling=sampling, stop=options.stop, eos_token_ids=options.eos
        )
        if recorder is not None:
            params = dataclasses.replace(params, constraint=lambda: recorder)
        return self._edge.turn(ids, params)


async def run_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once; the first fault ends the others."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
