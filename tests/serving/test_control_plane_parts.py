"""Small parts of the control plane: histogram, work thread, pace, a writer that gets stuck."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from raw_edge import Floats, RawEdge

from serving import dataplane
from serving.dataplane import serve_channel
from serving.histogram import Histogram
from serving.keys import ANONYMOUS, Principal
from serving.outbox import Outbox
from serving.pace import MARGIN_SECONDS, Pace
from serving.scheduler import Candidate, Scheduler
from serving.threads import WorkThread
from split_llama.errors import SlowReader
from split_llama.transport.base import Channel, ChannelClosed
from split_llama.transport.inprocess import channel_pair
from split_llama.wire.frame import Frame, Kind, split_message

BOUNDS = (0.001, 0.5, 1.0, 64.0)


@given(st.lists(st.one_of(st.floats(0, 100), st.sampled_from(BOUNDS)), max_size=50))
def test_a_histogram_says_what_the_client_librarys_own_says(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("some_seconds", "Some text", BOUNDS)
    ours.register(mine)
    reference = prometheus_client.Histogram("some_seconds", "Some text", registry=theirs, buckets=BOUNDS)
    for value in values:
        mine.observe(value)
        reference.observe(value)
    expected = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == expected


async def test_a_work_thread_keeps_order_and_hands_on_what_is_raised() -> None:
    thread, done = WorkThread("test"), []

    def work(number: int) -> int:
        done.append((number, threading.current_thread().name))
        if number == 1:
            raise ValueError("one")
        return number * 10

    futures = [thread.run(work, number) for number in range(3)]
    assert await futures[0] == 0
    with pytest.raises(ValueError, match="one"):
        await futures[1]
    assert await futures[2] == 20
    assert done == [(number, "test") for number in range(3)]
    thread.stop()


async def test_a_stopped_work_thread_ends_after_the_job_that_is_under_way() -> None:
    thread, gate, began = WorkThread("test"), threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        gate.wait(10)

    first, dropped = thread.run(wait), thread.run(print)
    assert await asyncio.to_thread(began.wait, 10)
    first.cancel()
    thread.stop()
    gate.set()
    await asyncio.to_thread(thread._thread.join, 10)
    assert not thread._thread.is_alive()
    assert not dropped.done()


def test_the_pace_leaves_the_host_the_time_it_needs() -> None:
    pace = Pace()
    pace.started(picked=0.0, now=0.0)
    assert pace.wait_seconds(0.0) == 0, "nothing is known yet"
    pace.finished(0.1, now=0.1, unfinished=0)
    assert pace.wait_seconds(0.1) == 0, "nothing runs"
    pace.started(picked=0.1, now=0.11)
    left = 0.11 + 0.1 - 0.15
    assert pace.wait_seconds(0.15) == pytest.approx(left - 2 * 0.2 * 0.01 - MARGIN_SECONDS)
    assert pace.wait_seconds(0.22) == 0
    pace.started(picked=0.2, now=0.21)
    pace.finished(0.05, now=0.22, unfinished=1)
    assert 0 < pace.wait_seconds(0.22) < 0.05


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=8))
def test_what_fits_into_one_pass_is_taken_as_it_is(steps: list[list[int]]) -> None:
    candidates = [Candidate(key, f"owner-{key % 2}", tuple(rows), key) for key, rows in enumerate(steps)]
    rows = sum(map(sum, steps))
    picks = Scheduler(rows, len(candidates)).pick(candidates)
    assert {pick.key: (pick.steps, pick.rows) for pick in picks} == {
        key: (len(rows), sum(rows)) for key, rows in enumerate(steps)
    }


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 300)), min_size=1, max_size=20), st.integers(32, 400))
def test_an_outbox_gives_whole_frames_in_order_under_their_handles(
    sent: list[tuple[int, int]], max_message_bytes: int
) -> None:
    outbox = Outbox(10**6)
    for number, (handle, size) in enumerate(sent):
        outbox.put(Frame(Kind.REPLY, handle=99, seq=number, payload=bytes(size)), handle)
    got = []
    while message := outbox.take(max_message_bytes):
        frames = list(split_message(message))
        assert len(frames) == 1 or len(message) <= max_message_bytes
        got += frames
    assert [(frame.handle, frame.seq, len(frame.payload)) for frame in got] == [
        (handle, number, size) for number, (handle, size) in enumerate(sent)
    ]
    assert outbox.size == 0


async def drain(channel: Channel) -> None:
    while True:
        await channel.receive()


async def test_a_message_that_is_never_taken_ends_the_connection(
    place: Any, states: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataplane, "SEND_SECONDS", 0.2)
    near, far = channel_pair(queued_messages=1)
    serving = asyncio.create_task(serve_channel(place.core, far, Principal(ANONYMOUS)))
    edge = await RawEdge.greet(near)
    session = await edge.open(1, (1, 5))
    await session.run(0, states[:1])
    # Two replies and nobody reads: the second one stays on its way.
    for position in (1, 2, 3):
        await edge.send(session.step(position, states[position : position + 1]))
        await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        await serving
    with pytest.raises(ChannelClosed) as closed:
        await drain(near)
    assert closed.value.code == SlowReader.close_code
