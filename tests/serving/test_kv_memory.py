"""More sessions than pages, over a connection: host memory, waiting for room, and passes that run out of memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from raw_edge import Floats, RawSession

from serving import memory
from split_llama.errors import OutOfPages, ServerFault
from split_llama.wire.control import Fork, error_from_frame
from split_llama.wire.frame import Flag, Frame, Kind

BLOCKS = (1, 5)
SWAP = {"swap_space": 0.001}
TIGHT = {"max_model_len": 64, "max_num_seqs": 1}
Whole = Callable[..., Floats]


async def opened(place: Any, owner: str = "alice") -> RawSession:
    session: RawSession = await (await place.connect(owner)).open(1, BLOCKS)
    return session


def figure(place: Any, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(place.core.metrics.render().decode())
    found = [
        s for f in families for s in f.samples if s.name == f"fl_llama_{name}" and labels.items() <= s.labels.items()
    ]
    assert found, f"no metric {name}"
    return sum(sample.value for sample in found)


async def in_turns(place: Any, clock: Any, states: Floats) -> list[Floats]:
    """Two sessions by turns, each idle for long while the other one works."""
    replies = []
    left, right = await opened(place), await opened(place, "bob")
    for first, end in [(0, 40), (40, 41), (41, 60)]:
        for session, sign in ((left, 1), (right, -1)):
            replies.append(await session.run(first, sign * states[first:end]))
            clock.now += 31
    await left.close()
    await right.close()
    return replies


async def test_host_memory_and_back_changes_no_bit_and_the_client_sees_nothing(
    make_place: Any, clock: Any, states: Floats
) -> None:
    roomy = await make_place(max_model_len=64, max_num_seqs=4, clock=clock)
    tight = await make_place(**TIGHT, **SWAP, clock=clock)
    want, got = [await in_turns(place, clock, states) for place in (roomy, tight)]
    for one, other in zip(want, got, strict=True):
        assert np.array_equal(one, other)
    assert figure(roomy, "swap_ins_total") == 0
    assert figure(tight, "swap_ins_total") == 4
    assert figure(tight, "evictions_total", kind="swapped") == 5
    assert figure(tight, "evictions_total", kind="dropped") == 0
    tight.check_pages()
    assert figure(tight, "kv_swap_used_bytes") == 0


async def test_memory_is_reported(make_place: Any, clock: Any, states: Floats) -> None:
    place = await make_place(**TIGHT, **SWAP, clock=clock, kv_cache_dtype="int8")
    page = figure(place, "kv_cache_page_bytes")
    cache = place.hosted.engine.cache
    stored = sum(tensor.nbytes for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale))
    assert (figure(place, "kv_cache_pages"), figure(place, "kv_cache_bytes")) == (4, stored)
    assert stored == 4 * page
    assert figure(place, "kv_swap_bytes") == 2**30 // 1000 // page * page
    first, second = await opened(place), await opened(place, "bob")
    await first.run(0, states[:40])
    assert figure(place, "kv_cache_used_pages") == 3
    clock.now += 31
    await second.run(0, states[:60])
    assert figure(place, "kv_cache_usage_ratio") == 1
    assert figure(place, "kv_swap_used_bytes") == 3 * page
    await first.close()
    await second.close()
    assert (figure(place, "kv_cache_used_pages"), figure(place, "kv_swap_used_bytes")) == (0, 0)


async def test_a_pending_draft_survives_host_memory(make_place: Any, clock: Any, states: Floats, whole: Whole) -> None:
    place = await make_place(**TIGHT, **SWAP, clock=clock)
    drafting, other = await opened(place), await opened(place, "bob")
    await drafting.run(0, states[:30])
    await drafting.run(30, states[30:33], flags=Flag.DRAFT, tree=(1, 3, 5))
    clock.now += 31
    await other.run(0, states[:60])
    assert figure(place, "evictions_total", kind="swapped") == 1
    clock.now += 31
    got = await drafting.run(32, states[33:35], accept=(0, 2))
    rows = np.concatenate([states[:31], states[32:35]])
    np.testing.assert_allclose(got, whole(rows)[32:], rtol=1e-4, atol=1e-4)
    place.check_pages()


async def test_a_session_in_host_memory_can_be_forked(
    make_place: Any, clock: Any, states: Floats, whole: Whole
) -> None:
    place = await make_place(**TIGHT, **SWAP, clock=clock)
    parent, other = await opened(place), await opened(place, "bob")
    await parent.run(0, states[:30])
    clock.now += 31
    await other.run(0, states[:60])
    clock.now += 31
    child = RawSession(parent.edge, 2, BLOCKS)
    payload = Fork(parent=1, at=20, session=child.payload.session, secret=child.payload.secret)
    await parent.edge.send(Frame(Kind.FORK, handle=2, payload=payload.to_bytes()))
    await parent.edge.expect(Kind.FORK, 2)
    got = await child.run(20, states[40:50])
    np.testing.assert_allclose(got, whole(np.concatenate([states[:20], states[40:50]]))[20:], rtol=1e-4, atol=1e-4)
    # The last page is promised to the child until it is not heard of for a while.
    clock.now += 6
    np.testing.assert_allclose(await parent.run(30, states[30:33]), whole(states[:33])[30:], rtol=1e-4, atol=1e-4)
    place.check_pages()


async def test_a_full_host_memory_loses_who_was_there_longest(make_place: Any, clock: Any, states: Floats) -> None:
    roomy = await make_place(max_model_len=64, max_num_seqs=4, clock=clock)
    page = roomy.hosted.pages.page_bytes
    place = await make_place(**TIGHT, swap_space=5.5 * page / 2**30, clock=clock)
    sessions = [await opened(place, owner) for owner in ("alice", "bob", "carol")]
    for session in sessions:
        await session.run(0, states[:40])
        clock.now += 31
    assert place.hosted.pages.swap_pages == 5
    assert [figure(place, "evictions_total", kind=kind) for kind in ("swapped", "dropped")] == [2, 1]
    await sessions[1].run(40, states[40:41])
    lost = sessions[0]
    await lost.edge.send(lost.step(40, states[40:41]))
    assert (await lost.edge.expect(Kind.RESYNC, 1)).first == 0
    place.check_pages()


async def test_a_prompt_waits_for_room_and_others_pass_it_by(
    make_place: Any, clock: Any, states: Floats, whole: Whole
) -> None:
    place = await make_place(max_model_len=128, max_num_seqs=1, clock=clock)
    assert place.hosted.engine.pool.num_pages == 8
    holding, writing, late = [await opened(place, owner) for owner in ("alice", "bob", "carol")]
    await holding.run(0, states[:33])
    clock.now += 6
    await writing.run(0, states[:17])
    # Three and two of eight pages are held, and the other three are promised to the second of them.
    await late.edge.send(late.step(0, states[:10]))
    for at in range(17, 80):
        got = await writing.run(at, states[at : at + 1])
        np.testing.assert_allclose(got, whole(states[: at + 1])[at:], rtol=1e-4, atol=1e-4)
        clock.now += 0.1
    assert not late.edge.inbox
    assert figure(place, "num_requests_waiting") == 1
    assert figure(place, "kv_cache_used_pages") == 8
    await holding.close()
    np.testing.assert_allclose(await late.reply(), whole(states[:10]), rtol=1e-4, atol=1e-4)
    place.check_pages()


@pytest.mark.parametrize("swap", [0.0, 0.001])
async def test_many_sessions_on_few_pages_all_finish(
    make_place: Any, states: Floats, whole: Whole, swap: float
) -> None:
    """Six sessions of eight pages each share ten pages and pause now and then.

    Without host memory they have to send again what they lost.
    """
    place = await make_place(max_model_len=160, max_num_seqs=1, evict_seconds=0.1, swap_space=swap)
    assert place.hosted.engine.pool.num_pages == 10

    async def one(number: int) -> None:
        session, rows = await opened(place, f"owner {number}"), np.roll(states, number, axis=0)[:120]
        want, at, replayed = whole(rows), 0, 0
        while at < len(rows):
            end = 20 if at == 0 else at + 1
            if at % 40 == number:
                await asyncio.sleep(0.2)
            frames = [
                session.step(first, rows[first : min(first + 50, at)], flags=Flag.REPLY_NONE)
                for first in range(replayed, at, 50)
            ]
            await session.edge.send(*frames, session.step(at, rows[at:end]))
            for _ in range(len(frames) + 1):
                frame = await session.edge.next()
                if frame.kind is not Kind.REPLY:
                    break
                session.ack = frame.seq
            if frame.kind is Kind.REPLY:
                np.testing.assert_allclose(session.rows(frame), want[at:end], rtol=1e-3, atol=1e-3)
                at = replayed = end
            elif frame.kind is Kind.ERROR:
                # It waited for too long; the same again.
                error = error_from_frame(frame)
                assert isinstance(error, OutOfPages)
                await asyncio.sleep(error.retry_after_ms / 1000)
                session.seq = frame.seq - 1
            else:
                assert frame.kind is Kind.RESYNC
                assert not swap
                session.seq = session.ack = frame.seq
                await session.edge.send(Frame(Kind.RESYNC, handle=1, seq=frame.seq, first=0))
                replayed = 0
        await session.close()

    async with asyncio.timeout(60):
        await asyncio.gather(*(one(number) for number in range(6)))
    place.check_pages()
    assert place.hosted.engine.pool.num_used == place.hosted.engine.pool.num_swapped == 0
    assert figure(place, "evictions_total", kind="swapped" if swap else "dropped") > 2


def failing_once(place: Any, error: Exception, *, after_edits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next pass fail, before or after its cache edits."""
    engine, left = place.hosted.engine, [error]
    owner, name = (engine.segment, "forward") if after_edits else (engine.executor, "run")
    real = getattr(owner, name)

    def run(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments)

    monkeypatch.setattr(owner, name, run)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("after_edits", [False, True])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
