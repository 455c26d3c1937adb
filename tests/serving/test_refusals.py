"""Whatever is wrong is refused by name, and everybody else goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_edge import Floats, RawEdge, RawSession

from serving.limits import Limits
from split_llama.errors import (
    BadFrame,
    BadRequest,
    BadStates,
    ContextExceeded,
    FrameTooLarge,
    LimitExceeded,
    ModelMismatch,
    NonFiniteStates,
    NotOwner,
    OutOfPages,
    PartitionNotAllowed,
    PositionGap,
    SequenceGap,
    ServerFault,
    StaleStep,
    UnknownSession,
    UnsupportedVersion,
    WindowExceeded,
)
from split_llama.transport.base import ChannelClosed
from split_llama.wire.control import error_from_frame
from split_llama.wire.frame import HEADER_SIZE, Flag, Frame, Kind

BLOCKS = (1, 5)
Whole = Callable[..., Floats]


async def opened(place: Any, owner: str = "alice") -> RawSession:
    session: RawSession = await (await place.connect(owner)).open(1, BLOCKS)
    return session


async def goes_on(session: RawSession, states: Floats, whole: Whole, first: int = 0) -> None:
    """The session still gives the right answers."""
    got = await session.run(first, states[first : first + 3])
    np.testing.assert_allclose(got, whole(states[: first + 3])[first:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"blocks": (0, 5)}, PartitionNotAllowed, "hosted"),
        ({"blocks": (1, 6)}, PartitionNotAllowed, "hosted"),
        ({"blocks": (1, 60)}, PartitionNotAllowed, "6 blocks"),
        ({"geometry": "0" * 64}, ModelMismatch, "geometry"),
        ({"weights": "0" * 64}, ModelMismatch, "weights"),
        ({"tokenizer": "0" * 64}, ModelMismatch, "tokenizer"),
        ({"adapter": "mine"}, BadRequest, "adapter"),
        ({"hops": ("http://other:1",)}, BadRequest, "hops"),
    ],
)
async def test_open_is_checked(place: Any, fields: dict[str, Any], error: type[Exception], word: str) -> None:
    edge = await place.connect()
    session = RawSession(edge, 1, **({"blocks": BLOCKS} | fields))
    await edge.send(session.opening(Kind.OPEN), session.step(0, np.zeros((1, 32), np.float32)))
    with pytest.raises(error, match=word):
        raise await edge.error(handle=1, seq=0)
    with pytest.raises(UnknownSession):
        raise await edge.error(handle=1, seq=1)
    assert len(place.core.registry) == 0
    place.check_pages()


async def test_right_digests_are_accepted_and_steps_may_follow_at_once(
    place: Any, states: Floats, whole: Whole
) -> None:
    edge = await place.connect()
    hosted = place.hosted
    manifest = await asyncio.to_thread(lambda: hosted.slices.slice(_partition(2, 1)).manifest())
    digests = {"geometry": hosted.geometry, "weights": manifest.digest, "tokenizer": manifest.tokenizer_digest}
    session = RawSession(edge, 1, (2, 5), **digests)
    await edge.send(session.opening(Kind.OPEN), session.step(0, states[:4]))
    await edge.expect(Kind.OPEN, 1)
    got = await session.reply()
    np.testing.assert_allclose(got, whole(states[:4], (2, 5)), rtol=1e-4, atol=1e-4)


def _partition(p: int, q: int) -> Any:
    from split_llama.config import Partition

    return Partition(p, q)


async def test_steps_are_checked_one_by_one(place: Any, states: Floats, whole: Whole) -> None:
    session = await opened(place)
    await goes_on(session, states, whole)
    good = session.step(3, states[3:4])
    session.seq -= 1
    bad: list[tuple[Frame, type[Exception]]] = [
        (session.step(4, states[:1]), PositionGap),
        (session.step(3, states[:1], seq=3), SequenceGap),
        (session.step(3, states[:1], ack=2), BadRequest),
        (Frame(Kind.STEP, handle=1, seq=2, ack=1, first=3, count=2, payload=good.payload), BadStates),
        (Frame(Kind.STEP, handle=1, seq=2, ack=1, first=3, count=0), BadRequest),
        (Frame(Kind.STEP, codec=9, handle=1, seq=2, ack=1, first=3, count=1, payload=good.payload), BadStates),
        (Frame(Kind.STEP, flags=64, handle=1, seq=2, ack=1, first=3, count=1, payload=good.payload), BadRequest),
        (Frame(Kind.STEP, handle=1, seq=2, ack=1, first=3, count=2**31, payload=b""), BadStates),
        (session.step(3, states[:1], seq=1), StaleStep),
        (session.step(3, states[:1], seq=2, accept=(0,)), BadRequest),
        (Frame(Kind.REPLY, handle=1, seq=2), BadRequest),
        (Frame(Kind.FORWARD, handle=1), BadRequest),
        (Frame(Kind.OPEN, handle=1, payload=b"{}"), BadRequest),
        (Frame(Kind.OPEN, handle=2, payload=b"\xff{"), BadRequest),
        (Frame(Kind.STEP, handle=7, seq=1, count=1), UnknownSession),
        (Frame(Kind.FORK, handle=8, payload=b"{}"), BadRequest),
    ]
    for frame, expected in bad:
        await session.edge.send(frame)
        with pytest.raises(expected):
            raise await session.edge.error(handle=frame.handle)
    session.seq = 1
    await goes_on(session, states, whole, first=3)


async def test_nan_fails_alone(place: Any, states: Floats, whole: Whole) -> None:
    victim, other = await opened(place), await opened(place, "bob")
    await goes_on(victim, states, whole)
    bad = victim.step(3, states[3:6])
    payload = bytearray(bad.payload)
    payload[4:8] = b"\x00\x00\xc0\x7f"
    behind = [victim.step(6, states[6:7]), victim.step(7, states[7:8])]
    await victim.edge.send(Frame(Kind.STEP, handle=1, seq=2, ack=1, first=3, count=3, payload=bytes(payload)), *behind)
    await goes_on(other, states, whole)
    assert isinstance(await victim.edge.error(1, seq=2), NonFiniteStates)
    assert isinstance(await victim.edge.error(1, seq=3), SequenceGap)
    assert isinstance(await victim.edge.error(1, seq=4), SequenceGap)
    victim.seq = 1
    await goes_on(victim, states, whole, first=3)
    place.check_pages()


async def test_context_gives_both_lengths(make_place: Any, states: Floats, whole: Whole) -> None:
    place = await make_place(max_model_len=48)
    session = await opened(place)
    await session.run(0, states[:40])
    await session.edge.send(session.step(40, states[40:49]))
    error = await session.edge.error(1, seq=2)
    assert isinstance(error, ContextExceeded)
    assert "49" in error.message
    assert "48" in error.message
    session.seq = 1
    await goes_on(session, states, whole, first=40)


async def test_no_pages_left_and_the_same_step_again(make_place: Any, clock: Any, states: Floats, whole: Whole) -> None:
    place = await make_place(max_model_len=64, max_num_seqs=1, clock=clock, evict_seconds=1000.0)
    assert place.hosted.engine.pool.num_pages == 4
    first, second = await opened(place), await opened(place, "bob")
    await first.run(0, states[:40])
    # What was promised to the first one lapses.
    clock.now += 6
    await second.run(0, states[:10])
    frame = second.step(10, states[10:20])
    await second.edge.send(frame)
    await asyncio.sleep(0.3)
    assert not second.edge.inbox, "it waits for room"
    clock.now += 11
    error = await second.edge.error(1, seq=2)
    assert isinstance(error, OutOfPages)
    assert error.retry_after_ms > 0
    place.check_pages()
    await first.close()
    await second.edge.send(frame)
    got = await second.reply()
    np.testing.assert_allclose(got, whole(states[:20])[10:], rtol=1e-4, atol=1e-4)


async def test_pages_of_idle_sessions_are_taken_and_the_session_resyncs(
    make_place: Any, clock: Any, states: Floats, whole: Whole
) -> None:
    place = await make_place(max_model_len=64, max_num_seqs=1, clock=clock, evict_seconds=30.0)
    idle, busy = await opened(place), await opened(place, "bob")
    await idle.run(0, states[:40])
    clock.now += 31
    await busy.run(0, states[:40])
    await idle.edge.send(idle.step(40, states[40:41]))
    resync = await idle.edge.expect(Kind.RESYNC, 1)
    assert (resync.first, resync.seq) == (0, 1)
    await busy.close()
    await idle.edge.send(Frame(Kind.RESYNC, handle=1, seq=1, first=0))
    idle.seq = idle.ack = 1
    await idle.edge.send(idle.step(0, states[:40], flags=Flag.REPLY_NONE), idle.step(40, states[40:43]))
    assert (await idle.edge.expect(Kind.REPLY)).count == 0
    idle.ack = 2
    np.testing.assert_allclose(await idle.reply(), whole(states[:43])[40:], rtol=1e-4, atol=1e-4)


async def test_window_in_steps_and_inside_it_nothing_is_refused(place: Any, states: Floats, whole: Whole) -> None:
    session = await opened(place)
    assert session.grant is not None
    window = session.grant.window_steps
    await session.edge.send(*(session.step(i, states[i : i + 1]) for i in range(window + 1)))
    replies, error = [], None
    while len(replies) < window or error is None:
        frame = await session.edge.next()
        if frame.kind is Kind.ERROR:
            assert frame.seq == window + 1
            error = error_from_frame(frame)
        else:
            replies.append(session.rows(frame))
    assert isinstance(error, WindowExceeded)
    np.testing.assert_allclose(np.concatenate(replies), whole(states[:window]), rtol=1e-4, atol=1e-4)
    session.seq = session.ack = window
    await goes_on(session, states, whole, first=window)


async def test_another_owner_cannot_touch_a_session(place: Any, states: Floats, whole: Whole) -> None:
    session = await opened(place)
    await goes_on(session, states, whole)
    bob = await place.connect("bob")
    for payload, kind in ((session.payload, Kind.ATTACH), (session.payload, Kind.OPEN)):
        await bob.send(Frame(kind, handle=1, payload=payload.to_bytes()))
        assert isinstance(await bob.error(1), NotOwner | BadRequest)
    alice = await place.connect("alice")
    forged = session.payload.model_copy(update={"secret": secrets.token_hex(32)})
    await alice.send(Frame(Kind.ATTACH, handle=1, payload=forged.to_bytes()))
    assert isinstance(await alice.error(1), NotOwner)
    await goes_on(session, states, whole, first=3)


async def test_limits_of_a_key_and_of_the_server(make_place: Any, states: Floats) -> None:
    place = await make_place(max_sessions=3)
    alice = await place.connect("alice", Limits(max_sessions=2, max_tokens_per_minute=10))
    one, _ = await alice.open(1, BLOCKS), await alice.open(2, BLOCKS)
    await alice.send(RawSession(alice, 3, BLOCKS).opening(Kind.OPEN))
    assert isinstance(error := await alice.error(3, seq=0), LimitExceeded)
    assert error.retry_after_ms > 0
    await one.run(0, states[:10])
    frame = one.step(10, states[10:15])
    await alice.send(frame)
    assert isinstance(error := await alice.error(1, seq=2), LimitExceeded)
    assert 25_000 < error.retry_after_ms <= 31_000
    bob = await place.connect("bob")
    await bob.open(1, BLOCKS)
    await bob.send(RawSession(bob, 2, BLOCKS).opening(Kind.OPEN))
    assert isinstance(await bob.error(2, seq=0), LimitExceeded)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + b" " * 40, BadFrame),
        (Frame(Kind.STEP, handle=1).encode()[:-1], BadFrame),
        (Frame(Kind.STEP, handle=1, payload=b"abc").encode()[:-1], BadFrame),
        (b"\x46\x4c\x02" + bytes(29), UnsupportedVersion),
        (Frame(Kind.STEP, handle=1, payload=bytes(70_000)).encode(), FrameTooLarge),
        (b"\x46\x4c\x01\x63" + bytes(28), BadFrame),
    ],
)
async def test_broken_framing_closes_its_connection_only(
    place: Any, states: Floats, whole: Whole, message: bytes, error: type[Any]
) -> None:
    session, other = await opened(place), await opened(place, "bob")
    await session.edge.channel.send(message)
    assert type(await session.edge.error(handle=0)) is error
    with pytest.raises(ChannelClosed) as closed:
        await session.edge.next()
    assert closed.value.code == error.close_code
    await goes_on(other, states, whole)
    back = await place.connect("alice")
    assert (await session.attach(back)).kind is Kind.ATTACH
    await goes_on(session, states, whole)


async def test_hello_comes_first(place: Any) -> None:
    from serving.dataplane import serve_channel
    from serving.keys import Principal
    from split_llama.transport.inprocess import InProcessTransport

    transport = InProcessTransport(lambda channel: serve_channel(place.core, channel, Principal("alice")))
    edge = RawEdge(await transport.connect())
    await edge.send(RawSession(edge, 1, BLOCKS).opening(Kind.OPEN))
    assert isinstance(await edge.error(0), BadFrame)
    await transport.aclose()
    with pytest.raises(ModelMismatch, match="other-model"):
        await place.connect(model="other-model")


async def test_an_engine_failure_costs_one_pass(place: Any, states: Floats, whole: Whole) -> None:
    session, other = await opened(place), await opened(place, "bob")
    await goes_on(session, states, whole)
    await goes_on(other, states, whole)
    executor = place.hosted.engine.executor

    class Broken:
        def run(self, plan: Any, batch: Any) -> Any:
            raise RuntimeError("the device fell off the bus")

    place.hosted.engine.executor = Broken()
    await session.edge.send(session.step(3, states[3:4]))
    assert isinstance(await session.edge.error(1, seq=2), ServerFault)
    resync = await session.edge.expect(Kind.RESYNC, 1)
    place.hosted.engine.executor = executor
    await goes_on(other, states, whole, first=3)
    await session.edge.send(Frame(Kind.RESYNC, handle=1, seq=resync.seq, first=0))
    session.seq = session.ack = resync.seq
    await goes_on(session, states, whole)
    place.check_pages()


async def test_a_server_that_cannot_go_on_says_so(
    place: Any, states: Floats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = await opened(place)

    def broken(candidates: Any) -> Any:
        raise RuntimeError("a bug in the scheduler")

    monkeypatch.setattr(place.core._scheduler, "pick", broken)
    await session.edge.send(session.step(0, states[:1]))
    async with asyncio.timeout(5):
        while place.core.is_healthy:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert not place.core.is_ready
    assert "a bug in the scheduler" in caplog.text


FRAMES = st.builds(
    Frame,
    kind=st.sampled_from(list(Kind)),
    codec=st.integers(0, 5),
    flags=st.integers(0, 63),
    aux=st.integers(0, 3),
    handle=st.integers(0, 2),
    seq=st.integers(0, 3),
    ack=st.integers(0, 2),
    first=st.integers(0, 3),
    count=st.integers(0, 3),
    payload=st.one_of(st.binary(max_size=300), st.binary(min_size=128, max_size=128), st.just(bytes(136))),
)
MESSAGES = st.lists(st.one_of(FRAMES.map(Frame.encode), st.binary(max_size=2 * HEADER_SIZE)), min_size=1, max_size=6)


async def test_any_bytes_whatsoever(place: Any, states: Floats, whole: Whole) -> None:
    bystander = await opened(place, "bob")
    await goes_on(bystander, states, whole)
    loop = asyncio.get_running_loop()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(MESSAGES)
    def attack(messages: list[bytes]) -> None:
        asyncio.run_coroutine_threadsafe(attack_once(messages), loop).result(30)

    async def attack_once(messages: list[bytes]) -> None:
        session = await opened(place, "mallory")
        try:
            for message in messages:
                await session.edge.channel.send(message)
            async with asyncio.timeout(0.05):
                while True:
                    session.edge.inbox.clear()
                    await session.edge.next()
        except (ChannelClosed, TimeoutError):
            pass
        await session.edge.channel.close()
        await asyncio.sleep(0)
        for entry in [entry for entry in place.core.registry if entry.owner == "mallory"]:
            place.core.remove(entry)

    await asyncio.to_thread(attack)
    await goes_on(bystander, states, whole, first=3)
    place.check_pages()
    assert place.core.is_ready
