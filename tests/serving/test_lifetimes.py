"""Connections come and go, sessions stay for a while, slow readers are cut off, keys are revoked."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_edge import Floats, RawEdge, RawSession

from serving import keys as keys_module
from serving.connection import Connection
from serving.core import Core
from serving.dataplane import serve_channel
from serving.keys import ANONYMOUS, KeyFile, KeyRing, Principal
from serving.limits import NO_LIMITS
from split_llama.errors import Draining, SlowReader, Unauthenticated, UnknownSession
from split_llama.transport.base import ChannelClosed
from split_llama.transport.inprocess import InProcessTransport
from split_llama.wire.control import Grant, Moved
from split_llama.wire.frame import Flag, Frame, Kind

BLOCKS = (1, 5)
Whole = Callable[..., Floats]


def same(got: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_lost_connection_is_resumed_where_it_was(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:20])
    lost = session.step(20, states[20:25])
    await session.edge.send(lost)
    await session.edge.channel.close()
    edge = await place.connect()
    answer = await session.attach(edge, handle=9)
    assert answer.kind is Kind.ATTACH
    assert Grant.from_bytes(answer.payload).seq in (1, 2)
    # Whether it was applied, is running or never came: the same step again gives its reply, once.
    again = Frame(Kind.STEP, handle=9, seq=2, ack=1, first=20, count=5, payload=lost.payload)
    await edge.send(again)
    same(await session.reply(), whole(states[:25])[20:])
    await edge.send(again)
    frame = await edge.expect(Kind.REPLY, 9)
    assert frame.seq == 2
    same(session.rows(frame), whole(states[:25])[20:])
    await session.edge.send(session.step(25, states[25:26]))
    # A reply that was just being made when the connection came back is a third one.
    while (frame := await edge.expect(Kind.REPLY, 9)).seq == 2:
        pass
    assert frame.seq == 3
    same(session.rows(frame), whole(states[:26])[25:])


async def test_the_newest_connection_wins(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    old = session.edge
    await session.run(0, states[:3])
    assert (await session.attach(await place.connect())).kind is Kind.ATTACH
    await old.send(Frame(Kind.STEP, handle=1, seq=2))
    assert isinstance(await old.error(1), UnknownSession)
    await old.channel.close()
    same(await session.run(3, states[3:5]), whole(states[:5])[3:])


async def test_an_unknown_session_is_made_and_replayed(make_place: Any, states: Floats, whole: Whole) -> None:
    first, second = await make_place(), await make_place()
    session = await (await first.connect()).open(1, BLOCKS)
    await session.run(0, states[:30])
    edge = await second.connect()
    answer = await session.attach(edge)
    assert (answer.kind, answer.first, answer.seq) == (Kind.RESYNC, 0, 0)
    late = session.step(30, states[30:31])
    await edge.send(late)
    session.seq = session.ack = 0
    await edge.send(
        Frame(Kind.RESYNC, handle=1, seq=0, first=0),
        session.step(0, states[:30], flags=Flag.REPLY_NONE),
        session.step(30, states[30:32]),
    )
    assert (await edge.expect(Kind.REPLY)).count == 0
    session.ack = 1
    same(await session.reply(), whole(states[:32])[30:])


async def test_grace_and_idle_expiry(make_place: Any, clock: Any, states: Floats) -> None:
    place = await make_place(clock=clock, grace_seconds=60.0, idle_seconds=600.0)
    core: Core = place.core
    gone, stays = await (await place.connect()).open(1, BLOCKS), await (await place.connect()).open(1, BLOCKS)
    await gone.run(0, states[:20])
    await stays.run(0, states[:20])
    await gone.edge.channel.close()
    await until(lambda: sum(entry.mailbox is None for entry in core.registry) == 1)
    clock.now += 59
    core.sweep()
    assert len(core.registry) == 2
    clock.now += 2
    core.sweep()
    assert [entry.ident for entry in core.registry] == [stays.payload.session]
    clock.now += 540
    core.sweep()
    assert len(core.registry) == 0
    assert place.hosted.engine.pool.num_used == 0
    await stays.edge.send(stays.step(20, states[20:21]))
    assert isinstance(await stays.edge.error(1), UnknownSession)
    assert (await stays.attach(stays.edge)).kind is Kind.RESYNC


async def test_a_slow_reader_is_cut_off_and_resumes(place: Any, states: Floats, whole: Whole) -> None:
    other = await (await place.connect("bob")).open(1, BLOCKS)
    connections: list[Connection] = []

    async def accept(channel: Any) -> None:
        connections.append(Connection(place.core, Principal(ANONYMOUS), outgoing_bytes=50_000))
        await serve_channel(place.core, channel, connections[0].principal, connections[0])

    transport = InProcessTransport(accept)
    place.transports.push_async_callback(transport.aclose)
    edge = await RawEdge.greet(await transport.connect())
    session = await edge.open(1, BLOCKS)
    await session.run(0, states[:50])
    # Nothing is read from here on: first the link fills up, then what waits behind it.
    for _ in range(200):
        connections[0].put(Frame(Kind.ERROR, payload=bytes(1000)))
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        with pytest.raises(ChannelClosed) as closed:
            await drain(edge)
    assert closed.value.code == SlowReader.close_code
    assert (await session.attach(await place.connect())).kind is Kind.ATTACH
    same(await session.run(50, states[50:51]), whole(states[:51])[50:])
    same(await other.run(0, states[:4]), whole(states[:4]))


async def drain(edge: RawEdge) -> None:
    while True:
        await edge.channel.receive()


async def test_revoked_keys(make_place: Any, tmp_path: Path, states: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "RECHECK_SECONDS", 0.0)
    file = KeyFile(tmp_path / "keys.json")
    secret = file.create("alice", NO_LIMITS)
    place = await make_place(keys=KeyRing(key_file=file.path))
    assert place.core.keys.authenticate(f"Bearer {secret}").owner == "alice"
    session = await (await place.connect("alice")).open(1, BLOCKS)
    await session.run(0, states[:3])
    file.revoke("alice")
    await session.edge.send(session.step(3, states[3:4]))
    assert isinstance(await session.edge.error(0), Unauthenticated)
    with pytest.raises(ChannelClosed) as closed:
        await session.edge.next()
    assert closed.value.code == Unauthenticated.close_code
    place.core.sweep()
    assert len(place.core.registry) == 0


async def test_draining_finishes_what_is_queued_and_takes_nothing_new(place: Any, states: Floats, whole: Whole) -> None:
    session = await (await place.connect()).open(1, BLOCKS)
    await session.run(0, states[:3])
    await session.edge.send(*(session.step(i, states[i : i + 1]) for i in range(3, 20)))
    await until(lambda: any(entry.session.queued or entry.session.applied > 1 for entry in place.core.registry))
    await place.core.drain()
    assert not place.core.is_ready
    same(np.concatenate([await session.reply() for _ in range(17)]), whole(states[:20])[3:])
    await session.edge.send(session.step(20, states[20:21]))
    assert isinstance(error := await session.edge.error(1), Draining)
    assert error.retry_after_ms > 0
    await session.edge.send(RawSession(session.edge, 2, BLOCKS).opening(Kind.OPEN))
    assert isinstance(await session.edge.error(2), Draining)
    place.core.closing.set()
    with pytest.raises(ChannelClosed) as closed:
        await session.edge.next()
    assert closed.value.code == 1001


async def test_a_draining_server_names_its_successor(place: Any, states: Floats) -> None:
    place.core.settings = dataclasses.replace(place.core.settings, successor="http://127.0.0.1:9")
    edge = await place.connect()
    sessions = [await edge.open(handle, BLOCKS) for handle in (1, 2)]
    await sessions[0].run(0, states[:3])
    await place.core.drain()
    for handle in (1, 2):
        moved = await edge.expect(Kind.MOVED, handle)
        assert Moved.from_bytes(moved.payload).address == "http://127.0.0.1:9"


async def test_closing_while_a_step_runs(place: Any, states: Floats, whole: Whole) -> None:
    edge = await place.connect()
    for handle in range(1, 6):
        session = RawSession(edge, handle, BLOCKS)
        await edge.send(session.opening(Kind.OPEN), session.step(0, states[:100]))
        await asyncio.sleep(0.001 * handle)
        await edge.send(Frame(Kind.CLOSE, handle=handle))
    last = await place.connect()
    other = await last.open(1, BLOCKS)
    same(await other.run(0, states[:9]), whole(states[:9]))
    await other.close()
    place.check_pages()
    assert place.hosted.engine.pool.num_used == 0