async def test_a_pass_without_memory_loses_its_own_sessions_only(
    make_place: Any,
    clock: Any,
    states: Floats,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    after_edits: bool,
) -> None:
    emptied = []
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "empty_cache", lambda: emptied.append(1))
    place = await make_place(**TIGHT, **SWAP, clock=clock)
    idle, unlucky = await opened(place), await opened(place, "bob")
    await idle.run(0, states[:40])
    clock.now += 31
    failing_once(place, error, after_edits=after_edits, monkeypatch=monkeypatch)
    # This pass sends the idle session's pages to host memory, and then fails.
    await unlucky.edge.send(unlucky.step(0, states[:40]))
    assert isinstance(await unlucky.edge.error(1, seq=1), ServerFault)
    assert (await unlucky.edge.expect(Kind.RESYNC, 1)).seq == 0
    assert emptied
    assert figure(place, "out_of_memory_total") == 1
    assert place.core.is_healthy
    np.testing.assert_allclose(await idle.run(40, states[40:43]), whole(states[:43])[40:], rtol=1e-4, atol=1e-4)
    clock.now += 31
    await unlucky.edge.send(Frame(Kind.RESYNC, handle=1, seq=0, first=0))
    unlucky.seq = 0
    np.testing.assert_allclose(await unlucky.run(0, states[:40]), whole(states[:40]), rtol=1e-4, atol=1e-4)
    place.check_pages()


async def test_who_could_not_be_copied_out_is_lost_and_not_given_garbage(
    make_place: Any, clock: Any, states: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = await make_place(**TIGHT, **SWAP, clock=clock)
    idle, busy = await opened(place), await opened(place, "bob")
    await idle.run(0, states[:40])
    clock.now += 31

    def failing(*_: Any) -> None:
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patched:
        patched.setattr(place.hosted.engine.cache._swap, "_copy", failing)
        await busy.edge.send(busy.step(0, states[:40]))
        assert isinstance(await busy.edge.error(1, seq=1), ServerFault)
    await idle.edge.send(idle.step(40, states[40:41]))
    assert (await idle.edge.expect(Kind.RESYNC, 1)).first == 0
    place.check_pages()
    assert place.hosted.engine.pool.num_swapped == 0
