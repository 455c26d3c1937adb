"""Conversations: what is cached, forked, closed and left alone, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge_client.conversations import LEAST_SHARED, Conversations
from edge_client.generate import EdgeSession
from edge_client.runtime import EdgeRuntime
from edge_client.speculation.fixed_pace import FixedPace
from split_llama.errors import ServerUnreachable
from tests.conftest import TinyCheckpoint
from tests.edge_client.conftest import MakeSettings, ServeModel, ServerProcess

PROMPT = [1, *range(20, 60)]


async def say(edge: EdgeRuntime, ids: Sequence[int], count: int = 10) -> tuple[list[int], EdgeSession]:
    turn = edge.turn(ids, edge.params(max_new_tokens=count, ignore_eos=True))
    async with edge.conversations.session(ids) as session:
        async for _ in session.generate(ids, turn):
            pass
    return turn.tokens, session


async def fresh(edge: EdgeRuntime, ids: Sequence[int], count: int = 10) -> list[int]:
    turn = edge.turn(ids, edge.params(max_new_tokens=count, ignore_eos=True))
    async with edge.open() as session:
        async for _ in session.generate(ids, turn):
            pass
    return turn.tokens


async def gauge(url: str, name: str) -> float:
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"{url}/metrics")).text
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples if s.name == f"fl_llama_{name}"]
    return sum(sample.value for sample in samples)


@pytest.fixture
async def edge(
    tiny_checkpoint: TinyCheckpoint, serve_model: ServeModel, edge_settings: MakeSettings
) -> AsyncIterator[EdgeRuntime]:
    async with (
        serve_model(tiny_checkpoint(max_positions=512)) as url,
        EdgeRuntime.connect(edge_settings(url), max_sessions=4) as runtime,
    ):
        runtime.url = url  # type: ignore[attr-defined]
        yield runtime


async def test_a_turn_sends_only_its_new_tokens(edge: EdgeRuntime) -> None:
    first, session = await say(edge, PROMPT)
    assert session.stats.cached_tokens == 0
    following = [*PROMPT, *first, 7, 8, 9]
    second, session = await say(edge, following)
    # The answer's last token was sampled and never fed.
    assert session.stats.cached_tokens == len(PROMPT) + len(first) - 1
    assert session.stats.rows_up == 4 + len(second) - 1
    assert len(edge.conversations) == 1
    assert second == await fresh(edge, following)


async def test_another_answer_to_the_same_question_forks(edge: EdgeRuntime) -> None:
    first, _ = await say(edge, PROMPT)
    other = [*PROMPT[:30], 5, 6, 7]
    second, session = await say(edge, other)
    assert session.stats.cached_tokens == 30
    assert len(edge.conversations) == 2
    third, session = await say(edge, [*PROMPT, *first, 9])
    assert session.stats.cached_tokens == len(PROMPT) + len(first) - 1
    assert second == await fresh(edge, other)
    assert third == await fresh(edge, [*PROMPT, *first, 9])


async def test_two_tabs_on_one_conversation(edge: EdgeRuntime) -> None:
    first, _ = await say(edge, PROMPT)
    prompts = [[*PROMPT, *first, tab] for tab in (7, 8, 9)]
    answers = await asyncio.gather(*(say(edge, ids, 30) for ids in prompts))
    assert {session.stats.cached_tokens for _, session in answers} == {len(PROMPT) + len(first) - 1}
    for ids, (tokens, _) in zip(prompts, answers, strict=True):
        assert tokens == await fresh(edge, ids, 30)


async def test_leaving_an_answer_frees_its_pages_and_keeps_the_conversation(edge: EdgeRuntime) -> None:
    url = edge.url  # type: ignore[attr-defined]
    first, _ = await say(edge, PROMPT)
    before = await gauge(url, "kv_cache_usage_ratio")
    assert before > 0
    longer = [*PROMPT, *first, *range(60, 200)]
    turn = edge.turn(longer, edge.params(max_new_tokens=200, ignore_eos=True))
    with contextlib.suppress(KeyError):
        async with edge.conversations.session(longer) as session:
            async for _ in session.generate(longer, turn):
                if len(turn.tokens) > 20:
                    assert await gauge(url, "kv_cache_usage_ratio") > before
                    raise KeyError("the reader leaves")
    for _ in range(100):
        if await gauge(url, "kv_cache_usage_ratio") == before:
            break
        await asyncio.sleep(0.01)
    assert await gauge(url, "kv_cache_usage_ratio") == before
    _, session = await say(edge, longer)
    assert session.stats.cached_tokens == len(PROMPT) + len(first) - 1
    await edge.conversations.clear()
    assert await gauge(url, "kv_cache_usage_ratio") == 0


async def test_a_cancelled_task_leaves_nothing_behind(edge: EdgeRuntime) -> None:
    url = edge.url  # type: ignore[attr-defined]
    task = asyncio.create_task(say(edge, PROMPT, 400))
    await asyncio.sleep(0.2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await edge.conversations.clear()
    assert len(edge.conversations) == 0
    assert await gauge(url, "kv_cache_usage_ratio") == 0


async def test_leaving_while_a_fork_is_made_leaves_nothing(edge: EdgeRuntime) -> None:
    url = edge.url  # type: ignore[attr-defined]
    first, _ = await say(edge, PROMPT)
    pages, gate = edge.model._a.pool.num_used, threading.Event()  # type: ignore[union-attr]
    edge.worker.call(gate.wait)
    task = asyncio.create_task(say(edge, [*PROMPT, *first, 7]))
    await asyncio.sleep(0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    gate.set()
    await edge.worker.ask(lambda: None)
    await asyncio.sleep(0.05)
    await edge.worker.ask(lambda: None)
    assert edge.model._a.pool.num_used == pages  # type: ignore[union-attr]
    await edge.conversations.clear()
    assert await gauge(url, "kv_cache_usage_ratio") == 0
    assert await gauge(url, "sessions") == 0


async def test_the_same_prompt_again_in_branches(edge: EdgeRuntime) -> None:
    url = edge.url  # type: ignore[attr-defined]
    first, _ = await say(edge, PROMPT)
    ids = [*PROMPT, *first]
    for _ in range(2):
        before = await gauge(url, "prompt_tokens_total")
        async with edge.conversations.branches(ids, 3) as sessions:
            turn = edge.turn(ids, edge.params(max_new_tokens=5, ignore_eos=True))
            async for _event in sessions[2].generate(ids, turn):
                pass
        assert turn.tokens == await fresh(edge, ids, 5)
        assert await gauge(url, "prompt_tokens_total") - before <= len(ids) + 4


async def test_a_faulty_drafter_or_sampler_hurts_nobody_else(edge: EdgeRuntime) -> None:
    class Broken:
        def propose(self, requests: Sequence[Any]) -> list[Any]:
            raise KeyError("a user's own")

    expected = await fresh(edge, PROMPT, 30)
    edge.model.drafter = Broken()
    edge._next_pace = lambda _before: FixedPace(4)

    async def bad() -> None:
        params = edge.params(max_new_tokens=30, temperature=1.0, repetition_penalty=1e-38)
        turn = edge.turn(PROMPT, params)
        async with edge.conversations.session(PROMPT) as session:
            async for _ in session.generate(PROMPT, turn):
                pass

    answers = await asyncio.gather(fresh(edge, PROMPT, 30), bad(), fresh(edge, PROMPT, 30), return_exceptions=True)
    assert answers[0] == answers[2] == expected
    assert edge.error is None


async def test_branches_compute_the_prompt_once(edge: EdgeRuntime) -> None:
    url = edge.url  # type: ignore[attr-defined]
    before = await gauge(url, "prompt_tokens_total")
    params = edge.params(max_new_tokens=12, ignore_eos=True, temperature=1.0)

    async def branch(session: EdgeSession) -> list[int]:
        turn = edge.turn(PROMPT, params)
        async for _ in session.generate(PROMPT, turn):
            pass
        return turn.tokens

    async with edge.conversations.branches(PROMPT, 3) as sessions:
        assert [session.stats.cached_tokens for session in sessions] == [0] + [len(PROMPT) - 1] * 2
        assert sessions[0].stats.rows_up == len(PROMPT) - 1
        assert sessions[0].stats.bytes_up > 1000 > sessions[1].stats.bytes_up
        answers = await asyncio.gather(*map(branch, sessions))
    assert len({tuple(answer) for answer in answers}) > 1
    assert await gauge(url, "prompt_tokens_total") - before < 2 * len(PROMPT)
    await edge.conversations.clear()
    assert await gauge(url, "kv_cache_usage_ratio") == 0


async def test_parked_conversations_leave_room_for_new_ones(edge: EdgeRuntime) -> None:
    for question in range(12):
        ids = [1, *([20 + question] * 400)]
        answers = await asyncio.gather(*(say(edge, [*ids, tab], 60) for tab in range(4)))
        assert all(len(tokens) == 60 for tokens, _ in answers)
    assert len(edge.conversations) > 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_a_conversation_survives_its_server(
    tiny_checkpoint: TinyCheckpoint, edge_settings: MakeSettings, family: str
) -> None:
    server = ServerProcess(tiny_checkpoint(family=family, max_positions=512))
    try:
        server.start()
        async with EdgeRuntime.connect(edge_settings(server.url), max_sessions=4) as edge:
            first, _ = await say(edge, PROMPT)
            server.kill()
            server.start()
            following = [*PROMPT, *first, 7, 8, 9]
            second, session = await say(edge, following)
            assert session.stats.cached_tokens == len(PROMPT) + len(first) - 1
            assert second == await fresh(edge, following)
    finally:
        server.kill()


async def test_a_server_that_comes_back_late_is_used_again(
    tiny_checkpoint: TinyCheckpoint, edge_settings: MakeSettings
) -> None:
    server = ServerProcess(tiny_checkpoint(max_positions=512))
    try:
        server.start()
        async with EdgeRuntime.connect(edge_settings(server.url, reconnect_seconds=0.5), max_sessions=4) as edge:
            first, _ = await say(edge, PROMPT)
            server.kill()
            with pytest.raises(ServerUnreachable) as lost:
                await say(edge, [*PROMPT, *first, 7])
            assert lost.value.retry_after_ms > 0
            assert edge.error is not None
            server.start()
            async with asyncio.timeout(20):
                while edge.error is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            second, _ = await say(edge, [*PROMPT, *first, 7])
            assert second == await fresh(edge, [*PROMPT, *first, 7])
    finally:
        server.kill()


async def test_parked_sessions_make_room_on_the_server(
    tiny_checkpoint: TinyCheckpoint, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    async with (
        serve_model(tiny_checkpoint(max_positions=512), max_sessions=3) as url,
        EdgeRuntime.connect(edge_settings(url), max_sessions=8) as edge,
    ):
        for question in range(5):
            tokens, _ = await say(edge, [1, *([20 + question] * 40)])
            assert len(tokens) == 10
        assert len(edge.conversations) <= 3


class Room:
    """Sessions that are nothing but their tokens."""

    def __init__(self, sessions: int, tokens: int) -> None:
        self.closed: list[Any] = []
        self.owner = ""
        self.pool = Conversations(self._open, self._fork, self._close, most_sessions=sessions, most_tokens=tokens)

    async def _open(self) -> Any:
        return SimpleNamespace(tokens=[], remote=SimpleNamespace(error=None))

    async def _fork(self, parent: Any, at: int) -> Any:
        return SimpleNamespace(tokens=parent.tokens[:at], remote=SimpleNamespace(error=None))

    async def _close(self, session: Any) -> None:
        self.closed.append(session)

    async def park(self, *tokens: int) -> Any:
        async with self.pool.session([*tokens, 0], owner=self.owner) as session:
            cached = len(session.tokens)
            session.tokens = list(tokens)
        await asyncio.sleep(0)
        return cached


async def test_those_unused_longest_go_first() -> None:
    room = Room(sessions=2, tokens=100)
    a, b, c = (range(start, start + 20) for start in (0, 100, 200))
    await room.park(*a)
    await room.park(*b)
    assert await room.park(*a, 999) == 20
    await room.park(*c)
    assert len(room.pool) == 2
    assert await room.park(*b) == 0
    room = Room(sessions=9, tokens=50)
    for start in (0, 100, 200):
        await room.park(*range(start, start + 20))
    assert len(room.pool) == 2


async def test_owners_find_only_their_own() -> None:
    room = Room(sessions=9, tokens=1000)
    room.owner = "alice"
    await room.park(*range(20))
    assert await room.park(*range(20), 21) == 20
    room.owner = "bob"
    assert await room.park(*range(20), 21) == 0
    assert len(room.pool) == 2


async def test_little_in_common_or_a_broken_session_is_no_parent() -> None:
    room = Room(sessions=9, tokens=1000)
    await room.park(*range(20))
    assert await room.park(*range(LEAST_SHARED - 1), *range(500, 520)) == 0
    assert await room.park(*range(LEAST_SHARED), *range(600, 620)) == LEAST_SHARED
    for parked in room.pool._parked:
        parked.session.remote.error = KeyError()  # type: ignore[misc,assignment]
    assert await room.park(*range(20), 21) == 0
    assert len(room.pool) == 1


async def test_chats_are_kept_only_where_that_was_asked_for(
    tiny_checkpoint: TinyCheckpoint, serve_model: ServeModel, edge_settings: MakeSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    async with serve_model(tiny_checkpoint()) as url:
        async with EdgeRuntime.connect(edge_settings(url)) as edge:
            await say(edge, PROMPT)
        assert not (tmp_path / "state" / "transcripts").exists()
        async with EdgeRuntime.connect(edge_settings(url, learn_from_chats=True), notify=said.append) as edge:
            answer, _ = await say(edge, PROMPT)
            store = edge._learner._store  # type: ignore[union-attr]
    assert store.read() == [[*PROMPT, *answer]]
    assert any("stay on this machine" in line for line in said)
