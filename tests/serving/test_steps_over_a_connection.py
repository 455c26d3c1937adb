"""Steps through a real engine: every way to a prefix gives the outputs of a fresh session fed that prefix."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from raw_edge import Floats

from split_llama.wire.codec import Codec
from split_llama.wire.frame import Flag, Frame, Kind

BLOCKS = (1, 5)
Whole = Callable[..., Floats]


def same(got: Floats, expected: Floats) -> None:
    # Batches of other shapes sum in another order; nothing else may differ.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


async def test_prefill_in_chunks_then_decode(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    chunks = [(0, 7), (7, 20), (20, 64), (64, 70)]
    await session.edge.send(*(session.step(a, states[a:b]) for a, b in chunks))
    got = [await session.reply() for _ in chunks]
    for position in range(70, 80):
        got.append(await session.run(position, states[position : position + 1]))
    same(np.concatenate(got), whole(states[:80]))
    place.check_pages()


async def test_other_blocks_share_a_pass(place: Any, states: Floats, whole: Whole) -> None:
    edge = await place.connect()
    ranges = [(1, 5), (2, 4), (1, 3), (4, 5)]
    sessions = [await edge.open(i + 1, blocks) for i, blocks in enumerate(ranges)]
    await edge.send(*(session.step(0, states[:9]) for session in sessions))
    replies = {frame.handle: frame for frame in [await edge.expect(Kind.REPLY) for _ in sessions]}
    for session in sessions:
        same(session.rows(replies[session.handle]), whole(states[:9], session.blocks))


async def test_reply_flags_and_codecs(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    expected = whole(states[:40])
    await session.edge.send(session.step(0, states[:10], flags=Flag.REPLY_NONE))
    silent = await session.edge.expect(Kind.REPLY, 1)
    assert (silent.seq, silent.count, silent.first, len(silent.payload)) == (1, 0, 0, 0)
    session.ack = 1
    await session.edge.send(session.step(10, states[10:20], flags=Flag.REPLY_LAST))
    last = await session.edge.expect(Kind.REPLY, 1)
    assert (last.count, last.first) == (1, 19)
    same(session.rows(last), expected[19:20])
    session.ack = 2
    scale = np.abs(expected).max()
    for first, codec, tolerance in ((20, Codec.FP16, 5e-3), (25, Codec.BF16, 4e-2), (30, Codec.INT8, 4e-2)):
        got = await session.run(first, states[first : first + 5], codec=codec)
        assert np.abs(got - expected[first : first + 5]).max() < tolerance * scale


async def test_rollback(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:40])
    other = states[100:120]
    got = await session.run(17, other)
    same(got, whole(np.concatenate([states[:17], other]))[17:])
    got = await session.run(0, other[:3])
    same(got, whole(other[:3]))
    place.check_pages()


async def test_draft_chain_keeps_what_first_says(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:10])
    got = await session.run(10, states[10:16], flags=Flag.DRAFT)
    same(got, whole(states[:16])[10:])
    path = np.concatenate([states[:13], states[50:53]])
    same(await session.run(13, states[50:53], flags=Flag.DRAFT), whole(path)[13:])
    path = np.concatenate([path[:15], states[60:61]])
    same(await session.run(15, states[60:61], accept=(0, 1)), whole(path)[15:])


async def test_draft_tree_and_accept(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:18])
    #      0 - 1 - 3
    #        \ 2 - 4 - 5
    tree = (0b1, 0b11, 0b101, 0b1011, 0b10101, 0b110101)
    nodes = states[20:26]
    got = await session.run(18, nodes, tree=tree)
    for node, bits in enumerate(tree):
        path = [i for i in range(6) if bits >> i & 1]
        same(got[node], whole(np.concatenate([states[:18], nodes[path]]))[-1])
    accepted = (0, 2, 4)
    kept = np.concatenate([states[:18], nodes[list(accepted)]])
    got = await session.run(21, states[30:33], accept=accepted)
    same(got, whole(np.concatenate([kept, states[30:33]]))[21:])
    await session.run(24, states[40:43], tree=(1, 3, 5))
    got = await session.run(24, states[33:34])
    same(got, whole(np.concatenate([kept, states[30:34]]))[24:])
    place.check_pages()


async def test_fork_and_both_go_on(place: Any, states: Floats, whole: Whole) -> None:
    edge = await place.connect()
    parent = await edge.open(1, BLOCKS)
    await parent.run(0, states[:37])
    used = place.hosted.engine.pool.num_used
    child = await parent.fork(2, 21)
    assert place.hosted.engine.pool.num_used == used, "a fork copies nothing"
    assert child.grant is not None
    assert (child.grant.length, child.grant.seq) == (21, 0)
    await edge.send(child.step(21, states[100:105]), parent.step(37, states[37:38]))
    frames = {frame.handle: frame for frame in (await edge.expect(Kind.REPLY), await edge.expect(Kind.REPLY))}
    same(child.rows(frames[2]), whole(np.concatenate([states[:21], states[100:105]]))[21:])
    same(parent.rows(frames[1]), whole(states[:38])[37:])
    parent.ack, child.ack = 2, 1
    await parent.close()
    got = await child.run(26, states[110:112])
    same(got, whole(np.concatenate([states[:21], states[100:105], states[110:112]]))[26:])
    await child.close()
    assert place.hosted.engine.pool.num_used == 0


async def test_many_sessions_at_once_are_each_alone(place: Any, states: Floats, whole: Whole) -> None:
    edge = await place.connect()
    sessions = [await edge.open(i + 1, BLOCKS) for i in range(10)]
    rows = [np.roll(states, i * 7, axis=0)[: 30 + i] for i in range(10)]
    got: dict[int, list[Floats]] = {session.handle: [] for session in sessions}
    await edge.send(*(session.step(0, r[:20]) for session, r in zip(sessions, rows, strict=True)))
    pending = len(sessions)
    while pending:
        frame = await edge.expect(Kind.REPLY)
        pending -= 1
        session, mine = sessions[frame.handle - 1], rows[frame.handle - 1]
        got[frame.handle].append(session.rows(frame))
        session.ack = frame.seq
        at = 20 + frame.seq - 1
        if at < len(mine):
            await edge.send(session.step(at, mine[at : at + 1]))
            pending += 1
    for session, mine in zip(sessions, rows, strict=True):
        same(np.concatenate(got[session.handle]), whole(mine))


async def test_pages_are_zeroed_before_another_owner_gets_them(make_place: Any, states: Floats) -> None:
    place = await make_place(max_num_seqs=1, max_model_len=32)
    pool, cache = place.hosted.engine.pool, place.hosted.engine.cache
    assert pool.num_pages == 2
    alice = await (await place.connect("alice")).open(1, BLOCKS)
    await alice.run(0, states[:32])
    assert cache.k.abs().amax(dim=(0, 2, 3, 4)).min() > 0
    await alice.close()
    bob = await (await place.connect("bob")).open(1, BLOCKS)
    await bob.run(0, states[:1])
    await bob.run(1, states[1:17])
    for tensor in (cache.k, cache.v):
        assert tensor[:, 1, 1:].abs().max() == 0, "what alice left is still there"


@pytest.mark.parametrize("pieces", [1, 5])
async def test_frames_may_come_in_any_number_of_messages(place: Any, states: Floats, whole: Whole, pieces: int) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    frames = [session.step(i, states[i : i + 1]) for i in range(10)]
    for start in range(0, 10, 10 // pieces):
        await session.edge.send(*frames[start : start + 10 // pieces])
        await asyncio.sleep(0)
    got = [await session.reply() for _ in frames]
    same(np.concatenate(got), whole(states[:10]))


async def test_cancel_drops_what_is_queued(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:5])
    frames = [session.step(5 + i, states[5 + i : 6 + i]) for i in range(4)]
    await session.edge.send(*frames, Frame(Kind.CANCEL, handle=1, seq=4))
    replies = [await session.reply(), await session.reply()]
    answer = await session.edge.expect(Kind.CANCEL, 1)
    assert (answer.seq, answer.first) == (3, 7)
    session.seq = 3
    replies.append(await session.run(7, states[7:8]))
    same(np.concatenate(replies), whole(states[:8])[5:])
