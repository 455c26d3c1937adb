"""Answers for everybody who asks this gateway: admission, deadline, conversations, and counting."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from edge_client.deadline import deadline
from edge_client.gateway.blocking import Blocking
from edge_client.gateway.errors import no_such_model
from edge_client.gateway.grammar import Grammars
from edge_client.gateway.metrics import GatewayMetrics
from edge_client.gateway.places import Places
from edge_client.gateway.prompts import ChatPrompts, Tools
from edge_client.gateway.settings import GatewaySettings
from edge_client.gateway.vocabulary import Vocabulary
from edge_client.generate import EdgeSession, GenerationStats
from edge_client.model_source import read_geometry
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from edge_client.turn import GenerationParams, TokenEvent, Turn

# Where --request-timeout says nothing: nobody waits that long for an answer, and forgotten ones hold pages.
REQUEST_SECONDS = 600.0

T = TypeVar("T")


class _LeftEarly(Exception):
    """The caller stopped in mid-answer: what the session holds is of no use to the next one."""


class Answer:
    """One answer under way. `events` may be taken once."""

    def __init__(self, session: EdgeSession | None, ids: Sequence[int], turn: Turn, metrics: GatewayMetrics) -> None:
        self.turn = turn
        # Without a session there is nothing to be made: no token was asked for.
        self.stats = session.stats if session is not None else GenerationStats(prompt_tokens=len(ids))
        self.is_complete = False
        # Answers to one prompt share it: the first one's figures have it.
        self.counts_prompt = False
        self._session = session
        self._ids = ids
        self._metrics = metrics
        self._asked = time.perf_counter()

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """Give the tokens as they come. Raises `FlLlamaError`."""
        last = self._asked
        histogram = self._metrics.first_token
        if self._session is not None:
            async with contextlib.aclosing(self._session.generate(self._ids, self.turn)) as events:
                async for event in events:
                    now = time.perf_counter()
                    histogram.observe(now - last)
                    last, histogram = now, self._metrics.inter_token
                    yield event
        self.is_complete = True


class AnswerService:
    """What the gateway's routes and its chat ask for answers; one per process, in one event loop."""

    def __init__(self, edge: EdgeRuntime, settings: EdgeSettings, gateway: GatewaySettings) -> None:
        self.edge = edge
        self.settings = settings
        self.metrics = GatewayMetrics()
        adapter = edge.source.adapter
        self.model = gateway.served_model_name or (adapter.name if adapter else edge.source.card.id)
        self.started = int(time.time())
        folder = edge.source.folder
        self.prompts = ChatPrompts(edge.source, edge.tokenizer)
        self.vocabulary = Vocabulary.open(folder)
        self.grammars = Grammars(folder, read_geometry(folder).vocab_size, edge.defaults.eos_token_ids)
        self.places = Places(gateway.max_concurrent, gateway.max_queued)
        # No more than could be answered may wait to be read.
        self.blocking = Blocking(gateway.max_concurrent + gateway.max_queued)
        self._timeout = settings.request_timeout or REQUEST_SECONDS
        self.metrics.gauge("num_requests_running", "Answers being made", lambda: self.places.running)
        self.metrics.gauge("num_requests_waiting", "Requests waiting for a place", lambda: self.places.waiting)
        self.metrics.gauge("num_conversations", "Sessions kept for a next turn", lambda: len(edge.conversations))

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` when a request names another model than this one."""
        if name is not None and name != self.model:
            raise no_such_model(name, self.model)

    async def prepare(self, work: Callable[[], T]) -> T:
        """Do a request's blocking work, unless it would be refused afterwards.

        Raises `LimitExceeded`, `DeadlineExceeded`, and what `work` raises.
        """
        self.places.check()
        async with deadline(self._timeout):
            return await self.blocking.run(work)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Tools | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Give the ids of a conversation and the header of its answer. Blocking. Raises `UsageError`."""
        return self.prompts.ids(messages, tools, options)

    @contextlib.asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Bound a request that may ask for several answers: refused when too many wait, ended at its deadline.

        Raises `LimitExceeded`, `DeadlineExceeded`.
        """
        self.places.check()
        async with deadline(self._timeout):
            yield

    @contextlib.asynccontextmanager
    async def answer(self, ids: Sequence[int], params: GenerationParams, *, owner: str = "") -> AsyncIterator[Answer]:
        """Make one answer as a request of its own. Raises as `request` does, and `UsageError` for the prompt."""
        async with self.request(), self.answers(ids, [params], owner=owner) as answers:
            yield answers[0]

    @contextlib.asynccontextmanager
    async def answers(
        self, ids: Sequence[int], params: Sequence[GenerationParams], *, owner: str = ""
    ) -> AsyncIterator[list[Answer]]:
        """Make several answers to one prompt inside a `request`; only a single one's params may score the prompt.

        They go on from what `owner` has parked, and from nobody else's.
        """
        turns = [self.edge.turn(ids, each) for each in params]
        if all(turn.finish_reason is not None for turn in turns):
            yield [Answer(None, ids, turn, self.metrics) for turn in turns]
            return
        begun: list[Answer] = []
        ended = "refused"
        try:
            async with self.places.take(len(turns)), self._sessions(ids, turns, owner) as sessions:
                pairs = zip(sessions, turns, strict=True)
                begun += [Answer(session, ids, turn, self.metrics) for session, turn in pairs]
                begun[0].counts_prompt = True
                ended = "failed"
                yield begun
                if not all(answer.is_complete for answer in begun):
                    raise _LeftEarly
                ended = "complete"
        except _LeftEarly:
            ended = "cancelled"
        except (asyncio.CancelledError, GeneratorExit):
            ended = "cancelled"
            raise
        finally:
            for answer in begun:
                reason = answer.turn.finish_reason if answer.is_complete else None
                self.metrics.count(answer.stats, len(answer.turn.tokens), reason or ended)
                if answer.counts_prompt:
                    self.metrics.count_prompt(answer.stats)

    @contextlib.asynccontextmanager
    async def _sessions(
        self, ids: Sequence[int], turns: Sequence[Turn], owner: str
    ) -> AsyncIterator[list[EdgeSession]]:
        conversations = self.edge.conversations
        if len(turns) > 1:
            assert not any(turn.wants_prompt_logits for turn in turns), "a prompt is scored by one answer alone"
            async with conversations.branches(ids, len(turns), owner=owner) as sessions:
                yield sessions
        else:
            async with conversations.session(ids, fresh=turns[0].wants_prompt_logits, owner=owner) as session:
                yield [session]
