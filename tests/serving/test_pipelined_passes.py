"""Two passes unfinished at once: order, one pass per session, faults, draining, shutdown, pages of running passes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_edge import Floats, RawEdge, RawSession

from serving.core import Core
from serving.dataplane import serve_channel
from serving.hosted import load_hosted
from serving.keys import ANONYMOUS, KeyRing, Principal
from serving.passes import HostPasses, Outcome
from serving.settings import ServerSettings
from split_llama.engine.engine import Engine
from split_llama.engine.pages import CopyPage, ZeroPages
from split_llama.engine.plan import BatchPlan
from split_llama.errors import Draining, ServerFault
from split_llama.transport.inprocess import InProcessTransport
from split_llama.wire.frame import Frame, Kind

BLOCKS = (1, 5)
PATIENCE = 20.0
Whole = Callable[..., Floats]


class GatedPasses(HostPasses):
    """Two passes at a time; each is computed when it starts, and finishes when the test opens its gate."""

    depth = 2

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.plans: list[BatchPlan] = []
        self.gates = [threading.Event() for _ in range(2000)]
        self.finished: list[int] = []
        self.failing_start: set[int] = set()
        self.failing_finish: set[int] = set()
        self.most_unfinished = 0

    def open_all(self) -> None:
        for gate in self.gates:
            gate.set()

    def start(self, plan: BatchPlan, staged: Any, kept: Sequence[int]) -> Any:
        number = len(self.plans)
        self.check_apart(plan)
        self.plans.append(plan)
        self.most_unfinished = max(self.most_unfinished, len(self.unfinished))
        if number in self.failing_start:
            self.finished.append(number)
            raise RuntimeError("no start")
        return number, super().start(plan, staged, kept)

    def finish(self, running: Any) -> Outcome:
        number, output = running
        assert self.gates[number].wait(PATIENCE)
        self.finished.append(number)
        if number in self.failing_finish:
            raise RuntimeError("no finish")
        return super().finish(output)

    @property
    def unfinished(self) -> list[BatchPlan]:
        return [plan for number, plan in enumerate(self.plans) if number not in self.finished]

    def check_apart(self, plan: BatchPlan) -> None:
        """No page that an unfinished pass writes is written, cleared or copied to by this one."""
        theirs = {page for other in self.unfinished for page in written_pages(other)}
        assert not theirs & written_pages(plan)


def written_pages(plan: BatchPlan) -> set[int]:
    pages = {slot // 16 for run in plan.runs for slot in run.cache_slots(16)}
    for edit in plan.edits:
        if isinstance(edit, ZeroPages):
            pages.update(edit.pages)
        elif isinstance(edit, CopyPage):
            pages.add(edit.target)
    return pages


class Pipelined:
    """A core over gated passes."""

    def __init__(self, core: Core, passes: GatedPasses) -> None:
        self.core = core
        self.passes = passes
        self.transport = InProcessTransport(lambda channel: serve_channel(core, channel, Principal(ANONYMOUS)))

    async def sessions(self, count: int) -> tuple[RawEdge, list[RawSession]]:
        edge = await RawEdge.greet(await self.transport.connect())
        return edge, [await edge.open(handle, BLOCKS) for handle in range(1, count + 1)]

    async def until_started(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.passes.plans) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def stays_at(self, count: int) -> None:
        await asyncio.sleep(0.05)
        assert len(self.passes.plans) == count


Make = Callable[..., Awaitable[Pipelined]]


@pytest.fixture
async def make(model_folder: Path) -> AsyncIterator[Make]:
    made: list[Pipelined] = []

    async def make_one(clock: Callable[[], float] | None = None, **fields: Any) -> Pipelined:
        settings = ServerSettings(**({"model": str(model_folder), "device": "cpu", "max_num_seqs": 4} | fields))
        core = Core(settings, KeyRing(), **({} if clock is None else {"clock": clock}))
        hosted = load_hosted(settings, model_folder)
        passes = GatedPasses(hosted.engine)
        core.serve(hosted, passes)
        made.append(Pipelined(core, passes))
        return made[-1]

    yield make_one
    for one in made:
        one.passes.open_all()
        await one.transport.aclose()
        await one.core.aclose()


def same(got: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


async def test_the_next_pass_starts_while_one_runs_and_a_third_waits(make: Make, states: Floats, whole: Whole) -> None:
    place = await make()
    edge, (a, b, c) = await place.sessions(3)
    for number, session in enumerate((a, b), start=1):
        await edge.send(session.step(0, states[: 4 * number]))
        await place.until_started(number)
    await edge.send(c.step(0, states[:20]))
    await place.stays_at(2)
    place.passes.gates[1].set()
    await asyncio.sleep(0.05)
    assert not place.passes.finished, "passes finish in the order in which they started"
    place.passes.gates[0].set()
    same(await a.reply(), whole(states[:4]))
    same(await b.reply(), whole(states[:8]))
    await place.until_started(3)
    place.passes.gates[2].set()
    same(await c.reply(), whole(states[:20]))
    assert place.passes.finished == [0, 1, 2]
    assert [plan.num_rows for plan in place.passes.plans] == [4, 8, 20]


async def test_a_reply_does_not_wait_for_the_pass_behind_it(make: Make, states: Floats, whole: Whole) -> None:
    place = await make()
    edge, (a, b) = await place.sessions(2)
    await edge.send(a.step(0, states[:4]))
    await place.until_started(1)
    await edge.send(b.step(0, states[:4]))
    await place.until_started(2)
    place.passes.gates[0].set()
    same(await a.reply(), whole(states[:4]))
    assert place.passes.finished == [0]
    await edge.send(a.step(4, states[4:5]))
    await place.until_started(3)
    assert place.passes.finished == [0]


async def test_a_session_is_in_one_unfinished_pass_at_most(make: Make, states: Floats, whole: Whole) -> None:
    place = await make()
    edge, (a,) = await place.sessions(1)
    await edge.send(a.step(0, states[:4]))
    await place.until_started(1)
    await edge.send(a.step(4, states[4:5]), a.step(5, states[5:6]))
    await place.stays_at(1)
    place.passes.open_all()
    got = [await a.reply() for _ in range(3)]
    same(np.concatenate(got), whole(states[:6]))
    assert [plan.num_rows for plan in place.passes.plans] == [4, 2], "what was queued meanwhile rides together"


@pytest.mark.parametrize("at", ["failing_start", "failing_finish"])
async def test_a_pass_that_fails_loses_its_own_sessions_only(make: Make, states: Floats, whole: Whole, at: str) -> None:
    place = await make()
    edge, (a, b) = await place.sessions(2)
    getattr(place.passes, at).add(0)
    await edge.send(a.step(0, states[:4]))
    await place.until_started(1)
    await edge.send(b.step(0, states[:9]))
    await place.until_started(2)
    place.passes.open_all()
    frames = {(frame.kind, frame.handle): frame for frame in [await edge.next() for _ in range(3)]}
    assert set(frames) == {(Kind.ERROR, 1), (Kind.RESYNC, 1), (Kind.REPLY, 2)}
    assert frames[Kind.ERROR, 1].aux == ServerFault.code
    same(b.rows(frames[Kind.REPLY, 2]), whole(states[:9]))
    b.ack = 1
    same(await b.run(9, states[9:11]), whole(states[:11])[9:])
    await edge.send(Frame(Kind.RESYNC, handle=1, seq=0, first=0))
    a.seq = a.ack = 0
    same(await a.run(0, states[:4]), whole(states[:4]))
    place.core.hosted.engine.pool.check_integrity([e.session.sequence.block_table for e in place.core.registry])


async def test_draining_waits_for_all_unfinished_passes(make: Make, states: Floats, whole: Whole) -> None:
    place = await make()
    edge, (a, b) = await place.sessions(2)
    for number, session in enumerate((a, b), start=1):
        await edge.send(session.step(0, states[:4]))
        await place.until_started(number)
    draining = asyncio.create_task(place.core.drain())
    place.passes.gates[0].set()
    same(await a.reply(), whole(states[:4]))
    assert not draining.done()
    await edge.send(a.step(4, states[4:5]))
    assert isinstance(await edge.error(1), Draining)
    place.passes.gates[1].set()
    same(await b.reply(), whole(states[:4]))
    async with asyncio.timeout(PATIENCE):
        await draining


async def test_shutdown_with_passes_in_flight(make: Make, states: Floats) -> None:
    place = await make()
    edge, (a, b) = await place.sessions(2)
    for number, session in enumerate((a, b), start=1):
        await edge.send(session.step(0, states[:4]))
        await place.until_started(number)
    async with asyncio.timeout(PATIENCE):
        await place.core.aclose()
    assert place.passes.finished == []
    assert place.core.hosted.engine.pool.num_used == 0


async def test_pages_are_taken_from_the_idle_and_never_from_a_running_pass(
    make: Make, states: Floats, whole: Whole, clock: Any
) -> None:
    place = await make(clock, max_num_seqs=2, max_model_len=32, evict_seconds=10.0)
    pool = place.core.hosted.engine.pool
    assert pool.num_pages == 4
    edge, (idle, running, late) = await place.sessions(3)
    place.passes.gates[0].set()
    await idle.run(0, states[:16])
    await edge.send(running.step(0, states[:32]))
    await place.until_started(2)
    clock.now += 100.0
    await edge.send(late.step(0, states[40:72]))
    await place.until_started(3)
    tables = [set(run.block_table) for plan in place.passes.plans[1:] for run in plan.runs]
    assert not tables[0] & tables[1]
    place.passes.open_all()
    got = {frame.handle: frame for frame in [await edge.expect(Kind.REPLY) for _ in range(2)]}
    same(running.rows(got[2]), whole(states[:32]))
    same(late.rows(got[3]), whole(states[40:72]))


@pytest.mark.parametrize("seed", range(4))
async def test_many_sessions_through_overlapping_passes_are_each_alone(
    make: Make, states: Floats, whole: Whole, seed: int
) -> None:
    """`GatedPasses.check_apart` looks at every plan; gates open now and then, and sessions grow and roll back."""
    place = await make(max_num_seqs=6, max_model_len=64)
    draw = random.Random(seed)
    edge, sessions = await place.sessions(6)
    rows = {session.handle: states[:0] for session in sessions}
    opener = asyncio.create_task(open_now_and_then(place.passes, draw))
    for _ in range(12):
        busy = draw.sample(sessions, draw.randint(2, 6))
        for session in busy:
            first = draw.choice([len(rows[session.handle])] * 3 + [len(rows[session.handle]) // 2])
            first = 0 if first > 50 else first
            start = draw.randrange(150)
            new = states[start : start + draw.randint(1, 12)]
            rows[session.handle] = np.concatenate([rows[session.handle][:first], new])
            await edge.send(session.step(first, new))
            await asyncio.sleep(draw.choice([0.0, 0.01]))
        for frame in [await edge.expect(Kind.REPLY) for _ in busy]:
            session = sessions[frame.handle - 1]
            session.ack = frame.seq
            same(session.rows(frame), whole(rows[frame.handle])[frame.first :])
    opener.cancel()
    assert place.passes.most_unfinished == 2


async def open_now_and_then(passes: GatedPasses, draw: random.Random) -> None:
    for number, gate in enumerate(passes.gates):
        while len(passes.plans) <= number:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(draw.choice([0.0, 0.005, 0.02]))
        gate.set()
