"""The model split in two: this process has A and C, a server has B, and rows pass between them with noise and codec."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from edge_client.api.answers import run_all
from edge_client.api.hidden import trace
from edge_client.generate import EdgeSession
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from training.attacks.measure import Intercepted
from training.evaluate.backend import Progress
from training.evaluate.feeds import Feeds, Likelihood
from training.tasks.examples import Sample

T = TypeVar("T")


class Places:
    """So many sessions at once. Whoever needs several takes them together, so that two never wait for each other."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = asyncio.Semaphore(count)
        self._taking = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[None]:
        """Wait for `count` places, at most all of them."""
        assert 1 <= count <= self.count
        taken = 0
        try:
            async with self._taking:
                while taken < count:
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()


class SplitModel:
    """A connected edge that works on `sessions` sequences at once."""

    def __init__(self, edge: EdgeRuntime, sessions: int) -> None:
        self.edge = edge
        self._places = Places(sessions)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, settings: EdgeSettings, sessions: int, notify: Callable[[str], None] = lambda line: None
    ) -> AsyncIterator[SplitModel]:
        """Connect for a block. Raises `FlLlamaError`."""
        # One alternative and the prompt it is forked from need two.
        sessions = max(2, sessions)
        async with EdgeRuntime.connect(settings, max_sessions=sessions, notify=notify) as edge:
            yield cls(edge, sessions)

    async def likelihoods(self, groups: Sequence[Sequence[Sample]], progress: Progress) -> list[list[float]]:
        """Give each sample's log-probability."""
        return await _counted((self._group(group) for group in groups), progress)

    async def continuations(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, progress: Progress
    ) -> list[list[int]]:
        """Give each prompt's greedy continuation."""
        return await _counted((self._continue(prompt, max_new_tokens) for prompt in prompts), progress)

    async def intercept(self, texts: Sequence[Sequence[int]]) -> list[Intercepted]:
        """Give for each text the rows that the server is sent: the same that it was sent for it before, by prefix."""

        async def one(ids: Sequence[int]) -> Intercepted:
            async with self._places.take(1):
                return Intercepted(tuple(ids), (await trace(self.edge, ids)).sent)

        return await _counted((one(ids) for ids in texts), lambda done: None)

    async def _continue(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        # The checkpoint's own sampling settings have no say: greedy is greedy.
        params = self.edge.params(max_new_tokens=max_new_tokens, temperature=0.0, repetition_penalty=1.0)
        turn = self.edge.turn(prompt, params)
        async with self._places.take(1), self.edge.open() as session:
            async for _ in session.generate(prompt, turn):
                pass
        return [token for token in turn.tokens if token not in params.eos_token_ids]

    async def _group(self, samples: Sequence[Sample]) -> list[float]:
        plan = Feeds.of(samples)
        scores = [Likelihood(plan.wants(samples, feed)) for feed in range(len(plan.sequences))]
        todo = list(zip(plan.sequences, scores, strict=True))
        if len(todo) == 1:
            async with self._places.take(1), self.edge.open() as session:
                await _feed(session, *todo[0])
        else:
            most = self._places.count - 1
            for start in range(0, len(todo), most):
                await self._branch(todo[start : start + most], plan.sequences[0][: plan.trunk])
        totals = [iter(score.totals) for score in scores]
        return [next(totals[feed]) for feed in plan.feed_of]

    async def _branch(self, todo: Sequence[tuple[Sequence[int], Likelihood]], trunk: Sequence[int]) -> None:
        """Compute the common beginning once, and each alternative behind it in a fork."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._places.take(len(todo) + 1))
            # Without a common first token there is nothing to fork.
            if trunk:
                branches = self.edge.conversations.branches(list(trunk), len(todo))
                sessions = await stack.enter_async_context(branches)
            else:
                sessions = [await stack.enter_async_context(self.edge.open()) for _ in todo]
            await run_all(_feed(session, *each) for session, each in zip(sessions, todo, strict=True))


async def _feed(session: EdgeSession, ids: Sequence[int], likelihood: Likelihood) -> None:
    def see(first: int, logits: Tensor, _states: Tensor) -> None:
        likelihood.see(first, logits)

    await session.prefill(ids, see)


async def _counted(coroutines: Iterable[Coroutine[Any, Any, T]], progress: Progress) -> list[T]:
    """Run all at once and say how many are done; the first fault ends the others."""
    done = 0

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        nonlocal done
        result = await coroutine
        done += 1
        progress(done)
        return result

    return await run_all(one(each) for each in coroutines)
